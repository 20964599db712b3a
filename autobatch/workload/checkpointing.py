"""Activation checkpointing, by the switch that a model has for it."""

from __future__ import annotations

from torch import nn

from autobatch.errors import InvalidInput


def switch_checkpointing(model: nn.Module, on: bool) -> None:
    """Have a model recompute its activations in the backward pass, or keep them.

    Hugging Face's models have `gradient_checkpointing_enable()`, and timm's `set_grad_checkpointing()`.

    Raises:
        InvalidInput: the model has no such switch.
    """
    of_timm = getattr(model, "set_grad_checkpointing", None)
    of_huggingface = getattr(model, f"gradient_checkpointing_{'enable' if on else 'disable'}", None)
    if callable(of_timm):
        of_timm(on)
    elif callable(of_huggingface):
        of_huggingface()
    else:
        raise InvalidInput(
            f"{type(model).__name__} has no switch for activation checkpointing (gradient_checkpointing_enable or "
            "set_grad_checkpointing). Have the factory apply torch.utils.checkpoint itself, and leave it out here."
        )
