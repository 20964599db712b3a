"""The trials of one `fit`: what was asked, which sizes are tried, and what came out. Works on any device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from operator import index
from typing import Any, SupportsIndex

from autobatch import ranks
from autobatch.devices.base import RunTrial
from autobatch.devices.timing import Timing
from autobatch.errors import InvalidInput
from autobatch.plan import RankShare
from autobatch.progress import OnProgress, TrialEnded, TrialStarted
from autobatch.search import MicroBatchSearch
from autobatch.sizes import micro_batches, micro_batches_of_ranks, share_out, split_evenly
from autobatch.trial import Trial, Verdict
from autobatch.workload.step import TrainingStep


@dataclass(frozen=True)
class Question:
    """What was asked for, checked."""

    target: int
    world_size: int
    max_micro_batch: int | None
    headroom: float
    exact: bool
    together: bool
    """Whether the ranks of an initialised group answer this together."""
    per_rank: bool = False
    """Whether each of them has a part of the target by its speed, and its own largest micro-batch."""

    @classmethod
    def checked(
        cls, target: Any, headroom: Any, world_size: Any, max_micro_batch: Any, exact: bool, per_rank: bool
    ) -> Question:
        """The question, if every part of it can be answered.

        Raises:
            InvalidInput: a number is out of its range.
        """
        whole_numbers = {"target": target, "world_size": world_size, "max_micro_batch": max_micro_batch}
        for name, value in whole_numbers.items():
            if value is None and name != "target":
                continue
            if isinstance(value, bool) or not isinstance(value, SupportsIndex) or index(value) < 1:
                raise InvalidInput(f"{name} must be a whole number of at least 1, but is {value!r}.")
        if not isinstance(headroom, (int, float)) or not 0 <= headroom < 1:
            raise InvalidInput(
                f"headroom is the share of memory to leave free, from 0 to below 1, but is {headroom!r}."
            )
        world = ranks.world_size() if world_size is None else world_size
        if target < world:
            raise InvalidInput(
                f"a target of {target} samples is smaller than the {world} ranks that share it: every rank needs at "
                f"least one. Choose a target of at least {world}."
            )
        if per_rank and (world_size is not None or world == 1):
            raise InvalidInput(
                "per_rank=True gives each rank of torch.distributed a part by its own speed, so all of them have to "
                "ask together: start them with torchrun, initialise the group, and leave world_size out."
            )
        most = None if max_micro_batch is None else index(max_micro_batch)
        return cls(index(target), index(world), most, float(headroom), exact, world_size is None, per_rank)

    @property
    def share(self) -> int:
        """Samples of one optimizer step on the rank that has most; where speed decides, as many as it may get."""
        if self.per_rank:
            return self.target - self.world_size + 1
        return split_evenly(self.target, self.world_size)[0]

    @property
    def cap(self) -> int:
        """The largest micro-batch worth trying."""
        return min(self.share, self.max_micro_batch or self.share)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, where they answer together."""
        return ranks.gather(value) if self.together else [value]


@dataclass
class Attempts:
    """Runs trials one by one, tells of each, and remembers them all."""

    run: RunTrial
    budget_bytes: int
    progress: OnProgress
    settled_bytes: int
    """The peak above which only a thorough trial confirms a size."""
    jump_bytes: float
    """How far the peaks of neighbouring sizes may jump."""
    exact: bool = False
    """Whether to go on until one more sample is seen not to fit."""
    prior: Callable[[int], float] | None = None
    """Predicted bytes of micro-batches of n samples."""
    trials: list[Trial] = field(default_factory=list)
    sizes_confirmed: set[int] = field(default_factory=set)
    """Every size that ran within the budget, as thoroughly as the device asks for."""

    def __call__(self, sizes: tuple[int, ...], thorough: bool = False, timing: Timing | None = None) -> Trial:
        self.progress(TrialStarted(max(sizes)))
        try:
            trial = self.run(sizes, thorough, timing)
        except Exception as error:
            self._note(
                Trial(micro_batch_sizes=sizes, verdict=Verdict.FAILED, detail=f"{type(error).__name__}: {error}")
            )
            raise
        settled = (trial.peak_bytes or 0) <= self.settled_bytes
        if trial.fits and (thorough or settled or timing):
            self.sizes_confirmed.update(sizes)
        self._note(trial)
        return trial

    @property
    def smallest(self) -> Trial:
        """The trial of the smallest size; of several, one that failed."""
        return min(self.trials, key=lambda trial: (trial.micro_batch_size, trial.fits))

    def speed_of(self, size: int) -> float:
        """Samples per second in the latest trial of that size that fitted; 0 where none was timed."""
        timed = (trial for trial in reversed(self.trials) if trial.fits and trial.micro_batch_size == size)
        return next((trial.samples_per_second for trial in timed if trial.step_seconds), 0.0)

    def _note(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.progress(TrialEnded(trial, self.budget_bytes))


@dataclass(frozen=True)
class Answer:
    """What the trials showed."""

    largest: int
    """The largest micro-batch that ran within the budget, on every rank."""
    exact: bool
    """Whether one sample more did not fit, or is not needed."""
    sizes: tuple[int, ...]
    """The micro-batches of one optimizer step on the rank with the largest share."""
    cut_short: bool
    """Whether the search ran out of trials before it had closed in on the answer."""
    rank_shares: tuple[RankShare, ...] = ()
    """Every rank's part, where they are unequal."""


def probe(attempt: Attempts, step: TrainingStep, question: Question) -> Answer | None:
    """Find the largest micro-batch, and run the very sizes that the plan will name. None: nothing fits.

    Raises:
        InvalidInput: the share of a rank is smaller than what the model runs on.
    """
    if question.cap < step.min_micro_batch:
        raise InvalidInput(
            f"a rank has {question.cap} sample(s) at most in a micro-batch, but the model needs {step.min_micro_batch} "
            "(BatchNorm cannot normalise a single one). Choose a larger target or max_micro_batch."
        )
    search = _search(attempt, step, question)
    if question.per_rank:
        return _probe_unequal(attempt, step, question, search)
    found = size = min(question.gather(search.best or 0))
    while size >= step.min_micro_batch:
        lists = micro_batches_of_ranks(question.target, question.world_size, size, step.min_micro_batch)
        trials = (_confirm(attempt, sizes) for sizes in dict.fromkeys(lists))
        failed = next((trial for trial in trials if trial and not trial.fits), None)
        agreed = min(question.gather(size if failed is None else _smaller(attempt, failed)))
        if agreed == size:
            largest = found if size == found else max(lists[0])  # what failed at a second look is no answer
            return Answer(largest, search.proved and search.best == largest, lists[0], search.cut_short)
        size = agreed
    return None


def _probe_unequal(
    attempt: Attempts, step: TrainingStep, question: Question, search: MicroBatchSearch
) -> Answer | None:
    """The same where every rank has its own largest micro-batch, and a part of the target by its speed with that."""
    size = search.best or 0
    found = question.gather((size, attempt.speed_of(size)))
    if not all(best for best, _ in found):
        return None
    speeds = [speed for _, speed in found]
    shares = share_out(question.target, speeds if all(speeds) else [1.0] * len(speeds), step.min_micro_batch)
    share = shares[ranks.rank()]
    while size >= step.min_micro_batch:
        sizes = micro_batches(share, size, step.min_micro_batch)
        trial = _confirm(attempt, sizes)
        if trial is None or trial.fits:
            break
        size = _smaller(attempt, trial)
    largest = question.gather(size)
    if min(largest) < step.min_micro_batch:
        return None
    parts = tuple(
        RankShare(samples=part, max_micro_batch_size=most, samples_per_second=speed)
        for part, most, (_, speed) in zip(shares, largest, found, strict=True)
    )
    return Answer(size, search.proved and search.best == size, sizes, search.cut_short, parts)


def _confirm(attempt: Attempts, sizes: tuple[int, ...]) -> Trial | None:
    """Run sizes that the plan will name, unless that has been done as thoroughly as the device asks for."""
    if set(sizes) <= attempt.sizes_confirmed:
        return None
    return attempt(_two_of(sizes), thorough=True)


def _two_of(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """What stands for all of a step's micro-batches: the first and the last are all sizes there are. The larger comes
    second, as the earlier one's gradients are held then."""
    return sizes if len(sizes) == 1 else (sizes[-1], sizes[0])


def _smaller(attempt: Attempts, failed: Trial) -> int:
    """A clearly smaller size than one that failed although as much had fitted: memory need not be monotone, or settle
    at once. By the line through the smallest trial where the peak is known, else by a tenth."""
    size = failed.micro_batch_size
    smallest = attempt.smallest
    guess = size - max(1, size // 10)
    if failed.peak_bytes and smallest.peak_bytes and failed.peak_bytes > smallest.peak_bytes:
        room = (attempt.budget_bytes - smallest.peak_bytes) / (failed.peak_bytes - smallest.peak_bytes)
        line = smallest.micro_batch_size + int((size - smallest.micro_batch_size) * room)
        guess = min(size - max(1, size // 50), max(guess, line))
    return guess


def _named(question: Question, step: TrainingStep, largest: int) -> tuple[int, ...]:
    """The micro-batches that a plan would name if this size is the largest that fits; () where there is none yet."""
    if question.per_rank:  # the parts are not known before the speeds
        return (largest,) if largest == question.share else ()
    with suppress(InvalidInput):
        return micro_batches_of_ranks(question.target, question.world_size, largest, step.min_micro_batch)[0]
    return ()


def _search(attempt: Attempts, step: TrainingStep, question: Question) -> MicroBatchSearch:
    whole = question.cap == question.share
    gradients = sum(p.numel() * p.element_size() for p in step.model.parameters() if p.requires_grad)
    search = MicroBatchSearch(
        attempt.budget_bytes,
        question.cap,
        minimum=step.min_micro_batch,
        prior=attempt.prior,
        exact=attempt.exact,
        jump_bytes=attempt.jump_bytes,
        # The whole target in one pass holds no gradients of an earlier micro-batch.
        whole_saving_bytes=gradients if whole else 0,
        rounded=lambda largest: max(_named(question, step, largest), default=largest),
    )
    while (size := search.propose()) is not None:
        sizes = _named(question, step, size)
        if size in sizes:  # the plan's own, so that they need not be run again
            trial = attempt(_two_of(sizes), thorough=True)
        else:
            trial = attempt((size, size), thorough=question.exact)
        search.observe(
            size, fits=trial.fits, peak_bytes=trial.peak_bytes, turn_bytes=trial.turn_bytes, rest_bytes=trial.rest_bytes
        )
    return search
