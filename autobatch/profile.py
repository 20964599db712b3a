"""What a device can do: memory, and the largest micro-batch, peak and throughput of each reference workload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from autobatch.devices import get_device
from autobatch.errors import NothingFits
from autobatch.fitting import fit
from autobatch.plan import TrainingPlan
from autobatch.precision import Precision
from autobatch.progress import OnProgress
from autobatch.trial import DeviceInfo, Trial
from autobatch.workload.reference import REFERENCES, Reference


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ReferenceResult(_Data):
    """How one reference workload ran."""

    name: str
    description: str
    parameters: int
    plan: TrainingPlan | None
    """The plan for the target; None where not a single sample fits."""
    peak_bytes: int | None = None
    """What the training process took with the largest micro-batch that fits. The plan itself may take less: it cuts the
    target into equal parts."""
    samples_per_second: float | None
    """Of an optimizer step with that micro-batch; None where it was not timed."""
    problem: str = ""
    """Why there is no plan."""


class DeviceProfile(_Data):
    """What was found about a device."""

    schema_version: Literal[1] = 1
    device: DeviceInfo
    limit_bytes: int
    """What a training process was allowed to take."""
    context_bytes: int | None = None
    """CUDA: what it took outside torch's allocator after the last trial; `device=` of other commands reads it."""
    versions: dict[str, str] = {}
    target_batch_size: int
    precision: Precision
    results: tuple[ReferenceResult, ...]


def profile_device(
    target: int,
    *,
    device: str | None = None,
    memory_limit: int | None = None,
    precision: Precision = "fp32",
    headroom: float = 0.05,
    max_micro_batch: int | None = None,
    exact: bool = False,
    progress: OnProgress | None = None,
    on_reference: Callable[[Reference], None] = lambda reference: None,
) -> DeviceProfile:
    """Fit every reference workload on a device.

    Args:
        target: samples per optimizer step; no larger micro-batch is tried.
        on_reference: called as the work on each reference begins.
        (the rest): as for `autobatch.fit`; `memory_limit` in bytes.

    Raises:
        DeviceUnavailable, InvalidInput: as `autobatch.fit` does.
    """
    spot = get_device(device, memory_limit)
    results = []
    for reference in REFERENCES:
        on_reference(reference)
        workload = reference.build(precision)
        plan, problem = None, ""
        largest: list[Trial] = []
        try:
            plan = fit(
                workload,
                target,
                device=device,
                memory_limit=memory_limit,
                headroom=headroom,
                max_micro_batch=max_micro_batch,
                exact=exact,
                progress=progress,
            )
            largest = [t for t in plan.trials if t.fits and t.micro_batch_size == plan.max_micro_batch_size]
        except NothingFits as error:
            problem = str(error)
        results.append(
            ReferenceResult(
                name=reference.name,
                description=reference.description,
                parameters=sum(parameter.numel() for parameter in workload.model.parameters()),
                plan=plan,
                peak_bytes=max((trial.peak_bytes or 0 for trial in largest), default=None),
                samples_per_second=_throughput(largest),
                problem=problem,
            )
        )
    return DeviceProfile(
        device=spot.info,
        limit_bytes=spot.limit_bytes,
        context_bytes=spot.context_bytes if spot.info.type == "cuda" else None,
        versions=next((result.plan.versions for result in results if result.plan), {}),
        target_batch_size=target,
        precision=precision,
        results=tuple(results),
    )


def _throughput(trials: list[Trial]) -> float | None:
    rates = (trial.samples_per_second for trial in trials if trial.step_seconds)
    return next(rates, None)
