"""The record of one step: predicted for a GPU that need not be here, or measured on one that is."""

from __future__ import annotations

from contextlib import closing

from autobatch.devices import get_device
from autobatch.devices.target import Target, find_target, target_here
from autobatch.errors import NothingFits, NotTraceable
from autobatch.estimates import Estimate
from autobatch.estimating import estimates
from autobatch.regression.record import Record, Settings, record_of, versions
from autobatch.trial import Trial
from autobatch.units import format_bytes
from autobatch.workload import Workload, resolve
from autobatch.workload.state import preserved


def estimated(workload: Workload, settings: Settings) -> Record:
    """What the step takes on the GPU that the settings name.

    Raises:
        InvalidInput, NotTraceable, Exception: as `autobatch.estimate` does.
        DeviceUnavailable, NothingFits: the GPU to measure on is not there, or has too little memory.
    """
    if settings.device.partition(":")[0] == "cuda":
        return _measured(workload, settings)
    target = find_target(settings.device)
    return record_of(_estimate(workload, settings, target), settings)


def _estimate(workload: Workload, settings: Settings, target: Target) -> Estimate:
    (found,) = estimates(
        workload, settings.batch_size, [target], headroom=0, accumulation=settings.accumulation, largest=False
    )
    return found


def _measured(workload: Workload, settings: Settings) -> Record:
    """The peaks of a real step, and where they are from by its trace."""
    device = get_device(settings.device)
    sizes = (settings.batch_size,) * (2 if settings.accumulation else 1)
    with closing(device), preserved(workload, tensors=False):
        step = resolve(workload)
        with device.trials(step, device.limit_bytes) as run:
            trial = run(sizes)
        context = device.context_bytes or 0
    peak, total = _peaks(trial, device.limit_bytes)
    try:
        where = record_of(_estimate(workload, settings, target_here(device.info, context)), settings)
    except NotTraceable as error:
        where = Record(
            settings=settings,
            versions=versions(),
            peak_bytes=0,
            device_total_bytes=0,
            warnings=(f"where the bytes are from is not known: {error}",),
        )
    return where.model_copy(update={"evidence": "measured", "peak_bytes": peak, "device_total_bytes": total})


def _peaks(trial: Trial, limit_bytes: int) -> tuple[int, int]:
    if trial.peak_allocated_bytes is None or trial.peak_bytes is None:
        raise NothingFits(
            f"a step of {trial.micro_batch_size} samples ran out of memory in the {format_bytes(limit_bytes)} that are "
            f"free on the GPU{f' ({trial.detail})' if trial.detail else ''}. Use a smaller batch_size.",
            needed_bytes=None,
            budget_bytes=limit_bytes,
        )
    return trial.peak_allocated_bytes, trial.peak_bytes
