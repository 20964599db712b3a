"""`fit`: from a model and a target to a plan. Walks the road once: workload, device, search, plan."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

import autobatch
from autobatch import ranks
from autobatch.devices.base import Device
from autobatch.errors import AutobatchError, NothingFits
from autobatch.plan import TrainingPlan
from autobatch.precision import Precision
from autobatch.prediction.accuracy import ERROR_BOUND
from autobatch.probing import Answer, Attempts, Question, probe
from autobatch.progress import OnProgress
from autobatch.session import Session, opened
from autobatch.units import format_bytes
from autobatch.workload import Workload, as_workload
from autobatch.workload.step import TrainingStep, require_trainable

WORTH_SAYING = 0.005
"""The share of the budget from which on bytes that no trial saw are worth a warning."""
LITTLE_HEADROOM = 0.02
"""Below this share of head-room the plan warns: allocators drift by a per cent or two over a run."""


def fit(
    model: nn.Module | Workload,
    target: int,
    *,
    data: Any = None,
    loss: Callable[..., Any] | None = None,
    training_step: Callable[..., Any] | None = None,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    precision: Precision = "fp32",
    device: object = None,
    memory_limit: int | str | None = None,
    headroom: float = 0.05,
    world_size: int | None = None,
    max_micro_batch: int | None = None,
    exact: bool = False,
    per_rank: bool = False,
    progress: OnProgress | None = None,
) -> TrainingPlan:
    """Find the largest micro-batch that fits by running real training steps, and plan how to reach the target with it.

    Nothing of the caller's changes: parameters, gradients, buffers, optimizer state, flags and random generators are
    afterwards what they were, bit for bit.

    Args:
        model: the model, or a `Workload` that says all of `data`, `loss`, `training_step` and `optimizer` itself.
        target: samples behind one optimizer step, over all ranks.
        data: one collated batch, a Dataset, a DataLoader, or a callable that makes a batch of n samples. None: inferred
            from the model, and written down in the plan's assumptions.
        loss: `loss(output, target)`, giving a scalar that is a mean over samples.
        training_step: `training_step(model, batch)`, giving that scalar; instead of `loss`.
        optimizer: an instance, or a callable that makes one from parameters. None: AdamW.
        precision: "fp32", or autocast to "bf16" or "fp16" (with a GradScaler).
        device: "cpu", "cuda", "cuda:1"; None for the first CUDA device, else the CPU. A GPU that isn't here
            ("rtx-3090", "24GiB", or the path of a profile saved on it) is simulated, and the plan labelled `predicted`.
        memory_limit: bytes, or a string such as "8GiB", that the training process may take on the device in all.
        headroom: the share of that limit to leave free, from 0 to below 1.
        world_size: ranks that share the target. None: those of torch.distributed where it is initialised, else 1.
        max_micro_batch: never try more samples than this.
        exact: also prove that one more sample does not fit; otherwise the maximum is found to within 2 % (on the
            CPU, where the peaks of neighbouring sizes jump, within 256 MiB, or an eighth if that is less).
        per_rank: give each rank of an initialised torch.distributed group a part of the target by its speed, with its
            own largest micro-batch, instead of equal parts with the smallest rank's.
        progress: called with each event of `autobatch.progress`.

    Returns:
        The plan. Every size in its `micro_batch_sizes` ran whole training steps within the budget (on a simulated GPU:
        was traced and replayed).

    Raises:
        InvalidInput: an argument cannot be used, or the inputs of a bare model cannot be inferred.
        NothingFits: not even the smallest micro-batch fits.
        DeviceUnavailable, DevicePoisoned, TrialCrashed, WorkloadNotPortable, NotTraceable: see `autobatch.errors`.
        Exception: whatever the model's own code raises, as it is, with the micro-batch size in a note.
    """
    workload = as_workload(model, data, loss, training_step, optimizer, precision)
    question = Question.checked(target, headroom, world_size, max_micro_batch, exact, per_rank)
    with opened(workload, question, device, memory_limit, progress) as session:
        with session.trials() as attempt:
            answer = probe(attempt, session.step, question)
        if answer is None:
            raise nothing_fits(session, attempt)
        return plan_of(answer, session, session.step, attempt)


def _needed(attempt: Attempts, step: TrainingStep, unlimited: Callable[[], Device] | None) -> int | None:
    """Bytes that the smallest micro-batch takes. Where it ran out under the caller's limit, it is run once more
    without."""
    peak = attempt.smallest.peak_bytes
    if peak is None and unlimited is not None:
        # That it does not run there either leaves the need unknown.
        with suppress(AutobatchError), closing(unlimited()) as device, device.trials(step, device.limit_bytes) as run:
            peak = run(attempt.smallest.micro_batch_sizes).peak_bytes
    # What failed needs more than the budget, also where another run of it happened to peak a little lower.
    return None if peak is None else max(peak, attempt.budget_bytes + 1) + step.reserve_bytes


def nothing_fits(session: Session, attempt: Attempts) -> NothingFits:
    """What all ranks raise: the numbers are those of the first on which nothing fits."""
    spot, step, question = session.spot, session.step, session.question
    own = None
    if not attempt.smallest.fits:
        needed = _needed(attempt, step, session.unlimited)
        own = _in_words(spot, step, question, attempt, needed), needed, attempt.budget_bytes
    rank, (words, needed, budget) = next((rank, said) for rank, said in enumerate(question.gather(own)) if said)
    where = f" on rank {rank}" if question.together and question.world_size > 1 else ""
    return NothingFits(f"nothing fits{where}: {words}", needed_bytes=needed, budget_bytes=budget)


def _in_words(spot: Device, step: TrainingStep, question: Question, attempt: Attempts, needed: int | None) -> str:
    lower = 'precision="bf16", ' if step.precision == "fp32" else ""
    advice = [f"{lower}activation checkpointing, smaller inputs, an optimizer with less state, or a smaller model"]
    if needed is not None:
        headroom = max(question.headroom, spot.least_headroom)
        # As much more as the same step may take in another process.
        limit = math.ceil(needed * (1 + spot.least_headroom) / (1 - headroom))
        advice.insert(0, f"a limit of at least {format_bytes(limit)}")
        if needed <= spot.limit_bytes * (1 - spot.least_headroom):
            advice.insert(0, f"less head-room (it fits in the limit, but does not leave {headroom:.0%} of it free)")
    smallest = attempt.smallest
    size = smallest.micro_batch_size
    takes = f"more than there is: {smallest.detail}" if needed is None else format_bytes(needed)
    return (
        f"a training step with micro-batches of {size} sample{'s' if size > 1 else ''} takes {takes}, and the budget "
        f"is {format_bytes(attempt.budget_bytes)} ({format_bytes(spot.limit_bytes)} less head-room) on "
        f"{spot.info.name}. Try {', or '.join(advice)}."
    )


def plan_of(answer: Answer, session: Session, step: TrainingStep, attempt: Attempts) -> TrainingPlan:
    """The plan that trials have shown.

    Args:
        step: what ran in them: the session's, or another configuration of it.
    """
    spot, question = session.spot, session.question
    headroom = max(question.headroom, spot.least_headroom)
    simulated = spot.info.type == "simulated"
    peak = max(t.peak_bytes or 0 for t in attempt.trials if t.fits and set(t.micro_batch_sizes) & set(answer.sizes))
    plan = TrainingPlan(
        target_batch_size=question.target,
        world_size=question.world_size,
        rank=ranks.rank() if answer.rank_shares else 0,
        rank_shares=answer.rank_shares,
        micro_batch_sizes=answer.sizes,
        max_micro_batch_size=answer.largest,
        min_micro_batch_size=step.min_micro_batch,
        max_is_exact=answer.exact,
        peak_bytes=peak,
        limit_bytes=spot.limit_bytes,
        budget_bytes=attempt.budget_bytes,
        headroom=headroom,
        evidence="predicted" if simulated else "measured",
        error_bound=ERROR_BOUND if simulated else None,
        verified=not simulated and set(answer.sizes) <= attempt.sizes_confirmed,
        precision=step.precision,
        batch_dims=dict(step.batch_dims),
        trials=tuple(attempt.trials),
        device=spot.info,
        versions=_versions(),
        assumptions=(*step.assumptions, *spot.assumptions),
        warnings=tuple(
            dict.fromkeys((*step.warnings, *spot.warnings, *_warnings(answer, step, question, attempt, headroom)))
        ),
    )
    if answer.rank_shares or not question.world_size == ranks.world_size() > 1:
        return plan
    return plan.for_rank(ranks.rank())


def _versions() -> dict[str, str]:
    versions = {"autobatch": autobatch.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return versions | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _warnings(
    answer: Answer, step: TrainingStep, question: Question, attempt: Attempts, headroom: float
) -> Iterator[str]:
    as_set = step.model.training  # then a layer in eval mode was put there on purpose, and stays
    norms = [n for n, m in step.model.named_modules() if isinstance(m, _BatchNorm) and (m.training or not as_set)]
    if norms and len(answer.sizes) > 1:
        named = ", ".join(norms[:3]) + (f" and {len(norms) - 3} more" if len(norms) > 3 else "")
        yield (
            f"BatchNorm ({named}) normalises by each micro-batch of {answer.sizes[0]} samples, not the whole batch: "
            "the gradient differs from the full batch's there. GroupNorm or LayerNorm do not have this effect."
        )
    if step.max_samples is not None and step.max_samples < question.target:
        yield (
            f"the data has {step.max_samples} samples, fewer than the target of {question.target}: no optimizer step "
            "can be filled from it."
        )
    if headroom > question.headroom:
        yield (
            f"head-room is {headroom:.0%}, not the {question.headroom:.0%} asked for: on this device the same steps "
            "take up to that much more or less from one process to the next."
        )
    if headroom < LITTLE_HEADROOM:
        yield (
            f"only {headroom:.0%} of the memory is left free: fragmentation, a larger sample or an evaluation pass may "
            "run out. The default head-room is 5 %."
        )
    if answer.cut_short:
        yield f"the search stopped after {len(attempt.trials)} trials, as peaks follow no line here: more may fit."
    buckets = sum(p.numel() * p.element_size() for p in require_trainable(step.model))
    if question.world_size > 1 and not step.reserve_bytes and buckets > attempt.budget_bytes * WORTH_SAYING:
        yield (
            f"DistributedDataParallel would hold gradient buckets of {format_bytes(buckets)} more on each rank than "
            "the trials did. Pass the wrapped model to have them counted, or leave that much head-room."
        )
    if any("not a number" in trial.detail for trial in attempt.trials):
        yield "the loss was not a number (NaN) in a trial. Memory is not affected, but training would be."
