"""What a plan says, in words: the one wording that the terminal, plain text and notebooks share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from autobatch.plan import TrainingPlan
from autobatch.trial import DeviceInfo, Trial
from autobatch.tuned import Throughput
from autobatch.units import format_bytes


def sizes_in_words(sizes: Sequence[int]) -> str:
    """Micro-batch sizes, equal neighbours together.

    >>> sizes_in_words((37, 37, 37, 37, 36, 36, 36)), sizes_in_words((37, 36))
    ('4 × 37 + 3 × 36', '37 + 36')
    """
    counted = ((len(list(group)), size) for size, group in groupby(sizes))
    return " + ".join(f"{count} × {size}" if count > 1 else str(size) for count, size in counted)


def samples_in_words(count: int) -> str:
    """A number of samples.

    >>> samples_in_words(1), samples_in_words(37)
    ('1 sample', '37 samples')
    """
    return f"{count} sample" if count == 1 else f"{count} samples"


def headline(plan: TrainingPlan) -> str:
    """The answer in one line: the micro-batches of one optimizer step and what they add up to."""
    samples = samples_in_words(sum(plan.micro_batch_sizes))
    if plan.accumulation_steps == 1:
        share = f"{samples} per optimizer step, in one micro-batch"
    else:
        share = f"{sizes_in_words(plan.micro_batch_sizes)} = {samples} per optimizer step"
    if plan.world_size == 1:
        return share
    return f"{share} on rank {plan.rank}; {plan.target_batch_size} over {plan.world_size} ranks"


def facts(plan: TrainingPlan) -> list[tuple[str, str]]:
    """Labels and texts that tell what stands behind the answer."""
    share = sum(plan.micro_batch_sizes)
    largest = samples_in_words(plan.max_micro_batch_size)
    if plan.max_micro_batch_size >= share:
        largest += ", all that a step needs"
    elif any(trial.micro_batch_size == plan.max_micro_batch_size + 1 and not trial.fits for trial in plan.trials):
        largest += "; one more does not fit"
    elif plan.max_is_exact:
        largest += ", as many as were asked for"
    else:
        largest += "; a little more may fit"
    less = f"{plan.headroom:.0%} head-room"
    reserve = int(plan.limit_bytes * (1 - plan.headroom)) - plan.budget_bytes
    if reserve > 0:
        less += f" and {format_bytes(reserve)} for what trials do not hold"
    knobs = ", ".join(f"{name}={value}" for name, value in plan.knobs.items())
    return [
        ("peak", f"{format_bytes(plan.peak_bytes)}, {plan.peak_bytes / plan.budget_bytes:.0%} of the budget"),
        ("budget", f"{format_bytes(plan.budget_bytes)}: {format_bytes(plan.limit_bytes)} less {less}"),
        ("largest", largest),
        ("evidence", _evidence(plan)),
        ("precision", plan.precision),
        *([("speed", _speed(plan.throughput))] if plan.throughput else []),
        *([("knobs", f"{knobs}; plan.apply(model, optimizer) sets them")] if knobs else []),
        ("device", device_in_words(plan.device)),
        ("versions", ", ".join(f"{name} {version}" for name, version in plan.versions.items()) or "unknown"),
    ]


def _speed(throughput: Throughput) -> str:
    text = f"{throughput.samples_per_second:.4g} samples per second"
    plain = throughput.plain_samples_per_second
    return text if plain is None else f"{text}, {throughput.samples_per_second / plain:.2f} × without knobs"


def _evidence(plan: TrainingPlan) -> str:
    if plan.evidence == "predicted":
        bound = f"; tensors within {plan.error_bound:.0%}, the context as assumed" if plan.error_bound else ""
        return f"predicted from a traced step, not run on such a GPU{bound}"
    return "these very sizes ran whole training steps" if plan.verified else "NOT all of these sizes were tried"


def device_in_words(device: DeviceInfo) -> str:
    """Which device, and how much memory it has."""
    label = device.type if device.index is None else f"{device.type}:{device.index}"
    memory = f"{format_bytes(device.total_bytes)} of memory"
    if device.free_bytes is not None:
        memory += f", {format_bytes(device.free_bytes)} free"
    return f"{label} ({device.name}), {memory}" + (", a MIG slice" if device.mig else "")


def verdict_in_words(trial: Trial) -> str:
    """The verdict as people say it, such as "out of memory"."""
    return trial.verdict.value.replace("_", " ")


def peak_in_words(trial: Trial, budget_bytes: int) -> str:
    """The peak of a trial and its share of the budget, or what is known where it ran out before there was one."""
    if trial.peak_bytes is not None:
        return f"{format_bytes(trial.peak_bytes)} ({trial.peak_bytes / budget_bytes:.0%})"
    if trial.requested_bytes is not None:
        return f"could not get {format_bytes(trial.requested_bytes)} more"
    return "peak unknown"
