"""A GPU that isn't here, found by its name, its size, or a profile that was saved on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autobatch.devices import catalog
from autobatch.devices.context import ContextEstimate, context_bytes
from autobatch.errors import InvalidInput
from autobatch.prediction.kernels import Gpu
from autobatch.prediction.predictor import Conditions
from autobatch.torch_version import installed
from autobatch.trial import DeviceInfo, complaint
from autobatch.units import format_bytes, parse_bytes

_SIZE = re.compile(r"[\d.]+\s*[KMGT](i?B)?", re.IGNORECASE)
"""An amount of memory with its unit; "4090" is a GPU's name."""


@dataclass(frozen=True)
class Target:
    """What a prediction needs to know of a GPU."""

    title: str
    """As the driver names it, or what cards it stands for."""
    visible_bytes: int
    """The memory that torch sees."""
    capability: tuple[int, int]
    multiprocessors: int
    context: ContextEstimate
    """Bytes that a training process takes there outside torch's allocator."""
    torch: str
    """The version of torch that trains there."""
    provenance: str
    """Where these are from, for people."""

    @property
    def conditions(self) -> Conditions:
        """How it runs a step."""
        return Conditions.of(self.capability, self.torch, self.multiprocessors)


class SavedProfile(BaseModel):
    """What a prediction reads of a profile that `autobatch probe` saved; the rest of it is left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Literal[1]
    device: DeviceInfo
    context_bytes: int | None = Field(default=None, ge=0)
    versions: dict[str, Annotated[str, Field(pattern=r"^\d+\.\d+")]] = {}


def find_target(name: str) -> Target:
    """The GPU of that name.

    Args:
        name: a name in the catalogue ("rtx-3090", or what the driver calls it); a size such as "24GiB" for any card
            that has so much; or the path of a profile, a JSON file.

    Raises:
        InvalidInput: there is no such GPU, or the file is no profile of one.
    """
    if not isinstance(name, (str, Path)):
        raise InvalidInput(f'device must name a GPU, such as "rtx-4090", but is {name!r}.')
    path, name = Path(name).expanduser(), str(name)
    if path.suffix == ".json" or path.is_file():
        return _from_profile(path)
    by_size = _SIZE.fullmatch(name.strip()) is not None
    gpu = catalog.of_size(parse_bytes(name)) if by_size else catalog.find(name)
    version, cuda = installed()
    context = context_bytes(gpu.capability, cuda, version, gpu.multiprocessors)
    return Target(
        title=_any_like(gpu) if by_size else gpu.title,
        visible_bytes=gpu.visible_bytes,
        capability=_capability(gpu.capability),
        multiprocessors=gpu.multiprocessors,
        context=context,
        torch=version,
        provenance=(
            f"the catalogue: {format_bytes(gpu.visible_bytes)} visible to torch ({gpu.visible_from}), about "
            f"{format_bytes(context.likely)} for context and libraries"
        ),
    )


def _any_like(gpu: catalog.Gpu) -> str:
    """The title of every card that one stands for, if it is a real one."""
    return f"any {gpu.memory_bytes / catalog.GIB:g} GiB card (as {gpu.title})" if gpu.sources else gpu.title


def _from_profile(path: Path) -> Target:
    try:
        profile = SavedProfile.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"the device profile {path} cannot be read: {error.strerror}.") from error
    except (ValidationError, UnicodeDecodeError) as error:
        reason = complaint(error) if isinstance(error, ValidationError) else str(error)
        raise InvalidInput(
            f"{path} is no device profile ({reason}). Make one on the GPU itself: autobatch probe --output {path.name}"
        ) from error
    device, version = profile.device, profile.versions.get("torch", installed()[0])
    if device.type != "cuda" or device.capability is None:
        raise InvalidInput(
            f"{path} is the profile of {device.name} ({device.type}), not one made on a CUDA GPU: only those can be "
            "simulated. `autobatch devices --catalog` lists those that need no profile."
        )
    if profile.context_bytes is None:
        multiprocessors = _multiprocessors(device)
        context = context_bytes(device.capability, profile.versions.get("cuda"), version, multiprocessors)
    else:
        context = ContextEstimate(profile.context_bytes, profile.context_bytes, profile.context_bytes)
    return _target(device, device.capability, context, version, f"the profile {path}")


def target_here(device: DeviceInfo, context: int) -> Target:
    """A GPU that is here, as something to predict for.

    Args:
        device: the GPU.
        context: bytes that this process takes there outside torch's allocator.
    """
    assert device.capability is not None, "a CUDA device has one"
    known = ContextEstimate(context, context, context)
    return _target(device, device.capability, known, installed()[0], "the GPU itself")


def _target(device: DeviceInfo, capability: str, context: ContextEstimate, version: str, source: str) -> Target:
    return Target(
        title=device.name,
        visible_bytes=device.total_bytes,
        capability=_capability(capability),
        multiprocessors=_multiprocessors(device) or Gpu().multiprocessors,
        context=context,
        torch=version,
        provenance=f"{source}: {format_bytes(device.total_bytes)} visible to torch, "
        f"{format_bytes(context.likely)} for context and libraries",
    )


def _multiprocessors(device: DeviceInfo) -> int | None:
    return next((gpu.multiprocessors for gpu in catalog.catalog() if gpu.title == device.name), None)


def _capability(text: str) -> tuple[int, int]:
    major, dot, minor = text.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise InvalidInput(f"{text!r} is no compute capability. Write it like 8.6.")
    return int(major), int(minor)
