"""Whose a claimed configuration is, and whether its owner is still at work: a process may be killed at any time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RENEWED_EVERY = 10.0
"""Seconds between signs of life."""
LEASE = 120.0
"""Seconds without one after which an owner on another machine is taken for dead. Its clock may be off by some."""


def ourselves() -> dict[str, Any]:
    """What tells this process from others, as JSON."""
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_gone(owner: dict[str, Any], sign_of_life: float) -> bool:
    """Whether a process has ended: known of those on this machine, else it has given no sign for a long time."""
    machine = _machine()
    if machine is not None and owner.get("machine") == machine:
        return _started(owner["pid"]) != owner["started"]
    return time.time() - sign_of_life > LEASE


@contextmanager
def signs_of_life(give: Callable[[], None]) -> Iterator[None]:
    """Call `give` again and again meanwhile, in a thread of its own."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(RENEWED_EVERY):
            give()

    thread = threading.Thread(target=repeat, name="autobatch-tune", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _machine() -> str | None:
    """This boot of this machine, and the namespace that its process numbers are from; None where that is not known."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return None


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's own count; None where there is no such process, or it only waits to be
    buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
