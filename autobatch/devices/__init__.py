"""Devices: where a training step runs, and how much memory it may take there."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from autobatch.errors import DeviceUnavailable, InvalidInput

if TYPE_CHECKING:
    import torch

    from autobatch.devices.base import Device
    from autobatch.trial import DeviceInfo


def get_device(name: object = None, memory_limit: int | None = None) -> Device:
    """The device of that name.

    Args:
        name: "cpu", "cuda", "cuda:1", or a `torch.device`; None for the first CUDA device, else the CPU. Or a GPU that
            isn't here, which is then simulated: "rtx-3090", "24GiB", or the path of a profile saved on it.
        memory_limit: bytes that the training process may take there in all; None for what the device can give.

    Raises:
        InvalidInput: no device has such a name.
        DeviceUnavailable: the device is not there.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    here = _torch_device(str(name))
    if here is None:
        from autobatch.devices.simulated import SimulatedDevice
        from autobatch.devices.target import find_target

        return SimulatedDevice(find_target(str(name)), memory_limit)
    device = here
    if device.type == "cpu":
        from autobatch.devices.cpu import CpuDevice

        return CpuDevice(memory_limit)
    if device.type != "cuda":
        raise InvalidInput(f'autobatch probes "cpu" and "cuda" devices, not {device.type!r}.')
    if not torch.cuda.is_available():
        built = (
            f"torch {torch.__version__} sees no CUDA device"
            if torch.version.cuda
            else f"torch {torch.__version__} is a CPU build"
        )
        raise DeviceUnavailable(
            f'device="{device}" is not available: {built}. See `autobatch devices`, or use device="cpu".'
        )
    from autobatch.devices.cuda import CudaDevice

    index = device.index
    if index is None:  # the one that the caller has made current, as each rank does
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    return CudaDevice(index, memory_limit)


def _torch_device(name: str) -> torch.device | None:
    """The device that torch calls so, or None."""
    import torch

    try:
        return torch.device(name)
    except RuntimeError:
        return None


def list_devices() -> list[DeviceInfo]:
    """Every device that `fit` can probe here."""
    import torch

    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    found = []
    for name in [*names, "cpu"]:
        with suppress(DeviceUnavailable):  # one that another process holds for itself, or no Linux
            found.append(get_device(name).info)
    return found
