"""The memory that is really there: cgroup limits, on written files and, where that is allowed, in a real cgroup."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autobatch.devices import system_memory

MIB = 1 << 20
MEMINFO = "MemTotal:        4194304 kB\nMemFree:          100 kB\nMemAvailable:    2097152 kB"


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_a_cgroup_v2_limit_counts_less_what_is_used_but_not_cached_files(tmp_path):
    write(tmp_path / "proc", meminfo=MEMINFO)
    write(tmp_path / "proc/self", cgroup="0::/a/b")
    write(
        tmp_path / "fs/a",
        memory__max=900 * MIB,
        memory__current=500 * MIB,
        memory__stat=f"anon 1\ninactive_file {100 * MIB}",
    )
    write(tmp_path / "fs/a/b", memory__max="max", memory__current=500 * MIB, memory__stat="inactive_file 0")
    assert system_memory.total_bytes(tmp_path / "proc", tmp_path / "fs") == 900 * MIB
    assert system_memory.available_bytes(tmp_path / "proc", tmp_path / "fs") == 500 * MIB


def test_a_cgroup_v1_limit_counts_and_its_huge_number_for_none_does_not(tmp_path):
    write(tmp_path / "proc", meminfo=MEMINFO)
    write(tmp_path / "proc/self", cgroup="9:name=systemd:/\n4:cpu,memory:/job\n0::/")
    limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
    write(tmp_path / "fs/memory", **{limit: 9223372036854771712, usage: 5, "memory.stat": "total_inactive_file 0"})
    assert system_memory.total_bytes(tmp_path / "proc", tmp_path / "fs") == 4096 * MIB
    write(
        tmp_path / "fs/memory/job",
        **{limit: 300 * MIB, usage: 50 * MIB, "memory.stat": f"total_inactive_file {10 * MIB}"},
    )
    assert system_memory.available_bytes(tmp_path / "proc", tmp_path / "fs") == 260 * MIB


def test_in_a_container_where_the_path_is_the_hosts_the_root_counts(tmp_path):
    write(tmp_path / "proc", meminfo=MEMINFO)
    write(tmp_path / "proc/self", cgroup="0::/docker/abc")
    write(tmp_path / "fs", memory__max=400 * MIB, memory__current=0, memory__stat="inactive_file 0")
    assert system_memory.total_bytes(tmp_path / "proc", tmp_path / "fs") == 400 * MIB


def test_without_cgroups_the_machine_counts(tmp_path):
    write(tmp_path, meminfo=MEMINFO)
    assert system_memory.total_bytes(tmp_path, tmp_path) == 4096 * MIB
    assert system_memory.available_bytes(tmp_path, tmp_path) == 2048 * MIB


def test_in_a_real_cgroup_the_limit_is_seen():
    memory = Path("/sys/fs/cgroup/memory")
    v1 = memory.is_dir()
    group = (memory if v1 else Path("/sys/fs/cgroup")) / f"autobatch-test-{os.getpid()}"
    limit = "memory.limit_in_bytes" if v1 else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(256 * MIB))
    except OSError as error:
        pytest.skip(f"needs the right to make a cgroup: {error}")
    try:
        program = (
            "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
            "from autobatch.devices.system_memory import *; print(total_bytes(), available_bytes())"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(group / "cgroup.procs")], capture_output=True, text=True, check=True
        )
        total, available = map(int, done.stdout.split())
        assert total == 256 * MIB
        assert 128 * MIB < available < 256 * MIB
    finally:
        group.rmdir()
