"""A plan as a training loop in plain PyTorch, to paste."""

from __future__ import annotations

from textwrap import dedent, indent
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autobatch.plan import TrainingPlan

_DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}


def training_loop(plan: TrainingPlan) -> str:
    """The source of `train_epoch(plan, model, loader, loss_fn, optimizer, scheduler)`, with what this plan needs and no
    more."""
    device, scaled = plan.device.type, plan.precision == "fp16"
    ranks = f" on each of {plan.world_size} ranks" if plan.world_size > 1 else ""
    sizes = f"{plan.accumulation_steps} micro-batch(es) of at most {plan.micro_batch_size} samples{ranks}"
    micro_step = [
        f'inputs, targets = (part.to("{device}") for part in micro)',
        *_forward(plan),
        f"{'scaler.scale(loss)' if scaled else 'loss'}.backward()",
    ]
    if plan.world_size > 1:
        micro_step = [
            "last = step == plan.accumulation_steps - 1  # gradients are synchronised once per optimizer step",
            "with nullcontext() if last else model.no_sync():",
            *(f"    {line}" for line in micro_step),
        ]
        loop = "for step, (micro, weight) in enumerate(plan.split(batch)):"
    else:
        loop = "for micro, weight in plan.split(batch):"
    update = ["scaler.step(optimizer)", "scaler.update()"] if scaled else ["optimizer.step()"]
    body = [
        *([f'scaler = torch.amp.GradScaler("{device}")'] if scaled else []),
        "model.train()",
        "for batch in loader:",
        f"    {loop}",
        *(f"        {line}" for line in micro_step),
        *(["    scaler.unscale_(optimizer)"] if scaled else []),
        "    if max_norm is not None:",
        "        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)",
        *(f"    {line}" for line in update),
        "    optimizer.zero_grad(set_to_none=True)",
        "    if scheduler is not None:",
        "        scheduler.step()",
    ]
    header = dedent(
        f'''\
        {"from contextlib import nullcontext" if plan.world_size > 1 else ""}
        import torch


        def train_epoch(plan, model, loader, loss_fn, optimizer, scheduler=None, max_norm=None):
            """The loader gives batches of {sum(plan.micro_batch_sizes)} samples: each is one optimizer step of {sizes}.

            loss_fn must be a mean over samples. The model is on "{device}".
            """
        '''
    ).lstrip()
    return header + indent("\n".join(body), "    ") + "\n"


def _forward(plan: TrainingPlan) -> list[str]:
    # Nothing but the loss is kept: an output kept in a variable would live on through the next forward pass.
    forward = "loss = loss_fn(model(inputs), targets) * weight"
    if plan.precision == "fp32":
        return [forward]
    return [f'with torch.autocast("{plan.device.type}", dtype={_DTYPES[plan.precision]}):', f"    {forward}"]
