"""Activation checkpointing by the switches that models of libraries have."""

import pytest
import timm
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from autobatch.errors import InvalidInput
from autobatch.workload.checkpointing import switch_checkpointing


def saved_bytes(model: nn.Module, inputs: torch.Tensor) -> int:
    """What a forward pass keeps for its backward pass."""
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs)
    return kept


def gpt2() -> tuple[nn.Module, torch.Tensor]:
    config = GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=64, use_cache=False)
    return GPT2LMHeadModel(config).train(), torch.randint(64, (4, 16))


def vit() -> tuple[nn.Module, torch.Tensor]:
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, num_classes=4)
    return model.train(), torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize("make", [gpt2, vit])
def test_a_model_recomputes_when_it_is_switched_on_and_keeps_when_off(make) -> None:
    model, inputs = make()
    plain = saved_bytes(model, inputs)

    switch_checkpointing(model, True)
    assert saved_bytes(model, inputs) < plain / 2
    switch_checkpointing(model, False)
    assert saved_bytes(model, inputs) == plain


def test_a_model_without_a_switch_is_told() -> None:
    with pytest.raises(InvalidInput, match="Linear has no switch for activation checkpointing"):
        switch_checkpointing(nn.Linear(2, 2), True)
