"""A plan as a training loop in plain PyTorch, to paste."""

from __future__ import annotations

from textwrap import indent
from typing import TYPE_CHECKING

from autobatch.report.words import samples_in_words

if TYPE_CHECKING:
    from autobatch.plan import TrainingPlan

_DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}


def training_loop(plan: TrainingPlan) -> str:
    """The source of `train_epoch(plan, model, loader, compute_loss, optimizer, scheduler, max_norm)`, with what this
    plan needs and no more."""
    return "\n".join([*_header(plan), *(indent(line, "    ") for line in _body(plan))]) + "\n"


def _header(plan: TrainingPlan) -> list[str]:
    one = plan.accumulation_steps == 1
    steps = f"{plan.accumulation_steps} micro-batch{'' if one else 'es'} of {'' if one else 'at most '}"
    steps += samples_in_words(plan.micro_batch_size)
    share = samples_in_words(sum(plan.micro_batch_sizes))
    if plan.world_size > 1:
        share += f" on rank {plan.rank} of {plan.world_size} ({plan.target_batch_size} over all)"
    return [
        *(["from contextlib import nullcontext", ""] if plan.world_size > 1 else []),
        "import torch",
        "",
        "",
        "def train_epoch(plan, model, loader, compute_loss, optimizer, scheduler=None, max_norm=None):",
        f'    """Train on batches of {share}, each one optimizer step: {steps}.',
        "",
        "    compute_loss(model, micro) is the mean loss over the samples of one micro-batch, such as",
        f'        x, y = (part.to("{_device(plan)}") for part in micro)',
        "        return torch.nn.functional.cross_entropy(model(x), y)",
        *(
            ["    Before the first epoch, plan.apply(model, optimizer) sets the knobs of the plan."]
            if plan.knobs
            else []
        ),
        '    """',
    ]


def _body(plan: TrainingPlan) -> list[str]:
    device, scaled = _device(plan), plan.precision == "fp16"
    # Nothing but the loss is kept: an output kept in a variable would live on through the next forward pass.
    forward = ["loss = compute_loss(model, micro) * weight"]
    if plan.precision != "fp32":
        forward = [f'with torch.autocast("{device}", dtype={_DTYPES[plan.precision]}):', f"    {forward[0]}"]
    micro_step = [*forward, f"{'scaler.scale(loss)' if scaled else 'loss'}.backward()"]
    if plan.world_size == 1:
        loop = ["for micro, weight in plan.split(batch):", *(f"    {line}" for line in micro_step)]
    else:
        loop = [
            "micros = list(plan.split(batch))",
            "for index, (micro, weight) in enumerate(micros, start=1):",
            "    # Gradients are synchronised once per optimizer step, with the last micro-batch.",
            "    with nullcontext() if index == len(micros) else model.no_sync():",
            *(f"        {line}" for line in micro_step),
        ]
    update = ["scaler.step(optimizer)", "scaler.update()"] if scaled else ["optimizer.step()"]
    step = [
        *loop,
        "if max_norm is not None:",
        *(["    scaler.unscale_(optimizer)"] if scaled else []),
        "    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)",
        *update,
        "optimizer.zero_grad(set_to_none=True)",
        "if scheduler is not None:",
        "    scheduler.step()",
    ]
    scaler = [f'scaler = torch.amp.GradScaler("{device}")'] if scaled else []
    return [*scaler, "model.train()", "for batch in loader:", *(f"    {line}" for line in step)]


def _device(plan: TrainingPlan) -> str:
    """Where the loop will run: a simulated GPU is a CUDA device, once it is there."""
    return "cuda" if plan.device.type == "simulated" else plan.device.type
