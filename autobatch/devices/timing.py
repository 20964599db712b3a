"""How long an optimizer step takes in the steady state: repeated, after a warm-up that does not count."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

WARM_UP = 4
"""Micro-batches of the step that runs before any is timed: heaps and caches grow in the first ones."""


@dataclass(frozen=True)
class Timing:
    """How often to time a step."""

    steps: int = 7
    """Steps, at most."""
    seconds: float = 10.0
    """No more steps begin after this time,"""
    least: int = 3
    """but for so many."""


def timed(step: Callable[[], float], timing: Timing) -> tuple[float, ...]:
    """The seconds that each run of a step took, by what itself says."""
    began = time.perf_counter()
    seconds: list[float] = []
    while len(seconds) < timing.steps and (len(seconds) < timing.least or time.perf_counter() - began < timing.seconds):
        seconds.append(step())
    return tuple(seconds)
