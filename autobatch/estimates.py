"""How much memory a training step takes on a GPU, as data: predicted, with where every byte is from.

No torch. Bytes are bytes on that GPU, sizes are samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, computed_field

from autobatch.precision import Precision
from autobatch.trial import DeviceInfo

if TYPE_CHECKING:
    from rich.console import RenderableType


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Interval(_Data):
    """An amount of bytes that is not known exactly."""

    likely: int
    low: int
    high: int


class ModuleBytes(_Data):
    """What a module holds at the peak, its children included."""

    path: str
    """Such as `encoder.layers.3`; "" for the step itself: batch, loss and optimizer, and all of the model."""
    bytes: int
    own_bytes: int
    """Without those of its children."""
    children: tuple[ModuleBytes, ...] = ()


class OperatorBytes(_Data):
    """What one operator of one module, called in one line, holds at the peak."""

    operator: str
    module: str
    line: str
    """`file:line` of the user's code, or ""."""
    category: str
    bytes: int
    tensors: int
    """How many storages these are."""


class Origin(_Data):
    """What one operator of one module makes in one phase of a step, or had made before it, and what of it is there
    when most is. Of every step with the same code these are the same."""

    module: str
    operator: str
    phase: str
    earlier: bool
    """Whether these are what an earlier step's batch has left behind. A step that does not keep tensors leaves next to
    nothing."""
    category: str
    line: str
    """`file:line` of the user's code that made the largest, or ""."""
    tensors: int
    """Storages made in the step, or there when it began."""
    bytes: int
    alive: dict[str, tuple[int, int]]
    """Storages and bytes that are there at the peak of each phase of the step."""


class PhasePeak(_Data):
    """When most is there in one phase of a step."""

    module: str
    operator: str
    by_category: dict[str, int]
    """Bytes alive then, as requested."""

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(self.by_category.values())


class Moment(_Data):
    """A point on the timeline of the step."""

    phase: str
    operator: str
    """What ran: an allocation of it is the last before this moment."""
    module: str
    bytes: tuple[int, ...]
    """Alive in each of the timeline's categories."""


class Timeline(_Data):
    """Memory over one training step in its steady state, in the order of its allocations."""

    categories: tuple[str, ...]
    moments: tuple[Moment, ...]
    peak: int
    """The moment at which most is alive."""


class Estimate(_Data):
    """What one training step takes. Printing it shows the table; `save_html` draws it."""

    schema_version: Literal[1] = 1
    evidence: Literal["predicted", "measured"] = "predicted"
    """Measured: the three peaks are those of a real step, and where they are from is predicted all the same."""
    device: DeviceInfo
    batch_size: int
    """Samples of the micro-batch."""
    accumulation: bool
    """Whether the gradients of earlier micro-batches are held meanwhile."""
    precision: Precision
    allocated_peak_bytes: int
    """The most in live tensors: `torch.cuda.max_memory_allocated()`."""
    capacity_bytes: int
    """The least that the caching allocator needs: with less it runs out, however often it empties its cache."""
    reserved_peak_bytes: int
    """What the allocator takes where there is enough of everything: `torch.cuda.max_memory_reserved()`."""
    context: Interval
    """Bytes outside the allocator: the CUDA context, kernels, and what libraries hold."""
    reserve_bytes: int = 0
    """Held beside the step, such as DistributedDataParallel's gradient buckets."""
    device_total: Interval
    """`capacity_bytes`, the context and `reserve_bytes`: what has to be free on the device."""
    limit_bytes: int
    """What the process may take there."""
    headroom: float
    """The share of it that is left free for a size to count as fitting."""
    largest_micro_batch: int | None
    """The most samples that were found to fit with the head-room, by bisection up to 1,048,576; None if not even one
    does, or if it was not looked for."""
    largest_was_sought: bool = True
    by_category: dict[str, int]
    """Bytes alive at the peak, by what they are for."""
    by_module: ModuleBytes
    by_operator: tuple[OperatorBytes, ...]
    """The largest first."""
    timeline: Timeline
    origins: tuple[Origin, ...] = ()
    """All that the step makes, at the peak or not, in the order in which it begins to."""
    phases: dict[str, PhasePeak] = {}
    """The peak of each phase of the step, in order."""
    growth_bytes: int = 0
    """What each step leaves behind beside what it found, so that memory grows with every step."""
    versions: dict[str, str] = {}
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """`allocated_peak_bytes`: the same to the byte in every run, so the number to compare."""
        return self.allocated_peak_bytes

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fits(self) -> bool:
        """Whether the step fits with the head-room."""
        return self.device_total.likely <= int(self.limit_bytes * (1 - self.headroom))

    def __str__(self) -> str:
        from autobatch.report.estimate import estimate_text

        return estimate_text(self)

    def __rich__(self) -> RenderableType:
        from autobatch.report.estimate import estimate_panel

        return estimate_panel(self)

    def save_html(self, path: str) -> None:
        """Draw the step's memory over time into one self-contained HTML file.

        Raises:
            InvalidInput: the file cannot be written.
        """
        from autobatch.report.timeline import write_html

        write_html(self, path)
