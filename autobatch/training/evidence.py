"""What a loss is, found out by running it: on a sample, on one or two others, and on all of these together.

For losses that nothing is known of, such as a model's own. Everything in the batch that could be counted is a
candidate; the right one foretells the loss of all together from those of the parts.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from autobatch import batches
from autobatch.devices import oom
from autobatch.errors import InvalidInput
from autobatch.training.candidates import (
    SAMPLES,
    Candidate,
    candidates_in,
    counts_by_sample,
    marked_in,
    telling_parts,
    unknown,
)
from autobatch.training.sync import Stranded, Sync
from autobatch.training.undo import StepStart

TOLERANCE, COARSE = 1e-5, 1e-3
"""How far, as a share, a foretold loss may be off: float32 sums of other shapes differ by about 1e-6. The second is for
models in half precision."""
SLACK, SMALL = 10, 0.1
"""How many times further it may be off before what was found out is doubted; and the loss below which only the rounding
of the scores that it was made from is left of it."""
SAME, LITTLE = 1e-9, 0.02
"""Weights that differ by no more than this share of them are the same; are not worth a warning."""
LOOKS = 12
"""How often it is run at most in a step before the likeliest of the candidates that are left is taken."""
RECHECKED = 10
"""The step in which what was found out is run again; then at ten times that, and so on."""
SAY = 'plan.stepper(..., reduction=lambda batch: (batch["labels"] != -100).sum())'


@dataclass(frozen=True)
class Look:
    """What one look at the loss showed on this rank."""

    parts: list[tuple[Any, int]]
    """Two batches and both together, with their sizes in samples."""
    losses: list[float]
    """Of each; not a number where the loss could not be run."""
    tolerance: float
    """As a share of the losses."""
    problem: str = ""
    """Why it could not be run."""

    @property
    def tells(self) -> bool:
        """Whether anything can be told from it: a part in which nothing counts may have no loss, but then both together
        have that of the other."""
        *apart, together = map(math.isfinite, self.losses)
        return together and any(apart)

    @property
    def silence(self) -> str:
        """Why nothing can be told from it."""
        return f"the loss of {self.parts[-1][1]} samples is {self.losses[-1]}, and so tells nothing"

    def fits(self, one: Candidate, slack: bool = False) -> bool:
        """Whether a candidate foretells the loss of both parts together."""
        *apart, _ = self.parts
        *losses, together = self.losses
        counts = [sum(counts_by_sample([one], [part], size)[0]) for part, size in apart]
        weights, total = ([1.0, 1.0], 1.0) if one.is_sum else (counts, sum(counts))
        if not total:
            return False
        foretold = sum(weight * loss for weight, loss in zip(weights, losses, strict=True) if weight) / total
        largest = max(abs(loss) for loss in self.losses if math.isfinite(loss))
        tolerance = self.tolerance * (SLACK * max(largest, SMALL) if slack else largest)
        return abs(foretold - together) <= tolerance

    def __str__(self) -> str:
        first, second, together = self.losses
        return (
            f"the loss of {self.parts[-1][1]} samples together ({together:.6g}) is no such mean of the losses of its "
            f"parts ({first:.6g} and {second:.6g})"
        )


@dataclass
class Evidence:
    """Narrows down what a loss is, batch by batch: it is run only where the candidates disagree about a batch, and
    once in a while again.

    The runs are without gradients, in evaluation mode, and leave model and random numbers as they were.
    """

    compute_loss: Callable[[nn.Module, Any], Tensor]
    sync: Sync
    """The ranks, who look together, and see the same."""
    contexts: Sequence[Callable[[], AbstractContextManager[object]]]
    """Where the loss is run, in the first of these in which that works: without autocast it is more exact."""
    start: StepStart
    """Puts back what a forward pass changes."""
    candidates: list[Candidate] = field(default_factory=list)
    """Everything that it might be, likeliest first; nothing before the first batch."""
    left: list[Candidate] = field(default_factory=list)
    """What it may be by what was seen so far."""
    _steps: int = 0
    _recheck: int = RECHECKED
    _undecided: float = SAME
    """Up to which difference looks did not tell those that are left apart."""

    def settle(
        self, batch: Any, layout: batches.Layout, micros: Sequence[Any], samples: Sequence[int]
    ) -> tuple[Candidate, list[float]]:
        """What the loss is, as far as it matters for this optimizer step, and what it counts in each of this rank's
        micro-batches. A collective.

        Args:
            batch: some of its samples, with their `layout`, to run the loss on.
            micros: the micro-batches, of so many `samples`.

        Raises:
            InvalidInput: it cannot be found out: memory ran out with two samples together, or ranks wait for one
                another in the model's passes, and could not be caught up with.
            Stranded: it cannot, and other ranks are left waiting.
        """
        self._steps += 1
        again = self._steps == self._recheck
        if again:
            self._recheck *= 10
        whole = [batch] if layout.size == sum(samples) else micros
        most = 3 if max(samples) > 2 else 2
        new = False
        if not self.candidates:
            new = self._add(candidates_in(batch, layout))
        # Where means over samples are ruled out, what does not count has shown, and further values are not it.
        if len(self.left) > 1 and SAMPLES in self.left and (self._steps < RECHECKED or self._steps % RECHECKED == 0):
            new |= self._add(marked_in(batch, layout))
        if len(self.left) > 1:
            self._narrow(batch, layout, whole, samples, most, SAME if again or new else self._undecided)
        elif again and self._difference(self.candidates, whole, samples)[0] > SAME:
            self._doubt(batch, layout, most)
        taken = self.left[0]
        return taken, _counts_of([taken], whole, samples)[0]

    def _add(self, found: Iterable[Candidate]) -> bool:
        """Take these for what the loss may be, too; whether any of them is new. A collective."""
        of_ranks = self.sync.gather(unknown(found, self.candidates))
        new = unknown(chain.from_iterable(of_ranks), self.candidates)
        self.candidates = [*self.candidates, *new]
        self.left = [*self.left, *new]
        return bool(new)

    def _narrow(
        self,
        batch: Any,
        layout: batches.Layout,
        whole: Sequence[Any],
        samples: Sequence[int],
        most: int,
        enough: float,
    ) -> None:
        """Look until those that are left differ by no more than that. A collective."""
        silence = ""
        for _ in range(LOOKS):
            if self._difference(self.left, whole, samples)[0] <= enough:
                return
            enough = SAME
            look = self._look(batch, layout, self.left, most)
            fitting = self._fitting(look, self.left)
            mismatch = f"{look}, as where samples are compared with one another"
            own = look.problem or ("" if not look.tells or any(map(look.fits, self.left)) else mismatch)
            problem = next(filter(None, self.sync.gather(own)), "")
            if problem or not fitting:
                _warn(f"{SAMPLES.words}, but {problem or 'ranks found it to be different things'}")
                self.left, self._recheck = [SAMPLES], 0
                return
            if len(fitting) == len(self.left):  # as would be by another look at the same samples
                silence = next(filter(None, self.sync.gather("" if look.tells else look.silence)), "")
                break
            self.left = fitting
        difference, other = self._difference(self.left, whole, samples)
        if difference > SAME:
            self._undecided = 2 * difference  # more of one may tell
        if difference > LITTLE:
            _warn(
                f"{self.left[0].words}, but may also be {other.words}: {silence or 'the samples at hand do not tell'}"
            )

    def _doubt(self, batch: Any, layout: batches.Layout, most: int) -> None:
        """See whether the one that is left still foretells the loss. A collective."""
        taken = self.left[0]
        look = self._look(batch, layout, self.candidates, most)
        own = "" if not look.tells or look.fits(taken, slack=True) else str(look)
        differs = next(filter(None, self.sync.gather(own)), "")
        if not differs:
            return
        fitting = self._fitting(look, self.candidates)
        if fitting:
            self.left = fitting
            _warn(f"{fitting[0].words} from the {self._steps}th step on; up to there for {taken.words}, but {differs}")
        else:
            _warn(f"{taken.words}, but in the {self._steps}th step {differs}")

    def _difference(
        self, candidates: Sequence[Candidate], whole: Sequence[Any], samples: Sequence[int]
    ) -> tuple[float, Candidate]:
        """By which share at most a candidate gives a micro-batch of any rank another weight than the likeliest one
        does, and which candidate that is. A collective."""
        of_ranks = self.sync.gather(_counts_of(candidates, whole, samples))
        likeliest: list[float] = []
        worst = (0.0, candidates[0])
        for i, one in enumerate(candidates):
            counts = [count for of_rank in of_ranks for count in of_rank[i]]
            total = 1.0 if one.is_sum else sum(counts)
            weights = [count / total if total else 0.0 for count in counts]
            likeliest = likeliest or weights
            apart = max(abs(a - b) / (max(a, b) or 1.0) for a, b in zip(weights, likeliest, strict=True))
            worst = max(worst, (apart, one), key=itemgetter(0))
        return worst

    def _fitting(self, look: Look, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that foretell the loss on every rank that can tell. A collective."""
        words = {one.words for one in candidates if not look.tells or look.fits(one)}
        common = set.intersection(*self.sync.gather(words))
        return [one for one in candidates if one.words in common]

    def _look(self, batch: Any, layout: batches.Layout, candidates: Sequence[Candidate], most: int) -> Look:
        """Run the loss on samples about which the candidates disagree; on two, where memory runs out with three. A
        collective.

        Raises:
            InvalidInput, Stranded: as `settle`.
        """
        if not (self.sync.alone or self.sync.recovers):
            raise InvalidInput(
                "what the loss is a mean over is not looked for in this model: its ranks meet in its passes, and would "
                f"wait there for one that ran out of memory. Say what it is: {SAY}."
            )
        tolerance = COARSE if _is_half(self.sync.inner) else TOLERANCE
        for together in (most, 2):
            parts = telling_parts(batch, layout, candidates, together)
            found = self._losses([part for part, _ in parts])
            said = self.sync.gather(found.message if isinstance(found, oom.Diagnosis) else "")
            ran_out = next(filter(None, said), None)
            if ran_out is None:
                break
        else:
            raise InvalidInput(
                "what the loss is a mean over could not be found out, as memory ran out with two samples together and "
                f"no gradients ({ran_out}). Say what it is, as a wrong guess would train wrongly: {SAY}, or "
                'reduction="mean" where it is a mean over samples.'
            )
        if isinstance(found, list):
            return Look(parts, found, tolerance)
        return Look(parts, [math.nan] * len(parts), tolerance, str(found))

    def _losses(self, parts: list[Any]) -> list[float] | oom.Diagnosis | str:
        """The losses of these parts of a batch, or why there are none."""
        least = parts[:1] * len(parts)
        found: list[float] | oom.Diagnosis | str = ""
        for context in self.contexts:
            try:
                found = self.sync.attempt(partial(self._run, parts, context), partial(self._run, least, context))
            except Exception as error:  # a training step may raise anything here: it is told
                found = f"it could not be run in evaluation mode to find out ({type(error).__name__}: {error})"
                if not self.sync.alone:
                    raise Stranded(
                        f"what the loss is a mean over is not known: {found}. Say what it is: {SAY}."
                    ) from error
            if isinstance(found, list):
                break
            oom.release()
        return found

    def _run(self, parts: list[Any], context: Callable[[], AbstractContextManager[object]]) -> list[float]:
        model = self.sync.inner
        flags = [(module, module.training) for module in model.modules()]
        self.start.keep()
        try:
            model.eval()
            with torch.no_grad(), context():
                return [float(self.compute_loss(model, part)) for part in parts]
        finally:
            for module, training in flags:
                module.training = training
            self.start.restore()
            self.start.forget()


def _counts_of(candidates: Sequence[Candidate], whole: Sequence[Any], samples: Sequence[int]) -> list[list[float]]:
    """What each candidate counts in each micro-batch of so many `samples`."""
    by_sample = counts_by_sample(candidates, whole, sum(samples))
    spans = [slice(end - n, end) for n, end in zip(samples, accumulate(samples), strict=True)]
    return [
        [1.0] * len(spans) if one.is_sum else [sum(counts[span]) for span in spans]
        for one, counts in zip(candidates, by_sample, strict=True)
    ]


def _is_half(model: nn.Module) -> bool:
    return any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())


def _warn(what: str) -> None:
    """Where the caller's own code stands."""
    frame, depth = sys._getframe(), 1
    while frame.f_back and frame.f_globals["__name__"].startswith("autobatch."):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(
        f"the loss is taken for {what}. If it is a mean over something else, say what: {SAY}.", stacklevel=depth
    )
