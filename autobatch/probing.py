"""The trials of one `fit`: what was asked, which sizes are tried, and what came out. Works on any device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autobatch import ranks
from autobatch.devices.base import RunTrial
from autobatch.errors import InvalidInput
from autobatch.plan import Trial, micro_batches, split_evenly
from autobatch.progress import OnProgress, TrialEnded, TrialStarted
from autobatch.search import MicroBatchSearch
from autobatch.workload.step import TrainingStep


@dataclass(frozen=True)
class Question:
    """What was asked for, checked."""

    target: int
    world_size: int
    max_micro_batch: int | None
    headroom: float
    exact: bool

    @classmethod
    def checked(cls, target: Any, headroom: Any, world_size: Any, max_micro_batch: Any, exact: bool) -> Question:
        """The question, if every part of it can be answered.

        Raises:
            InvalidInput: a number is out of its range.
        """
        whole_numbers = {"target": target, "world_size": world_size, "max_micro_batch": max_micro_batch}
        for name, value in whole_numbers.items():
            if value is None and name != "target":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
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
        return cls(target, world, max_micro_batch, float(headroom), exact)

    @property
    def shares(self) -> set[int]:
        """Samples of one optimizer step that a rank may have: one number, or two that differ by one."""
        return set(split_evenly(self.target, self.world_size))

    @property
    def share(self) -> int:
        """Samples of one optimizer step on the rank that has most."""
        return max(self.shares)

    @property
    def cap(self) -> int:
        """The largest micro-batch worth trying."""
        return min(self.share, self.max_micro_batch or self.share)


@dataclass
class Attempts:
    """Runs trials one by one, tells of each, and remembers them all."""

    run: RunTrial
    budget_bytes: int
    progress: OnProgress
    trials: list[Trial] = field(default_factory=list)

    def __call__(self, sizes: tuple[int, ...]) -> Trial:
        self.progress(TrialStarted(max(sizes)))
        trial = self.run(sizes)
        self.trials.append(trial)
        self.progress(TrialEnded(trial, self.budget_bytes))
        return trial

    @property
    def sizes_that_fit(self) -> set[int]:
        """Every micro-batch size that ran within the budget."""
        return {size for trial in self.trials if trial.fits for size in trial.micro_batch_sizes}


@dataclass(frozen=True)
class Answer:
    """What the trials showed."""

    largest: int
    """The largest micro-batch that ran within the budget, on every rank."""
    exact: bool
    """Whether one sample more did not fit, or is not needed."""
    sizes: tuple[int, ...]
    """The micro-batches of one optimizer step on the rank with the largest share."""


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
    largest = agreed = ranks.smallest(search.best or 0)
    while agreed:
        largest = agreed
        lists = [micro_batches(share, largest, step.min_micro_batch) for share in sorted(question.shares, reverse=True)]
        fitted = all(set(sizes) <= attempt.sizes_that_fit or attempt(_ends(sizes)).fits for sizes in lists)
        # Where less does not fit although more did (memory need not be monotone), the plan takes clearly smaller ones.
        agreed = ranks.smallest(largest if fitted else lists[0][0] - max(1, lists[0][0] // 50))
        if agreed == largest:
            return Answer(largest, search.proved and search.best == largest, lists[0])
    return None


def _search(attempt: Attempts, step: TrainingStep, question: Question) -> MicroBatchSearch:
    whole = question.cap == question.share
    gradients = sum(p.numel() * p.element_size() for p in step.model.parameters() if p.requires_grad)
    search = MicroBatchSearch(
        attempt.budget_bytes,
        question.cap,
        minimum=step.min_micro_batch,
        exact=question.exact,
        # The whole target in one pass holds no gradients of an earlier micro-batch.
        whole_saving_bytes=gradients if whole else 0,
    )
    while (size := search.propose()) is not None:
        trial = attempt((size,) if whole and size == question.cap else (size, size))
        search.observe(size, fits=trial.fits, peak_bytes=trial.peak_bytes, turn_bytes=trial.turn_bytes)
    return search


def _ends(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The first and the last of several micro-batches: between them they are all the sizes there are."""
    return sizes if len(sizes) == 1 else (sizes[0], sizes[-1])
