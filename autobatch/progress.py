"""What `fit` and `tune` say while they work: the events that their `progress` callable gets, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autobatch.trial import DeviceInfo, Trial
from autobatch.tuned import Tried


@dataclass(frozen=True)
class SearchStarted:
    """The device is known and trials are about to begin."""

    device: DeviceInfo
    budget_bytes: int
    """Bytes that a training step may use: the limit less the head-room."""
    limit_bytes: int
    """Bytes that the training process may hold on the device."""
    cap: int
    """The largest micro-batch that is worth trying, in samples."""


@dataclass(frozen=True)
class TrialStarted:
    """A micro-batch size is about to be tried."""

    micro_batch_size: int


@dataclass(frozen=True)
class TrialEnded:
    """A micro-batch size was tried."""

    trial: Trial
    budget_bytes: int
    """The budget that the trial was judged by."""


@dataclass(frozen=True)
class ConfigurationStarted:
    """`tune` is about to try a configuration; the events of its search follow."""

    knobs: Mapping[str, str]
    number: int
    """How many have been claimed in the study before it."""


@dataclass(frozen=True)
class ConfigurationEnded:
    """`tune` has tried a configuration."""

    tried: Tried
    best: Tried | None
    """The fastest that fits so far."""


ProgressEvent = SearchStarted | TrialStarted | TrialEnded | ConfigurationStarted | ConfigurationEnded
OnProgress = Callable[[ProgressEvent], None]
