"""How much memory a process can really have here: the machine's, or what a container (cgroup) allows."""

from __future__ import annotations

from pathlib import Path

UNLIMITED = 1 << 60
"""Cgroup v1 writes "no limit" as a huge number."""


def total_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that processes here may have in all."""
    limits = [limit for limit, _ in _cgroup_limits(proc, cgroups)]
    return min([_meminfo(proc, "MemTotal"), *limits])


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a new process could take now: what the machine has available, and what each cgroup has left."""
    left = [max(0, limit - used) for limit, used in _cgroup_limits(proc, cgroups)]
    return min([_meminfo(proc, "MemAvailable"), *left])


def _meminfo(proc: Path, name: str) -> int:
    lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    return next(int(kib) * 1024 for label, kib, *_ in lines if label == f"{name}:")


def oom_kills() -> int | None:
    """How often the kernel has killed a process for memory since it booted, or None where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def _cgroup_limits(proc: Path, cgroups: Path) -> list[tuple[int, int]]:
    """(limit, bytes used) of this process's memory cgroup and of those above it, where a limit is set."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []  # no cgroups on this system
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may name the host's tree, of which only the root is mounted here.
        group = root / path.lstrip("/")
        for folder in [group, *group.parents]:
            if folder == root.parent:
                break
            limit = _limit_of(folder, *names)
            if limit:
                found.append(limit)
    return found


def _limit_of(folder: Path, limit_file: str, usage_file: str, cache_key: str) -> tuple[int, int] | None:
    try:
        limit = (folder / limit_file).read_text().strip()
        used = int((folder / usage_file).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None  # the root cgroup has no such files, and a container does not see the host's
    if limit == "max" or int(limit) >= UNLIMITED:
        return None
    # Cached files count as used but give way; the kernel's own "working set" leaves them out in the same way.
    return int(limit), used - int(stat.get(cache_key, 0))
