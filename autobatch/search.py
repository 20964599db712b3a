"""The largest micro-batch that fits, found by asking and telling: no torch, no I/O, no clock.

A training step's memory is nearly affine in its micro-batch. So small trials give a line, the line gives the
candidate, the candidate is run, and every trial corrects the line. Where it does not hold (steps, noise, peaks that go
up and down), the search interpolates, then bisects. Here a sample takes 60 bytes on top of a fixed 340, of 10,000:

>>> search = MicroBatchSearch(budget_bytes=10_000, cap=1024)
>>> while (n := search.propose()) is not None:
...     peak = 340 + 60 * n
...     search.observe(n, fits=peak <= 10_000, peak_bytes=peak)
...     print(n, peak)
1 400
25 1840
160 9940
>>> search.best, search.trials
(160, 3)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from autobatch.errors import InvalidInput

MAX_TRIALS = 12
"""The default search ends here; an exact one only bisects from here on."""
TOLERANCE = 0.02
"""The default search may leave this fraction of the samples that are possible."""
FEW = 32
"""Up to so many smallest sizes, the whole target is tried although the smallest ran out of memory at an unknown
peak."""
NOISE = 0.005
"""How far a measured size may be from the line, as a fraction of it."""
LEEWAY = 0.03
"""How far a guess may turn out over the budget, as a fraction of it: still inside the usual head-room of 5 %."""
JUMP = 32
"""How many times the largest size that fitted a guess may be, however sure the line."""
JUMPY = 8
"""Jumps are at most one part in so many of what the samples take."""
PATIENCE = 4
"""Trials, from the first that failed, after which guessing gives way to bisection."""
LEARN = 4
"""A trial that only makes the line surer is about this many times smaller than the answer, and larger than the last."""
TURN_BELOW_PEAK = 0.1
"""How much steeper than the turn the peak may turn out where the optimizer no longer hides it, as a fraction."""
TURN_ON_A_HEAP = 1.0
"""The same where peaks jump: what fragments a heap makes them up to that much steeper than what is in use."""
SPARE = 2
"""Guesses stay one part in so many of a jump below the budget: a peak that happens to be high is then still below
it."""
JUST_OVER = 1.1
"""What a size that ran out of memory is taken to need, in budgets, until more is known."""


@dataclass(frozen=True)
class Observation:
    """What a trial of n samples showed, in bytes as they would be with an earlier micro-batch's gradients held."""

    n: int
    fits: bool
    peak: float | None
    """The peak of the whole step, or None where it is not known or says nothing."""
    turn: float | None
    """Held at the turn from forward to backward, or None likewise."""
    rest: float | None
    """Held without any samples, or None where it is not known."""


@dataclass(frozen=True)
class Line:
    """bytes(n) = at + slope * (n - start), where the slope may be steeper or flatter by `doubt`."""

    start: int
    at: float
    slope: float
    doubt: float = 0.0

    @classmethod
    def through(cls, points: list[tuple[int, float]], rest: float = 0.0) -> Line:
        """The line at the largest of these (samples, bytes), drawn from a second point at half its samples or less.

        One point leaves the slope open; but it cannot be steeper than from what is held without any samples.
        """
        *others, (n, size) = sorted(points)
        if not others:
            return cls(n, size, slope=0.0, doubt=(max(size - rest, 0.0) + NOISE * rest) / n)
        m, smaller = max((p for p in others if 2 * p[0] <= n), default=others[0])
        rise, noise = size - smaller, NOISE * (size + smaller)
        return cls(n, size, slope=max(rise, 0.0) / (n - m), doubt=(noise + max(-rise, 0.0)) / (n - m))

    def likely(self, room: float) -> float:
        """Samples that need `room` bytes."""
        return self._reach(room, self.slope)

    def surely(self, room: float) -> float:
        """Samples that need `room` bytes if the line is as steep as it may be."""
        return self._reach(room, self.slope + self.doubt)

    def hopefully(self, room: float) -> float:
        """Samples that need `room` bytes if the line is as flat as it may be."""
        return self._reach(room, self.slope - self.doubt)

    def _reach(self, room: float, slope: float) -> float:
        if slope > 0:
            return self.start + (room - self.at) / slope
        return math.inf if room >= self.at else self.start


class MicroBatchSearch:
    """Looks for the largest micro-batch that fits in a budget, in as few and as small trials as it can.

    Args:
        budget_bytes: what the peak of a training step may be.
        cap: samples that one rank needs for its target; nothing above is tried.
        minimum: the fewest samples that the model can run on.
        prior: predicted bytes of a step with n samples, with the gradients of an earlier micro-batch held. Its answer
            is tried first; if it was off it is corrected, and as soon as two sizes are measured they count instead.
        exact: go on until one sample more was seen not to fit. The default stops within 2 % of what the line or a
            failure leaves possible, and after 12 trials at the latest. An exact search usually takes one or two more;
            on a device that follows no line at all it takes 38 at most for a `cap` of up to a million.
        jump_bytes: how far the peaks of neighbouring sizes may jump, 0 where they do not. The default search ends
            within as much of the budget, or an eighth of what its samples take if that is less: closer sizes are a
            matter of luck.
        rounded: the size that a plan would name if the largest were this one, no larger than it. It has to run anyway,
            so it is tried before that, and may turn out to be enough.
        whole_saving_bytes: what a step needs less at n == cap, because the whole target goes in one pass and no
            gradients are held during the forward pass. So `cap` may fit although `cap - 1` does not. It is tried where
            the line says so; where not even `minimum` could be measured, there is no line.

    Raises:
        InvalidInput: `minimum` is below 1, or `cap` below `minimum`.
    """

    def __init__(
        self,
        budget_bytes: int,
        cap: int,
        minimum: int = 1,
        prior: Callable[[int], float] | None = None,
        exact: bool = False,
        jump_bytes: float = 0.0,
        whole_saving_bytes: int = 0,
        rounded: Callable[[int], int] = lambda n: n,
    ) -> None:
        if minimum < 1:
            raise InvalidInput(f"the smallest micro-batch must be at least 1 sample, not {minimum}.")
        if cap < minimum:
            raise InvalidInput(
                f"the target leaves {cap} samples per rank, but the model needs at least {minimum} in a micro-batch. "
                "Use a larger target or fewer ranks."
            )
        self.budget_bytes = budget_bytes
        self.cap = cap
        self.minimum = minimum
        self.exact = exact
        self.jump_bytes = jump_bytes
        self.whole_saving_bytes = whole_saving_bytes
        self.trials = 0
        """Trials observed so far."""
        self._prior = prior
        self._rounded = rounded
        self._seen: dict[int, Observation] = {}
        self._proposed: int | None = None

    @property
    def best(self) -> int | None:
        """The largest micro-batch that ran and fitted, or None."""
        return self._low.n if self._low else None

    @property
    def proved(self) -> bool:
        """Whether `best` is all that is needed, or one sample more was seen not to fit."""
        return self.best is not None and (self.best == self.cap or any(o.n == self.best + 1 for o in self._failures))

    @property
    def cut_short(self) -> bool:
        """Whether the search stopped for having run `MAX_TRIALS`, with `best` short of what a failure leaves
        possible."""
        high = next(iter(self._failures), None)
        open_ended = high is None or high.n - 1 > (self.best or 0) * (1 + TOLERANCE)
        return not self.exact and self.trials >= MAX_TRIALS and self.best != self.cap and open_ended

    def propose(self) -> int | None:
        """The micro-batch size to try next, or None when the search is over. The same until it was observed."""
        if self._proposed is None:
            self._proposed = self._next()
        return self._proposed

    def observe(
        self,
        n: int,
        *,
        fits: bool,
        peak_bytes: int | None = None,
        turn_bytes: int | None = None,
        rest_bytes: int | None = None,
    ) -> None:
        """Tell how a trial of `n` samples went. Of several trials of one size the latest counts.

        Args:
            n: the size proposed, or one tried before (the best size that failed on a second look, say).
            fits: whether the step ran within the budget.
            peak_bytes: the peak of the whole step, None if it is not known (out of memory).
            turn_bytes: bytes held at the turn from forward to backward. Where the optimizer's temporaries hide what a
                sample costs (the peak is flat at small sizes), these show it.
            rest_bytes: bytes held without any samples, gradients included: what no size goes below. Bounds what a
                sample costs already after the first trial.

        Raises:
            InvalidInput: `n` was neither proposed nor tried before.
        """
        if n != self._proposed and n not in self._seen:
            raise InvalidInput(f"a trial of {n} samples was observed, but the size proposed is {self._proposed}.")
        saving = self.whole_saving_bytes if n == self.cap else 0
        peak, turn, rest = (None if b is None else b + saving for b in (peak_bytes, turn_bytes, rest_bytes))
        if not fits and peak_bytes is not None and peak_bytes <= self.budget_bytes:
            peak = turn = rest = None  # it failed of something else than its peak (allocator retries): not on the line
        self._seen[n] = Observation(n, fits, peak, turn, rest)
        self._proposed = None
        self.trials += 1

    # What is known

    @property
    def _low(self) -> Observation | None:
        """The largest size that fitted."""
        return max((o for o in self._seen.values() if o.fits), key=lambda o: o.n, default=None)

    @property
    def _failures(self) -> list[Observation]:
        """The sizes above it that failed, smallest first: the first of them is where the search must stay below."""
        return sorted((o for o in self._seen.values() if not o.fits and o.n > (self.best or 0)), key=lambda o: o.n)

    def _lines(self, low: Observation, high: Observation | None) -> list[Line]:
        """Bytes as functions of n from `low` on, for the peak and the turn; none where its peak is not known."""
        if low.peak is None:
            return []
        peaks = [(o.n, o.peak) for o in self._seen.values() if o.n <= low.n and o.peak is not None]
        turns = [(o.n, o.turn) for o in self._seen.values() if o.n <= low.n and o.turn is not None]
        if self._prior and len(peaks) == 1:
            lines = [self._prior_line(low.n, low.peak)]
        else:
            rest = low.rest or 0.0
            whole = Line.through(peaks, rest)
            lines = [whole]
            if turns:
                turn = Line.through(turns, rest)
                hidden = whole.slope < turn.slope
                steeper = TURN_ON_A_HEAP if hidden and self.jump_bytes else TURN_BELOW_PEAK
                lines.append(replace(turn, doubt=turn.doubt + steeper * turn.slope))
        return self._between(low.n, low.peak, high, lines) if high else lines

    def _between(self, n: int, peak: float, high: Observation, lines: list[Line]) -> list[Line]:
        """The line from the size that fitted to the one that failed, where those found below did not foresee that."""
        foreseen = min(line.likely(self.budget_bytes) for line in lines)
        if not high.peak and foreseen >= high.n and any(line.slope <= line.doubt for line in lines):
            return []
        slope = ((high.peak or JUST_OVER * self.budget_bytes) - peak) / (high.n - n)
        across = Line(n, peak, max(slope, 0.0))
        if foreseen >= high.n or (high.peak and across.likely(self.budget_bytes) > foreseen):
            return [across]
        return lines

    def _prior_line(self, n: int, peak: float) -> Line:
        """The prior through what was measured: steeper where it said too little, doubted by as much as it was off."""
        assert self._prior is not None
        other = max(n // 2, self.minimum) if n > self.minimum else n + 1
        predicted = max(self._prior(n), 1.0)
        slope = max((self._prior(other) - predicted) / (other - n), 0.0)
        return Line(n, peak, slope * max(1.0, peak / predicted), doubt=abs(peak - predicted) / n)

    # What to try

    def _next(self) -> int | None:
        low, high = self._low, next(iter(self._failures), None)
        if low is None:
            return self._begin(high)
        if low.n == self.cap or (self.trials >= MAX_TRIALS and not self.exact):
            return None
        lines, ceiling = self._lines(low, high), high.n if high else self.cap + 1
        likely, hoped = (
            math.floor(min([ceiling - 1, *(reach(line, self.budget_bytes) for line in lines)]))
            for reach in (Line.likely, Line.hopefully)
        )
        enough = low.n * (1 + TOLERANCE)
        at_the_edge = hoped <= enough or self._within_a_jump(low)
        if ceiling - low.n == 1 or (not self.exact and at_the_edge and likely < self.cap):
            return self.cap if self._whole_fits(lines, Line.likely) else None
        if self._whole_fits(lines, Line.likely if high else Line.surely):
            return self.cap
        if self._lost(lines):
            guess = math.isqrt(low.n * ceiling)  # by ratio, as sizes far apart differ
        else:
            guess = self._guess(low, hoped if likely <= enough < hoped else likely, lines)
        return max(low.n + 1, min(guess, ceiling - 1))

    def _within_a_jump(self, low: Observation) -> bool:
        return low.peak is not None and self.budget_bytes - low.peak < self._jump(low.peak, low)

    def _jump(self, peak: float, low: Observation) -> float:
        """How near to the budget such a peak need not come, in bytes."""
        return 0.0 if low.rest is None else min(self.jump_bytes, (peak - low.rest) / JUMPY)

    def _guess(self, low: Observation, aim: int, lines: list[Line]) -> int:
        """`aim`, or a little less to be within the budget; or, if that is not safe, a smaller size to learn from."""
        n = low.n
        surely = [line.surely(self.budget_bytes * (1 + LEEWAY)) for line in lines]
        safe = math.floor(min([JUMP * n, *surely])) if lines else LEARN * n
        guess = aim
        if not self.exact and aim < self.cap:
            below = self.budget_bytes - self._jump(self.budget_bytes, low) / SPARE
            guess = math.ceil(min([aim / (1 + TOLERANCE / 2), *(line.likely(below) for line in lines)]))
        if n < (rounded := self._rounded(guess)) <= safe:
            return rounded
        if aim > safe:
            return min(safe, max(aim // LEARN, LEARN * n))
        return guess

    def _lost(self, lines: list[Line]) -> bool:
        """Whether guesses have gone wrong so often that it is time to bisect."""
        if self.trials >= MAX_TRIALS:
            return True
        if not self._failures:
            return False
        since = list(self._seen).index(self._failures[-1].n)
        unexplained = [o for o in self._failures if o.peak is None]
        return len(self._seen) - since > PATIENCE or len(unexplained) > (1 if lines else 0)

    def _whole_fits(self, lines: list[Line], reach: Callable[[Line, float], float]) -> bool:
        """Whether the whole target should fit at once for what that saves, though a little less of it might not."""
        if not self.whole_saving_bytes or self.cap in self._seen or not lines:
            return False
        return min(reach(line, self.budget_bytes + self.whole_saving_bytes) for line in lines) >= self.cap

    def _begin(self, high: Observation | None) -> int | None:
        """What to try while nothing has fitted."""
        if high is None:
            return self._predicted(self._prior) if self._prior else self.minimum
        if self.minimum not in self._seen:
            if self._prior and self.trials == 1 and high.peak:
                corrected = self._prior_line(high.n, high.peak).likely(self.budget_bytes)
                return max(self.minimum, min(math.floor(corrected / (1 + TOLERANCE / 2)), high.n - 1))
            return self.minimum
        if self.cap in self._seen or not self.whole_saving_bytes:
            return None
        if high.peak is None:  # the saving may just be enough for a few samples; for many it is not
            return self.cap if self.cap <= FEW * self.minimum else None
        return self.cap if high.peak <= self.budget_bytes + self.whole_saving_bytes else None

    def _predicted(self, prior: Callable[[int], float]) -> int:
        """The answer if the prior is right."""
        if prior(self.cap) <= self.budget_bytes + self.whole_saving_bytes:
            return self.cap
        fits, fails = self.minimum, self.cap
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if prior(middle) <= self.budget_bytes else (fits, middle)
        return fits
