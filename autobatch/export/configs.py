"""A plan as the configuration of another framework, and what that configuration cannot say. No torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from autobatch.errors import InvalidInput

if TYPE_CHECKING:
    from autobatch.plan import TrainingPlan

Framework = Literal["transformers", "lightning", "accelerate", "deepspeed", "torchtitan"]


def config_for(plan: TrainingPlan, framework: str, tokens_per_sample: int | None) -> dict[str, Any]:
    """What `TrainingPlan.to` returns; see there. It warns where its caller's caller stands.

    Raises:
        InvalidInput: the framework is not known, no single size hits the target, or `tokens_per_sample` is no count of
            tokens, or is given to a framework that counts samples.
    """
    if framework not in _CONFIGS:
        known = ", ".join(map(repr, _CONFIGS))
        raise InvalidInput(f"framework must be one of {known}, but is {framework!r}.")
    if tokens_per_sample is not None and framework != "torchtitan":
        raise InvalidInput(f"tokens_per_sample is for torchtitan; {framework} counts samples.")
    if tokens_per_sample is not None and tokens_per_sample < 1:
        raise InvalidInput(f"tokens_per_sample must be at least 1, but is {tokens_per_sample}.")
    uniform = plan.uniform()
    sentences = [*_one_size(plan, uniform, framework), *_UNSAID[framework](uniform)]
    for sentence in sentences:
        warnings.warn(sentence, stacklevel=3)
    if tokens_per_sample is not None:
        return _torchtitan_tokens(uniform, tokens_per_sample)
    return _CONFIGS[framework](uniform)


def _transformers(plan: TrainingPlan) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "bf16": plan.precision == "bf16",
        "fp16": plan.precision == "fp16",
    }


def _lightning(plan: TrainingPlan) -> dict[str, Any]:
    precision = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[plan.precision]
    return {
        "dataloader": {"batch_size": plan.micro_batch_size},
        "trainer": {"accumulate_grad_batches": plan.accumulation_steps, "precision": precision},
    }


def _accelerate(plan: TrainingPlan) -> dict[str, Any]:
    precision = "no" if plan.precision == "fp32" else plan.precision
    return {
        "dataloader": {"batch_size": plan.micro_batch_size},
        "accelerator": {"gradient_accumulation_steps": plan.accumulation_steps, "mixed_precision": precision},
    }


def _deepspeed(plan: TrainingPlan) -> dict[str, Any]:
    return {
        "train_batch_size": plan.target_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "bf16": {"enabled": plan.precision == "bf16"},
        "fp16": {"enabled": plan.precision == "fp16"},
    }


def _torchtitan(plan: TrainingPlan) -> dict[str, Any]:
    return {
        "training": {
            "local_batch_size": plan.micro_batch_size,
            "global_batch_size": plan.target_batch_size,
            **_torchtitan_precision(plan),
        }
    }


def _torchtitan_tokens(plan: TrainingPlan, tokens_per_sample: int) -> dict[str, Any]:
    """The same as slots for tokens, which torchtitan's main branch counts in since August 2026, after 0.3.0."""
    return {
        "training": {
            "num_tokens_per_microbatch_per_dp_rank": plan.micro_batch_size * tokens_per_sample,
            "num_tokens_per_train_step": plan.target_batch_size * tokens_per_sample,
            "max_context_length": tokens_per_sample,
            **_torchtitan_precision(plan),
        }
    }


def _torchtitan_precision(plan: TrainingPlan) -> dict[str, Any]:
    # Said for fp32, too: bfloat16 is the default there.
    return {"mixed_precision_param": "float32" if plan.precision == "fp32" else "bfloat16"}


_CONFIGS: dict[str, Callable[[TrainingPlan], dict[str, Any]]] = {
    "transformers": _transformers,
    "lightning": _lightning,
    "accelerate": _accelerate,
    "deepspeed": _deepspeed,
    "torchtitan": _torchtitan,
}


def _one_size(plan: TrainingPlan, uniform: TrainingPlan, framework: str) -> Iterator[str]:
    if uniform.micro_batch_sizes == plan.micro_batch_sizes:
        return
    size, steps = uniform.micro_batch_size, uniform.accumulation_steps
    untried = plan.verified and not uniform.verified
    yield (
        f"{framework} takes one micro-batch size: {steps} × {size} samples instead of the plan's "
        f"{plan.accumulation_steps} micro-batches of at most {plan.micro_batch_size}"
        + (f"; {size} itself was not tried: fit(..., max_micro_batch={size}) tries it." if untried else ".")
    )


def _unsaid_to_transformers(plan: TrainingPlan) -> Iterator[str]:
    if _accumulates_tokens(plan):
        yield (
            "the Trainer weighs micro-batches by their tokens only for models whose forward takes num_items_in_batch "
            "(**kwargs); for others it takes the mean over micro-batches, which is not the mean over all tokens where "
            "micro-batches differ in tokens."
        )


def _unsaid_to_lightning(plan: TrainingPlan) -> Iterator[str]:
    yield from mean_of_means(plan, "Lightning")
    yield from _last_window(plan, "Lightning", "accumulate_grad_batches")


def _unsaid_to_accelerate(plan: TrainingPlan) -> Iterator[str]:
    yield from mean_of_means(plan, "Accelerate")
    yield from _last_window(plan, "Accelerate", "gradient_accumulation_steps")


def _unsaid_to_deepspeed(plan: TrainingPlan) -> Iterator[str]:
    yield from mean_of_means(plan, "DeepSpeed")
    if plan.precision != "fp32":
        name = {"bf16": "bfloat16", "fp16": "float16"}[plan.precision]
        yield (
            f'DeepSpeed\'s section "{plan.precision}" has the weights themselves in {name} and a float32 copy, '
            "where the trials ran autocast: its memory and its numbers differ a little. What the trials ran is "
            f'"torch_autocast": {{"enabled": true, "dtype": "{name}"}}, from DeepSpeed 0.17.2 on.'
        )


def _unsaid_to_torchtitan(plan: TrainingPlan) -> Iterator[str]:
    if plan.precision == "fp16":
        yield "torchtitan has no float16: mixed_precision_param is bfloat16, which takes as many bytes."


_UNSAID: dict[str, Callable[[TrainingPlan], Iterator[str]]] = {
    "transformers": _unsaid_to_transformers,
    "lightning": _unsaid_to_lightning,
    "accelerate": _unsaid_to_accelerate,
    "deepspeed": _unsaid_to_deepspeed,
    "torchtitan": _unsaid_to_torchtitan,
}


def _accumulates_tokens(plan: TrainingPlan) -> bool:
    """Whether losses of several micro-batches of tokens are added up, as far as the names in a batch tell."""
    return plan.accumulation_steps > 1 and "input_ids" in plan.batch_dims


def mean_of_means(plan: TrainingPlan, framework: str) -> Iterator[str]:
    """The sentence about frameworks that add up the losses of micro-batches as they are, where it matters."""
    if _accumulates_tokens(plan):
        yield (
            f"{framework} takes the mean over micro-batches, which is not the mean over all tokens where micro-batches "
            "differ in tokens; plan.stepper() is exact there."
        )


def _last_window(plan: TrainingPlan, framework: str, name: str) -> Iterator[str]:
    if plan.accumulation_steps > 1:
        share = plan.target_batch_size // plan.world_size
        yield (
            f"{framework} divides an epoch's last optimizer step by {name}, also where it has fewer micro-batches, so "
            f"that its gradient is too small, unless each rank's data is a multiple of {share} samples."
        )
