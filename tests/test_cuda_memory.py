"""How much of a GPU's memory a step may take, and which bytes are its own."""

import pytest
from fake_cuda import CONTEXT, GIB, MIB, PER_SAMPLE, FakeMemory, a_device, a_step, raise_it

from autobatch.devices.cuda import CudaDevice
from autobatch.devices.nvml import GpuReading
from autobatch.errors import DeviceUnavailable


def test_reserved_and_allocated_bytes_are_told_apart():
    memory = FakeMemory()
    device = a_device(memory)
    step = a_step(memory)
    with device.trials(step, device.limit_bytes) as run:
        trial = run((2, 5))
    assert trial.peak_allocated_bytes == 5 * PER_SAMPLE
    assert trial.peak_reserved_bytes == (2 + 5) * 64 * MIB  # the smaller one's segment stays
    assert trial.peak_bytes == CONTEXT + trial.peak_reserved_bytes
    assert trial.turn_bytes == CONTEXT + 5 * PER_SAMPLE
    gradients = sum(p.numel() * p.element_size() for p in step.model.parameters())
    assert trial.rest_bytes == CONTEXT + gradients


def test_the_limit_is_what_others_leave():
    memory = FakeMemory(others=GIB)
    device = a_device(memory)
    assert device.limit_bytes == 3 * GIB
    assert "1 other process holds 1.00 GiB" in device.warnings[0]
    assert a_device(memory, memory_limit=2 * GIB).limit_bytes == 2 * GIB
    more = a_device(memory, memory_limit=8 * GIB)
    assert more.limit_bytes == 3 * GIB
    assert any("memory_limit is 8.00 GiB" in warning and "3.00 GiB" in warning for warning in more.warnings)


def test_the_limit_that_the_caller_has_set_is_kept_to():
    memory = FakeMemory()
    memory.share = 0.5
    device = a_device(memory)
    assert device.limit_bytes == 2 * GIB + CONTEXT


@pytest.mark.parametrize("per_process", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_the_context_is_counted_and_what_others_and_the_driver_hold_is_not(per_process, old):
    memory = FakeMemory(others=GIB)
    device = CudaDevice(memory=memory, ask_driver=memory.driver(per_process, old))
    assert device.limit_bytes == 3 * GIB
    with device.trials(a_step(memory), device.limit_bytes) as run:
        trial = run((2, 2))
    assert trial.peak_bytes == CONTEXT + trial.peak_reserved_bytes


def test_a_context_that_grows_leaves_less_for_tensors():
    memory = FakeMemory()

    def load_kernels():
        memory.context = 2 * CONTEXT

    shares = []
    memory.set_fraction = lambda share: (shares.append(share), FakeMemory.set_fraction(memory, share))
    device = a_device(memory, memory_limit=2 * GIB)
    with device.trials(a_step(memory, {"forward": load_kernels}), device.limit_bytes) as run:
        trial = run((2, 2))
    assert trial.peak_bytes == 2 * CONTEXT + trial.peak_reserved_bytes
    assert shares == [1.5 / 4, 1.0 / 4, 1.0]


def test_without_a_driver_to_ask_all_that_is_in_use_counts_and_it_is_said():
    memory = FakeMemory(others=GIB, initialised=True)
    silent = GpuReading(warnings=("NVML is not available (no library): unknown.",))
    device = CudaDevice(memory=memory, ask_driver=lambda uuid, bus: silent, memory_limit=3 * GIB)
    assert device.limit_bytes == 3 * GIB
    assert device.warnings[0] == "NVML is not available (no library): unknown."
    assert "counts against the memory limit" in device.warnings[1]
    with device.trials(a_step(memory), device.limit_bytes) as run:
        assert run((2, 2)).peak_bytes >= GIB + CONTEXT


def test_windows_subsystem_and_partitioned_gpus_are_warned_about(monkeypatch):
    monkeypatch.setattr("platform.release", lambda: "5.15.90.1-microsoft-standard-WSL2")
    device = CudaDevice(memory=FakeMemory(), ask_driver=lambda uuid, bus: GpuReading(mig=True))
    assert "MIG" in device.warnings[0]
    assert "WSL" in device.warnings[1]


def test_the_device_is_described():
    memory = FakeMemory()
    info = a_device(memory).info
    assert (info.type, info.name, info.total_bytes, info.index) == ("cuda", "Fake GPU", 4 * GIB, 0)
    assert (info.uuid, info.driver, info.capability, info.mig) == ("GPU-1111", "580", "9.0", False)
    assert info.free_bytes == 4 * GIB - CONTEXT


def test_a_device_that_is_not_there_is_a_clear_error():
    with pytest.raises(DeviceUnavailable, match="cuda:99 is not there"):
        CudaDevice(99)


def test_a_device_that_cannot_be_opened_is_a_clear_error(monkeypatch):
    memory = FakeMemory()
    monkeypatch.setattr(memory, "free_and_total", raise_it(RuntimeError("CUDA error: out of memory\nmore")))
    with pytest.raises(DeviceUnavailable, match=r"cannot be used: CUDA error: out of memory\. Another"):
        CudaDevice(memory=memory, ask_driver=lambda uuid, bus: GpuReading())
