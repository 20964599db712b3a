"""What a tuning tried, as data: the evidence for a plan's knobs. Speeds are samples per second; no torch."""

from __future__ import annotations

from typing import Literal

from autobatch.trial import Bytes, Data


class Tried(Data):
    """One configuration of knobs, and how it went."""

    knobs: dict[str, str]
    """Those that are not at their plain value."""
    result: Literal["fits", "infeasible", "failed"]
    """Whether it ran within the budget, did not fit with the fewest samples, or could not run at all."""
    detail: str = ""
    """Why not."""
    samples_per_second: float | None = None
    """At the target, with the micro-batches that were fastest; the median of repeated optimizer steps."""
    spread: float | None = None
    """How far the slowest of these steps is from the fastest, as a share of the median."""
    micro_batch_sizes: tuple[int, ...] = ()
    peak_bytes: Bytes | None = None
    """The most that a step with these took."""
    excess: float = 0.0
    """Infeasible: by how much the smallest micro-batch goes beyond the budget, as a share of it; 1 where its need is
    unknown."""


class Throughput(Data):
    """How fast a tuned plan is, measured again, in turns with the plan without knobs."""

    samples_per_second: float
    plain_samples_per_second: float | None = None
    """None where the plain model does not fit, or has turned out the fastest."""
