"""What the NVIDIA driver says about a GPU, all processes' memory included. Whatever it will not say is a warning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pynvml

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class GpuProcess:
    """A process that has a context on the GPU."""

    pid: int
    """Its number, as the driver sees it: within a container, not that of `os.getpid()`."""
    used_bytes: int | None
    """Bytes it holds there, or None where the driver does not tell (Windows, or no permission)."""


@dataclass(frozen=True)
class GpuReading:
    """One look at a GPU. A value that the driver did not give is None, and a sentence in `warnings` says why."""

    name: str | None = None
    uuid: str | None = None
    driver: str | None = None
    mig: bool | None = None
    """Whether this is a slice of a partitioned GPU."""
    total_bytes: int | None = None
    free_bytes: int | None = None
    used_bytes: int | None = None
    """Bytes held by all processes; `reserved_bytes` are among them only where those are None."""
    reserved_bytes: int | None = None
    """Bytes that the driver keeps for itself (some hundred MiB), or None where it is too old to tell them apart."""
    processes: tuple[GpuProcess, ...] | None = None
    """Every process that computes on the GPU, this one included."""
    warnings: tuple[str, ...] = ()


def read_gpu(uuid: str | None, pci_bus_id: str | None) -> GpuReading:
    """Ask the driver about the GPU that torch knows by this UUID or PCI bus id; its indices differ from torch's.

    Args:
        uuid: as `torch.cuda.get_device_properties` gives it, with or without the prefix "GPU-" or "MIG-".
        pci_bus_id: such as "00000000:3B:00.0"; of a partitioned GPU it names the whole, not the slice.
    """
    try:
        with _initialised():
            return _Reader().read(uuid, pci_bus_id)
    except pynvml.NVMLError as error:
        return GpuReading(warnings=(_why_unavailable(error),))


@contextmanager
def _initialised() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _why_unavailable(error: Any) -> str:
    reasons = {
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "the library libnvidia-ml is not there",
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the driver was updated, and needs a reboot to match its library",
        pynvml.NVML_ERROR_NO_PERMISSION: "this user may not ask the driver",
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the driver is not loaded",
    }
    reason = reasons.get(error.value, str(error))
    return f"NVML is not available ({reason}): what other processes hold on the GPU cannot be told apart."


@dataclass
class _Reader:
    """Puts a reading together, question by question."""

    warnings: list[str] = field(default_factory=list)

    def read(self, uuid: str | None, pci_bus_id: str | None) -> GpuReading:
        handle = self._find(uuid, pci_bus_id)
        if handle is None:
            known = uuid or pci_bus_id or "without UUID"
            return GpuReading(
                driver=self._ask("the driver's version", pynvml.nvmlSystemGetDriverVersion),
                warnings=(
                    f"NVML does not know the GPU {known}: others' memory on it is unknown.",
                    *self.warnings,
                ),
            )
        is_slice = self._optional(lambda: bool(pynvml.nvmlDeviceIsMigDeviceHandle(handle).value))
        has_slices = self._optional(lambda: pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
        whole_of_slices = bool(has_slices) and not is_slice
        memory = processes = None
        if whole_of_slices:  # found by its PCI bus: its figures are those of all slices together
            self.warnings.append(
                "this GPU is partitioned (MIG) and NVML sees only the whole: other processes are not counted."
            )
        else:
            memory = self._optional(
                lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
            ) or self._ask("its memory", lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
            processes = self._ask("its processes", lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
        return GpuReading(
            name=self._ask("its name", lambda: pynvml.nvmlDeviceGetName(handle)),
            uuid=self._ask("its UUID", lambda: pynvml.nvmlDeviceGetUUID(handle)),
            driver=self._ask("the driver's version", pynvml.nvmlSystemGetDriverVersion),
            mig=None if is_slice is None and has_slices is None else bool(is_slice or has_slices),
            total_bytes=memory.total if memory else None,
            free_bytes=memory.free if memory else None,
            used_bytes=memory.used if memory else None,
            reserved_bytes=getattr(memory, "reserved", None),  # the first version of the answer has none
            processes=None if processes is None else tuple(GpuProcess(p.pid, p.usedGpuMemory) for p in processes),
            warnings=tuple(self.warnings),
        )

    def _find(self, uuid: str | None, pci_bus_id: str | None) -> Any:
        names = [f"GPU-{uuid}", f"MIG-{uuid}", uuid] if uuid else []
        for name in names:
            if handle := self._optional(lambda name=name: pynvml.nvmlDeviceGetHandleByUUID(name)):  # type: ignore[misc]
                return handle
        return self._optional(lambda: pynvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)) if pci_bus_id else None

    def _ask(self, what: str, question: Callable[[], Answer]) -> Answer | None:
        try:
            return question()
        except pynvml.NVMLError as error:
            self.warnings.append(f"NVML does not tell {what} of the GPU ({error}).")
            return None

    def _optional(self, question: Callable[[], Answer]) -> Answer | None:
        """The answer to what older GPUs and drivers do not know, and need not be warned about."""
        absent = (
            pynvml.NVML_ERROR_NOT_SUPPORTED,
            pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            pynvml.NVML_ERROR_NOT_FOUND,
            pynvml.NVML_ERROR_INVALID_ARGUMENT,
            pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        )
        try:
            return question()
        except pynvml.NVMLError as error:
            if error.value not in absent:
                self.warnings.append(f"NVML could not be asked about the GPU ({error}).")
            return None
