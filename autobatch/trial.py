"""What was tried, on which device, and how it went: the evidence of a plan, as data.

Bytes are bytes on the device, sizes are samples, times are seconds.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Verdict(str, Enum):
    """How a trial ended."""

    FITS = "fits"
    OVER_BUDGET = "over_budget"
    """It ran, but took more than the budget, or made the allocator retry."""
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"


Bytes = Annotated[int, Field(ge=0, le=1 << 60)]
Samples = Annotated[int, Field(ge=1, le=1 << 60)]


class Data(BaseModel):
    """Frozen, with exact types and nothing else in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "a text",
    "bool": "true or false",
    "tuple": "a list",
    "dict": "an object",
    "model": "an object",
    "finite": "a finite number",
}
_BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}


def complaint(error: ValidationError) -> str:
    """The first thing that is wrong with a document, in plain words, after the place where it is."""
    first = error.errors(include_url=False)[0]
    kind, given, context = first["type"], first["input"], first.get("ctx", {})
    where = ".".join(map(str, first["loc"]))
    what = "null" if given is None else repr(given) if isinstance(given, (int, float, str)) else "what is there"
    if kind == "value_error":
        wrong = str(context["error"])
    elif kind == "missing":
        wrong = "it is missing"
    elif kind == "extra_forbidden":
        wrong = "there is nothing of that name"
    elif kind in _BOUNDS:
        wrong = f"{what} is not {_BOUNDS[kind]} {next(iter(context.values()))}"
    elif "expected" in context:
        wrong = f"{what} is not {context['expected']}"
    else:
        wrong = f"{what} is not {_KINDS.get(kind.partition('_')[0], 'what belongs there')}"
    return f"{where}: {wrong}" if where else wrong


class Trial(Data):
    """One try of one micro-batch size."""

    micro_batch_sizes: tuple[int, ...]
    """The micro-batches of the measured optimizer step: two, or one where the whole target is one micro-batch."""
    verdict: Verdict
    peak_bytes: int | None = None
    """The most bytes that the process held on the device, to compare with the budget; None if it ran out first."""
    rest_bytes: int | None = None
    """Bytes held without a batch: weights, optimizer state and, with two micro-batches, gradients. None: not known."""
    turn_bytes: int | None = None
    """Bytes held at the turn from forward to backward of the last micro-batch."""
    peak_allocated_bytes: int | None = None
    """CUDA: peak bytes in live tensors."""
    peak_reserved_bytes: int | None = None
    """CUDA: peak bytes held by the caching allocator."""
    predicted_bytes: int | None = None
    """CUDA: what the peak was predicted to be before the trial."""
    requested_bytes: int | None = None
    """The allocation that failed, where the error named it."""
    samples: int = 0
    """Samples pushed through the model in this trial, warm-up included."""
    seconds: float = 0.0
    """Wall time of the whole trial."""
    step_seconds: float | None = None
    """Wall time of the measured optimizer step; the median, where it was repeated."""
    repeated_seconds: tuple[float, ...] = ()
    """The time of each run of the measured step, where it was repeated to be timed: wall time without that of making
    batches; on CUDA by the device's own clock."""
    detail: str = ""
    """What happened, in a few words, where the verdict does not say it all."""

    @property
    def micro_batch_size(self) -> int:
        """The largest micro-batch of the trial."""
        return max(self.micro_batch_sizes)

    @property
    def samples_per_second(self) -> float:
        """The speed of the measured step; 0 where it was not timed."""
        return sum(self.micro_batch_sizes) / self.step_seconds if self.step_seconds else 0.0

    @property
    def fits(self) -> bool:
        """Whether it ran within the budget."""
        return self.verdict is Verdict.FITS


class DeviceInfo(Data):
    """The device that a plan was made on."""

    type: str
    """"cpu", "cuda", or "simulated"."""
    name: str
    total_bytes: int
    """Bytes of memory that the device has."""
    free_bytes: int | None = None
    """Bytes that were free when the plan was made."""
    index: int | None = None
    """CUDA: the device's index in this process."""
    uuid: str | None = None
    driver: str | None = None
    capability: str | None = None
    """CUDA: compute capability, such as "9.0"."""
    mig: bool | None = None
    """CUDA: whether this is a slice of a partitioned GPU."""
