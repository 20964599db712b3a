"""How fast one configuration reaches the target within the budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from autobatch.devices.timing import Timing
from autobatch.errors import DevicePoisoned, NothingFits, NotTraceable, in_one_line
from autobatch.fitting import nothing_fits, plan_of
from autobatch.plan import TrainingPlan
from autobatch.prediction.accuracy import ERROR_BOUND
from autobatch.probing import Answer, Attempts, probe
from autobatch.session import Session
from autobatch.sizes import in_steps
from autobatch.trial import Trial
from autobatch.tuned import Tried
from autobatch.tuning.configuration import Configuration
from autobatch.units import format_bytes
from autobatch.workload.step import TrainingStep

TIMING = Timing()
FASTER = 1.01
"""A speed is better only by more than what a measurement wavers by."""
HOPELESS = 0.6
"""Of the best speed so far: at its largest micro-batch, a configuration below this share is not looked into further."""


@dataclass(frozen=True)
class Result:
    """What came of a configuration."""

    tried: Tried
    plan: TrainingPlan | None = None
    """The plan with its fastest micro-batches, where it fits."""
    error: Exception | None = None
    """What the model's own code raised, or that nothing fits."""


def measure(session: Session, configuration: Configuration, best: float) -> Result:
    """Find the configuration's largest micro-batch, and its fastest.

    Args:
        best: the speed of the best configuration so far, in samples per second.

    Raises:
        DevicePoisoned: nothing can run any more.
    """
    knobs = dict(configuration)
    try:
        with configuration.applied(session.step) as step:
            with session.trials(step) as attempt:
                excess = _predicted_excess(session, step)
                if excess > ERROR_BOUND:
                    detail = f"predicted to go {excess:.0%} beyond the budget with {step.min_micro_batch} samples"
                    return Result(Tried(knobs=knobs, result="infeasible", detail=detail, excess=excess))
                answer = probe(attempt, step, session.question)
                fastest = _fastest(attempt, session, step, answer, best) if answer else None
            if answer is None or fastest is None:
                told = nothing_fits(session, attempt) if answer is None and not knobs else None
                return _infeasible(knobs, attempt, told)
            plan = plan_of(replace(answer, sizes=fastest.micro_batch_sizes), session, step, attempt)
    except DevicePoisoned:
        raise
    except NothingFits as error:  # not even the model
        excess = error.needed_bytes / error.budget_bytes - 1 if error.needed_bytes and error.budget_bytes else 1.0
        return Result(Tried(knobs=knobs, result="infeasible", detail=str(error), excess=max(excess, 0.0)), error=error)
    except Exception as error:  # noqa: BLE001  # a knob may break a model in any way; who asked decides what it means
        return Result(Tried(knobs=knobs, result="failed", detail=in_one_line(error)), error=error)
    seconds = fastest.repeated_seconds
    tried = Tried(
        knobs=knobs,
        result="fits",
        samples_per_second=fastest.samples_per_second,
        spread=(max(seconds) - min(seconds)) / median(seconds),
        micro_batch_sizes=fastest.micro_batch_sizes,
        peak_bytes=fastest.peak_bytes,
    )
    return Result(tried, plan.model_copy(update={"knobs": {k: v for k, v in knobs.items() if k != "precision"}}))


def time_again(session: Session, result: Tried, timing: Timing = TIMING) -> Trial:
    """Time a configuration's fastest step once more."""
    with Configuration(result.knobs).applied(session.step) as step, session.trials(step) as attempt:
        return attempt(result.micro_batch_sizes, timing=timing)


def _fastest(attempt: Attempts, session: Session, step: TrainingStep, answer: Answer, best: float) -> Trial | None:
    """The fastest step. Speed over micro-batch size mostly rises, then bends: so the largest is timed, then a little
    smaller ones, then half of it and on, for as long as that is faster."""
    fastest: Trial | None = None
    for sizes in _downwards(sum(answer.sizes), len(answer.sizes), answer.largest, step.min_micro_batch):
        trial = attempt(sizes, timing=TIMING)
        if trial.fits and trial.samples_per_second > FASTER * (fastest.samples_per_second if fastest else 0.0):
            fastest = trial
        elif fastest is not None and len(sizes) >= 2 * len(answer.sizes):
            break
        if fastest is not None and fastest.samples_per_second < HOPELESS * best:
            break
    return fastest


def _downwards(share: int, steps: int, largest: int, smallest: int) -> Iterator[tuple[int, ...]]:
    """The micro-batches of one rank's share in k, k + 1, 2k, 4k, ... steps, for as long as there are such."""
    counts = dict.fromkeys([steps, steps + 1, *(steps << doubling for doubling in range(1, share.bit_length()))])
    for count in counts:
        if count * smallest > share:
            return
        yield in_steps(share, count, largest, smallest)


def _predicted_excess(session: Session, step: TrainingStep) -> float:
    """By which share of the budget the smallest micro-batch is predicted to go beyond it; 0 without a prediction."""
    predicted, smallest = session.spot.predicted, step.min_micro_batch
    if predicted is None:
        return 0.0
    sizes = (smallest,) if smallest == session.question.share else (smallest, smallest)
    try:
        return predicted(sizes) / session.budget_bytes - 1
    except NotTraceable:
        return 0.0


def _infeasible(knobs: dict[str, str], attempt: Attempts, error: NothingFits | None) -> Result:
    peak = attempt.smallest.peak_bytes
    excess = 1.0 if peak is None else max(peak / attempt.budget_bytes - 1, 0.001)
    takes = attempt.smallest.detail if peak is None else format_bytes(peak)
    detail = f"micro-batches of {attempt.smallest.micro_batch_size}: {takes}"
    if attempt.smallest.fits:
        detail = "its sizes fitted in single steps, but not in repeated ones"
    elif error is not None:
        detail = str(error)
    return Result(Tried(knobs=knobs, result="infeasible", detail=detail, excess=excess), error=error)


def paired_ratio(ours: Sequence[Trial], theirs: Sequence[Trial]) -> float:
    """How many times as fast, by pairs of runs that were timed one after the other; 0 where one of ours did not fit."""
    if not all(trial.fits for trial in ours):
        return 0.0
    ratios = [a.samples_per_second / b.samples_per_second for a, b in zip(ours, theirs, strict=True) if b.fits]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.inf
