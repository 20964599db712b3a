"""A step that was traced, as its traces for any micro-batch. No torch: they outlive the process that made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from autobatch.prediction.affine import STEPS, AffineSteps, NotAffine, Run
from autobatch.prediction.trace import Trace

Steps = Sequence[Sequence[int]]
"""Optimizer steps by their micro-batches."""


class TracedStep:
    """The traces of one step: from one run if its storages grow evenly with the batch, else each size by itself.

    Args:
        run: traces some optimizer steps.
        steps: which ones are made into those of every size.

    Raises:
        NotTraceable: the step cannot be traced.
    """

    def __init__(self, run: Callable[[Steps], Run], steps: Steps = STEPS) -> None:
        self._run = run
        self._exact: dict[tuple[int, ...], Trace] = {}
        self.even: AffineSteps | None = None
        self.uneven = ""
        """Why sizes have to be traced one by one, or ""."""
        self.caveat = ""
        """What the user should know about it, or ""."""
        self.left_out = ""
        """What of the step could not be traced, in a sentence, or ""."""
        try:
            self.even = AffineSteps.of(run(steps))
        except NotAffine as reason:
            self.uneven = str(reason)

    @classmethod
    def of(cls, even: AffineSteps) -> TracedStep:
        """Those of a step that was traced before."""
        steps = cls.__new__(cls)
        steps.even, steps.uneven, steps.caveat, steps.left_out = even, "", "", ""
        return steps

    def __getstate__(self) -> dict[str, object]:
        """What outlives the process that traces."""
        return {name: value for name, value in vars(self).items() if name != "_run"}

    @property
    def warnings(self) -> list[str]:
        """What the user should know about these traces, in sentences."""
        uneven = f"every size was traced by itself, as {self.uneven}." if self.uneven else ""
        return [text for text in (uneven, *self.caveats) if text]

    @property
    def caveats(self) -> list[str]:
        """The same for the trace of one size, for which it does not matter what others do."""
        return [text for text in (self.caveat, self.left_out) if text]

    def of_sizes(self, sizes: tuple[int, ...]) -> Trace:
        """A warm-up step, and one with micro-batches of these samples.

        Raises:
            NotTraceable: this very size had to be traced, and could not.
        """
        if self.even is not None:
            return self.even.of_sizes(sizes)
        if sizes not in self._exact:
            run = self._run(((max(sizes),), sizes))
            second = [section for section in run.sections if section.samples][1]
            self._exact[sizes] = replace(run.trace, steady_from=second.first_event)
        return self._exact[sizes]
