"""Torch's recorded memory histories, read and compared. The records are made here in torch's format; on a GPU they are
real."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch

from autobatch.errors import InvalidInput
from autobatch.prediction import history
from autobatch.prediction.allocator import AllocatorSettings

MIB = 1 << 20


def entry(action, address, size, stream=0):
    return {"action": action, "addr": address, "size": size, "stream": stream, "time_us": 0, "frames": []}


# Torch hands out 3 MiB and 5 MiB of a segment of 20, frees the first and uses it again; then asks for 30.
STEP = [
    entry("segment_alloc", 0x1000000, 20 * MIB),
    entry("alloc", 0x1000000, 3 * MIB),
    entry("alloc", 0x1300000, 5 * MIB - 100),
    entry("free_requested", 0x1000000, 3 * MIB),
    entry("free_completed", 0x1000000, 3 * MIB),
    entry("alloc", 0x1000000, 2 * MIB),
    entry("segment_alloc", 0x4000000, 30 * MIB),
    entry("alloc", 0x4000000, 30 * MIB),
]


@pytest.fixture
def dump(tmp_path):
    def write(entries, name="snapshot.pickle"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps({"segments": [], "device_traces": [[], entries], "allocator_settings": {}}))
        return path

    return write


def test_the_same_requests_reserve_the_same(dump):
    result = history.compare(history.load(dump(STEP), device=1))
    assert result.identical
    assert (result.allocations, result.measured_peak_reserved_bytes) == (4, 50 * MIB)
    assert result.simulated_peak_reserved_bytes == 50 * MIB


def test_a_difference_says_how_large_and_where(dump):
    other = [*STEP[:6], entry("segment_alloc", 0x4000000, 40 * MIB), *STEP[7:]]
    result = history.compare(history.load(dump(other), device=1))
    assert (result.identical, result.differs_after, result.largest_difference_bytes) == (False, 4, 10 * MIB)


def test_expandable_segments_are_mapped(dump):
    entries = [
        entry("segment_map", 0x1000000, 40 * MIB),
        entry("alloc", 0x1000000, 25 * MIB),
        entry("segment_map", 0x3800000, 20 * MIB),
        entry("alloc", 0x2900000, 30 * MIB),
    ]
    actions = history.load(dump(entries), device=1)
    assert history.compare(actions, settings=AllocatorSettings(expandable_segments=True)).identical
    assert not history.compare(actions).identical


def test_a_history_that_begins_in_the_middle_is_refused(dump):
    with pytest.raises(InvalidInput, match="begins in the middle"):
        history.compare(history.load(dump(STEP[3:]), device=1))
    with pytest.raises(InvalidInput, match="unknown kind, 'new_in_torch_9'"):
        history.compare(history.load(dump([entry("new_in_torch_9", 1, 1)]), device=1))


def test_what_is_no_snapshot_is_refused_and_nothing_in_it_is_run(dump, tmp_path):
    with pytest.raises(InvalidInput, match="no history of device 0"):
        history.load(dump(STEP))
    with pytest.raises(InvalidInput, match="IndexError"):
        history.load(dump(STEP), device=2)
    with pytest.raises(InvalidInput, match="FileNotFoundError"):
        history.load(tmp_path / "none.pickle")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InvalidInput, match=r"_dump_snapshot\(path\)"):
        history.load(tmp_path / "text")
    (tmp_path / "code").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(InvalidInput, match=r"it refers to os\.system"):
        history.load(tmp_path / "code")


@pytest.mark.gpu
def test_a_real_history_is_reserved_byte_for_byte(tmp_path):
    code = """
import sys, torch
torch.cuda.memory._record_memory_history(max_entries=1_000_000)
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8))).cuda()
optimizer = torch.optim.AdamW(model.parameters())
for n in (64, 4096, 512, 20_000):
    model(torch.randn(n, 1024, device="cuda")).square().mean().backward()
    optimizer.step(), optimizer.zero_grad()
torch.cuda.memory._dump_snapshot(sys.argv[1])
"""
    path = tmp_path / "snapshot.pickle"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    result = history.compare(history.load(path, torch.cuda.current_device()))
    assert result.identical, result
