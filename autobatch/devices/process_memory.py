"""What this process holds, as Linux counts it against `RLIMIT_DATA`, and the limit itself.

The kernel counts private writable memory: heap, anonymous mappings, thread stacks, the libraries' data (proc(5),
`VmData`). That is what a container's limit counts too, but for pages backed by files, which the kernel can drop.

There is no high-water mark of `VmData`, but there are two that it follows from:

- `VmPeak`, of all address space. What is not data in it (code, files) stays put, so data never peaked above
  `VmPeak - (VmSize - VmData)`. It is too high where address space was reserved for a moment: glibc reserves 128 MiB and
  gives half of it back whenever a thread gets an arena.
- `VmHWM`, of resident memory. Without pages backed by files, and with what data is mapped but not touched, it gives
  `VmHWM - RssFile - RssShmem + (VmData - RssAnon)`. It is too low where untouched memory was freed again.

The smaller of the two is taken, and never less than what was seen on the way.
"""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress
from pathlib import Path

_LIBC = ctypes.CDLL(None)
_STATUS = Path("/proc/self/status")


_BEFORE_FREE = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h; `fordblks` are the free bytes of all arenas."""

    _fields_ = [(name, ctypes.c_size_t) for name in (*_BEFORE_FREE, "fordblks", "keepcost")]


def _status() -> dict[str, int]:
    lines = (line.split() for line in _STATUS.read_text().splitlines() if line.startswith(("Vm", "Rss")))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, *_ in lines}


def data_bytes() -> int:
    """Bytes held now."""
    return _status()["VmData"]


def peak_data_bytes(seen: int = 0) -> int:
    """The most bytes held since this process was forked; `seen` is the most that `data_bytes` gave on the way."""
    now = _status()
    by_address_space = now["VmPeak"] - (now["VmSize"] - now["VmData"])
    by_residence = now["VmHWM"] - now["RssFile"] - now["RssShmem"] + (now["VmData"] - now["RssAnon"])
    return max(seen, now["VmData"], min(by_address_space, by_residence))


def in_use_bytes() -> int | None:
    """Bytes held now, less what lies free in the heap. None where that is not known: the C library is not glibc 2.33 or
    newer, or another allocator was loaded over it."""
    heap_of = getattr(_LIBC, "mallinfo2", None)
    if heap_of is None:
        return None
    heap_of.restype = _Mallinfo2
    heap = heap_of()
    used: int = heap.arena + heap.hblkhd
    free: int = heap.fordblks
    return data_bytes() - free if used else None


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
    trim_heap = getattr(_LIBC, "malloc_trim", None)
    if trim_heap:
        trim_heap(0)


def age_heap() -> None:
    """Have the C library treat large blocks as it does after some steps of training.

    glibc maps blocks from 128 KiB on one by one, until one is freed: from then on, blocks up to that size come from the
    heap, where they fragment, so that the first step of training peaks lower than all others. 32 MiB is where that ends
    (mallopt(3), `M_MMAP_THRESHOLD`).
    """
    _LIBC.malloc.restype, _LIBC.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    _LIBC.free.restype, _LIBC.free.argtypes = None, [ctypes.c_void_p]
    _LIBC.free(_LIBC.malloc((32 << 20) - (64 << 10)))


def be_killed_first() -> None:
    """Make this process the kernel's first choice when memory runs out, so that nobody else dies for it."""
    with suppress(OSError):  # /proc may be read-only; the kernel then chooses by size
        Path("/proc/self/oom_score_adj").write_text("1000")
