"""What this process holds, as Linux counts it against `RLIMIT_DATA`, and the limit itself.

The kernel counts private writable memory: heap, anonymous mappings, thread stacks, the libraries' data (proc(5),
`VmData`). That is what a container's limit counts too, but for pages backed by files, which the kernel can drop.
`VmPeak` is the peak of all address space; what is not data in it (code, files) stays put, so the peak of data is
`VmPeak - (VmSize - VmData)`.
"""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _status() -> dict[str, int]:
    lines = (line.split() for line in _STATUS.read_text().splitlines() if line.startswith("Vm"))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, *_ in lines}


def data_bytes() -> int:
    """Bytes held now."""
    return _status()["VmData"]


def peak_data_bytes() -> int:
    """The most bytes held since this process was forked."""
    now = _status()
    return now["VmPeak"] - (now["VmSize"] - now["VmData"])


def limit_data(limit_bytes: int) -> None:
    """Let allocations fail beyond `limit_bytes` in all."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    soft = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def lift_limit() -> None:
    """Give this process room again, for example to report that it ran out."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def trim() -> None:
    """Give freed memory back to the kernel where the C library can (glibc)."""
    trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim_heap:
        trim_heap(0)


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when its parent ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number)


def be_killed_first() -> None:
    """Make this process the kernel's first choice when memory runs out, so that nobody else dies for it."""
    Path("/proc/self/oom_score_adj").write_text("1000")
