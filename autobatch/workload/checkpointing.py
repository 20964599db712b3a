"""Activation checkpointing, by the switch that a model has for it."""

from __future__ import annotations

from torch import nn

from autobatch.errors import InvalidInput


def switch_checkpointing(model: nn.Module, on: bool) -> None:
    """Have a model recompute its activations in the backward pass, or keep them.

    Hugging Face's models have `activation_checkpointing_enable()` (`gradient_checkpointing_enable()` before
    transformers 5), and timm's `set_grad_checkpointing()`.

    Raises:
        InvalidInput: the model has no such switch.
    """
    of_timm = getattr(model, "set_grad_checkpointing", None)
    verb = "enable" if on else "disable"
    older = getattr(model, f"gradient_checkpointing_{verb}", None)
    of_huggingface = getattr(model, f"activation_checkpointing_{verb}", older)
    if callable(of_timm):
        of_timm(on)
    elif callable(of_huggingface):
        of_huggingface()
    else:
        raise InvalidInput(
            f"{type(model).__name__} has no switch for activation checkpointing (gradient_checkpointing_enable or "
            "set_grad_checkpointing). Have the factory apply torch.utils.checkpoint itself, and leave it out here."
        )
