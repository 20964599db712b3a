"""What a check remembers of a step: its peak, and enough of where that is from to say later what has changed."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from autobatch.estimates import Estimate, Origin, PhasePeak

SMALL = 10_000
"""What makes less than one part in so many of the peak is remembered as one."""
THE_REST = "small ones"
_KEY = re.compile(r"(?P<module>.*?) \| (?P<operator>.*) \| (?P<phase>[a-z]+)(?P<earlier> \| earlier step)?")
_PACKAGES = {"hf": "transformers", "timm": "timm", "torchvision": "torchvision"}
ALWAYS = "always"
"""Stands for all phases, where they are alike."""

Count = Annotated[int, Field(ge=0, le=1 << 60)]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Settings(_Data):
    """What was checked."""

    spec: str
    batch_size: int
    precision: str
    checkpointing: bool | None = None
    accumulation: bool = False
    device: str


class Made(_Data):
    """What one operator of one module makes in one phase of a step."""

    category: str
    tensors: Count = 0
    """Storages."""
    bytes: Count = 0
    alive: dict[str, tuple[Count, Count]] = {}
    """Storages and bytes that are there at the peak of each phase, or `ALWAYS`."""

    def at(self, phase: str) -> tuple[int, int]:
        """Storages and bytes there at the peak of that phase."""
        return self.alive.get(phase) or self.alive.get(ALWAYS, (0, 0))


class Record(_Data):
    """One case, as it was or as it is."""

    settings: Settings
    evidence: Literal["predicted", "measured"] = "predicted"
    """Measured: `peak_bytes` and `device_total_bytes` are; where they are from is predicted all the same."""
    versions: dict[str, str] = {}
    peak_bytes: Count
    """The most in live tensors: `torch.cuda.max_memory_allocated()`."""
    device_total_bytes: Count
    """What has to be free on the device."""
    growth_bytes: Count = 0
    """What each step leaves behind beside what it found."""
    phases: dict[str, PhasePeak] = {}
    """The peak of each phase: a change can make another one the highest."""
    origins: dict[str, Made] = {}
    """By module, operator and phase. Lines are left out: they move with every edit above them."""
    lines: dict[str, str] = Field(default={}, exclude=True)
    """`file:line` of the user's code for each of `origins`, now; not kept."""
    warnings: tuple[str, ...] = Field(default=(), exclude=True)

    @field_validator("origins")
    @classmethod
    def _named_by_their_parts(cls, origins: dict[str, Made]) -> dict[str, Made]:
        for key in origins:
            parts_of(key)
        return origins

    @property
    def peak_phase(self) -> str:
        """The phase with most; "" where that is not known."""
        return max(self.phases, key=lambda phase: self.phases[phase].bytes, default="")


def record_of(estimate: Estimate, settings: Settings) -> Record:
    """What to remember of an estimate."""
    groups, rest = _split(estimate.origins, estimate.peak // SMALL)
    phases = [phase for phase in estimate.phases if phase != "batch"]  # when there is next to nothing
    origins = {_key(origin): _made([origin], phases) for origin in groups}
    if rest:
        origins[THE_REST] = _made(rest, phases)
    return Record(
        settings=settings,
        evidence=estimate.evidence,
        versions=_versions(estimate.versions, settings.spec),
        peak_bytes=estimate.peak,
        device_total_bytes=estimate.device_total.likely,
        growth_bytes=estimate.growth_bytes,
        phases={phase: estimate.phases[phase] for phase in phases},
        origins=dict(sorted(origins.items())),
        lines={_key(origin): origin.line for origin in groups if origin.line},
        warnings=estimate.warnings,
    )


def parts_of(key: str) -> tuple[str, str, str, bool]:
    """Module, operator, phase and whether an earlier step left it, of a key of `Record.origins`."""
    if key == THE_REST:
        return "", THE_REST, "", False
    found = _KEY.fullmatch(key)
    if found is None:
        raise ValueError(f"{key!r} does not name module, operator and phase")
    return found["module"], found["operator"], found["phase"], found["earlier"] is not None


def _key(origin: Origin) -> str:
    return " | ".join([origin.module, origin.operator, origin.phase, *(["earlier step"] if origin.earlier else [])])


def _split(origins: Iterable[Origin], least: int) -> tuple[list[Origin], list[Origin]]:
    large: list[Origin] = []
    small: list[Origin] = []
    for origin in origins:
        (large if origin.bytes >= least else small).append(origin)
    return large, small


def _made(origins: list[Origin], phases: list[str]) -> Made:
    alive = {
        phase: (
            sum(origin.alive.get(phase, (0, 0))[0] for origin in origins),
            sum(origin.alive.get(phase, (0, 0))[1] for origin in origins),
        )
        for phase in phases
    }
    at_all_times = set(alive.values())
    return Made(
        category=max(origins, key=lambda origin: origin.bytes).category,
        tensors=sum(origin.tensors for origin in origins),
        bytes=sum(origin.bytes for origin in origins),
        alive=_without_nothing({ALWAYS: at_all_times.pop()} if len(at_all_times) == 1 else alive),
    )


def _without_nothing(alive: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {phase: held for phase, held in alive.items() if held[0]}


def _versions(found: dict[str, str], spec: str) -> dict[str, str]:
    """Those that the numbers depend on, without their builds: of one version, all give the same."""
    told = {name: version for name, version in found.items() if name in ("autobatch", "torch")}
    if package := _PACKAGES.get(spec.partition(":")[0]):
        told[package] = importlib.metadata.version(package)
    return {name: version.partition("+")[0] for name, version in told.items()}
