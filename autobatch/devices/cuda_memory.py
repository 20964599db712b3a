"""One GPU's memory as torch sees it: the seam behind which `CudaDevice` works, and that its tests can stand in for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from autobatch.errors import DeviceUnavailable


class CudaMemory:
    """One GPU's memory as torch sees it. All that `CudaDevice` asks of torch.cuda is here."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)

    def has_context(self) -> bool:
        """Whether this process may already hold a context on the GPU."""
        return bool(torch.cuda.is_initialized())

    def properties(self) -> Any:
        return torch.cuda.get_device_properties(self.device)

    def free_and_total(self) -> tuple[int, int]:
        """Bytes on the device, all processes counted. Creates the context."""
        return torch.cuda.mem_get_info(self.device)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def peak_allocated(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def peak_reserved(self) -> int:
        return torch.cuda.max_memory_reserved(self.device)

    def reset_peaks(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def retries(self) -> int:
        """How often, so far, the allocator had to return its cache to the driver to get memory."""
        return int(torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0))

    def fraction(self) -> float:
        """The share of the device's memory that the allocator may reserve."""
        return float(torch.cuda.get_per_process_memory_fraction(self.device))

    def set_fraction(self, fraction: float) -> None:
        torch.cuda.set_per_process_memory_fraction(fraction, self.device)

    def release_cache(self) -> None:
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds_of(self, work: Callable[[], object]) -> float:
        """How long the GPU takes for what `work` has it do, by its own clock."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def as_current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)


def open_gpu(index: int) -> CudaMemory:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 0 <= index < count:
        there = f"torch sees {count}: cuda:0 to cuda:{count - 1}" if count else "torch sees no CUDA device here"
        raise DeviceUnavailable(f'cuda:{index} is not there; {there}. See `autobatch devices`, or use device="cpu".')
    return CudaMemory(index)


def pci_bus_id(properties: Any) -> str | None:
    try:
        return f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0"
    except AttributeError:  # a build of torch that does not tell
        return None
