"""What one step takes: predicted for a GPU that need not be here, or measured on one that is."""

from __future__ import annotations

from contextlib import closing

from autobatch.devices import get_device
from autobatch.devices.target import Target, target_here
from autobatch.errors import NothingFits, NotTraceable, WorkloadNotPortable
from autobatch.estimates import Estimate, Interval, ModuleBytes, Timeline
from autobatch.estimating import estimates
from autobatch.estimator import Question
from autobatch.regression.cases import is_here
from autobatch.trial import Trial
from autobatch.units import format_bytes
from autobatch.workload import Workload, resolve
from autobatch.workload.state import preserved


def step_on(device: str, workload: Workload, batch_size: int, accumulation: bool = False) -> Estimate:
    """What a step takes on the GPU of that name.

    Raises:
        InvalidInput, NotTraceable, Exception: as `autobatch.estimate` does.
        DeviceUnavailable, NothingFits: the GPU to measure on is not there, or has too little memory.
    """
    if is_here(device):
        return _measured(device, workload, batch_size, accumulation)
    return _predicted(device, workload, batch_size, accumulation)


def _predicted(device: str | Target, workload: Workload, batch_size: int, accumulation: bool) -> Estimate:
    (found,) = estimates(workload, Question.checked(batch_size, [device], None, 0, accumulation, largest=False))
    return found


def _measured(name: str, workload: Workload, batch_size: int, accumulation: bool) -> Estimate:
    """The peaks of a real step, and where they are from by its trace."""
    device = get_device(name)
    sizes = (batch_size,) * (2 if accumulation else 1)
    with closing(device), preserved(workload, tensors=False):
        step = resolve(workload)
        with device.trials(step, device.limit_bytes) as run:
            trial = run(sizes)
        context = device.context_bytes or 0
    allocated, reserved, total = _peaks(trial, device.limit_bytes)
    measured = {
        "evidence": "measured",
        "allocated_peak_bytes": allocated,
        "reserved_peak_bytes": reserved,
        "device_total": Interval(likely=total, low=total, high=total),
    }
    try:
        where = _predicted(target_here(device.info, context), workload, batch_size, accumulation)
    except (NotTraceable, WorkloadNotPortable) as error:
        where = Estimate(
            device=device.info,
            batch_size=batch_size,
            accumulation=accumulation,
            precision=step.precision,
            allocated_peak_bytes=allocated,
            capacity_bytes=reserved,
            reserved_peak_bytes=reserved,
            context=Interval(likely=context, low=context, high=context),
            device_total=Interval(likely=total, low=total, high=total),
            limit_bytes=device.limit_bytes,
            headroom=0,
            largest_micro_batch=None,
            largest_was_sought=False,
            by_category={},
            by_module=ModuleBytes(path="", bytes=0, own_bytes=0),
            by_operator=(),
            timeline=Timeline(categories=(), moments=(), peak=0),
            assumptions=tuple(step.assumptions),
            warnings=(*step.warnings, f"where the bytes are from is not known: {error}"),
        )
    return where.model_copy(update=measured)


def _peaks(trial: Trial, limit_bytes: int) -> tuple[int, int, int]:
    if trial.peak_allocated_bytes is None or trial.peak_reserved_bytes is None or trial.peak_bytes is None:
        raise NothingFits(
            f"a step of {trial.micro_batch_size} samples ran out of memory in the {format_bytes(limit_bytes)} that are "
            f"free on the GPU{f' ({trial.detail})' if trial.detail else ''}. Use a smaller batch_size.",
            needed_bytes=None,
            budget_bytes=limit_bytes,
        )
    return trial.peak_allocated_bytes, trial.peak_reserved_bytes, trial.peak_bytes
