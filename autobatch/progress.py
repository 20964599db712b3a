"""What `fit` says while it works: the events that its `progress` callable gets, in the order in which they happen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autobatch.trial import DeviceInfo, Trial


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


ProgressEvent = SearchStarted | TrialStarted | TrialEnded
OnProgress = Callable[[ProgressEvent], None]
