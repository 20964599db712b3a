import os
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autobatch.devices.cuda import CudaDevice, CudaMemory
from autobatch.devices.nvml import GpuProcess, GpuReading
from autobatch.errors import DevicePoisoned, DeviceUnavailable, NothingFits
from autobatch.plan import Verdict
from autobatch.workload.step import TrainingStep

MIB, GIB = 1024**2, 1024**3
PER_SAMPLE = 64 * MIB - 100
SEGMENT = 2 * MIB
"""The allocator reserves whole segments."""
CONTEXT = 512 * MIB
DRIVERS_OWN = 600 * MIB
"""What the driver keeps for itself, and CUDA does not count in the device's total."""
POISON = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"


@dataclass
class Segment:
    """What the allocator has reserved for one allocation, and keeps when that is freed."""

    reserved: int
    allocated: int
    owner: weakref.ref

    @property
    def live_bytes(self):
        return self.allocated if self.owner() is not None else 0


class FakeMemory:
    """A GPU of 4 GiB whose tensors lie on the CPU: models `take` bytes of it, as they would of a real one."""

    def __init__(self, total=4 * GIB, others=0, initialised=False):
        self.device = torch.device("cpu", 0)  # "cpu" is elsewhere: models are swapped onto it, as onto a GPU
        self.total, self.others = total, others
        self.context = CONTEXT if initialised else 0
        self.initialised = initialised
        self.highest_allocated = self.highest_reserved = self.taken_retries = 0
        self.share = 1.0
        self.segments = []
        self.poisoned = False

    def take(self, size, owner):
        """Allocate bytes for as long as `owner` is alive, in a free segment of that size or a new one."""
        needed = -(-size // SEGMENT) * SEGMENT
        segment = next((s for s in self.segments if s.reserved == needed and not s.live_bytes), None)
        if segment is None:
            if self.reserved() + needed > min(self.share * self.total, self.total - self.others - self.context):
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size / MIB:.2f} MiB. GPU 0 has")
            segment = Segment(needed, 0, weakref.ref(owner))
            self.segments.append(segment)
        segment.allocated, segment.owner = size, weakref.ref(owner)
        self.highest_allocated = max(self.highest_allocated, self.allocated())
        self.highest_reserved = max(self.highest_reserved, self.reserved())

    def has_context(self):
        return self.initialised

    def properties(self):
        bus = {"pci_domain_id": 0, "pci_bus_id": 0x3B, "pci_device_id": 0}
        return SimpleNamespace(name="Fake GPU", uuid="1111", major=9, minor=0, **bus)

    def free_and_total(self):
        self.context = self.context or CONTEXT
        return self.total - self.others - self.context - self.reserved(), self.total

    def allocated(self):
        return sum(segment.live_bytes for segment in self.segments)

    def reserved(self):
        return sum(segment.reserved for segment in self.segments)

    def peak_allocated(self):
        return self.highest_allocated

    def peak_reserved(self):
        return self.highest_reserved

    def reset_peaks(self):
        self.highest_allocated, self.highest_reserved = self.allocated(), self.reserved()

    def retries(self):
        return self.taken_retries

    def fraction(self):
        return self.share

    def set_fraction(self, fraction):
        assert isinstance(fraction, float)
        self.share = fraction

    def release_cache(self):
        self.segments = [segment for segment in self.segments if segment.live_bytes]

    def synchronize(self):
        if self.poisoned:
            raise RuntimeError(POISON)

    def as_current(self):
        return nullcontext()

    def driver(self, per_process=True, old=False):
        """What NVML would say; an old one counts what it keeps for itself as used."""

        def read(uuid, bus):
            assert (uuid, bus) == ("1111", "00000000:3B:00.0")
            processes = [GpuProcess(1, self.others)] if self.others else []
            if self.context:
                processes.append(GpuProcess(os.getpid(), self.context + self.reserved()))
            used = self.others + self.context + self.reserved()
            return GpuReading(
                name="Fake GPU",
                uuid="GPU-1111",
                driver="580",
                mig=False,
                total_bytes=self.total + DRIVERS_OWN,
                free_bytes=self.total - used,
                used_bytes=used + DRIVERS_OWN if old else used,
                reserved_bytes=None if old else DRIVERS_OWN,
                processes=tuple(processes) if per_process else None,
            )

        return read


class Hungry(nn.Module):
    """Takes PER_SAMPLE bytes for each sample in its forward pass, and does `trouble` in the phase named."""

    def __init__(self, memory, trouble=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 1))
        self.memory, self.trouble = memory, trouble or {}

    def forward(self, x):
        activations = self.body(x)
        if isinstance(self.memory, FakeMemory):
            self.memory.take(len(x) * PER_SAMPLE, owner=activations)
        else:
            self.ballast = torch.empty(len(x) * PER_SAMPLE, dtype=torch.uint8, device=x.device)
        self.meet("forward")
        return Gate.apply(activations, self)

    def meet(self, phase):
        if phase in self.trouble:
            self.trouble[phase]()


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, model):
        ctx.model = model
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.model.meet("backward")
        return grad, None


class Momentum(torch.optim.SGD):
    model = None

    def step(self, closure=None):
        super().step(closure)
        if self.model is not None:
            self.model.meet("optimizer")


def a_step(memory, trouble=None, optimizer=None):
    """A training step whose model and optimizer have been trained already."""
    torch.manual_seed(0)
    model = Hungry(None, trouble)
    optimizer = optimizer or Momentum(model.parameters(), lr=0.1, momentum=0.9)
    model.body(torch.randn(4, 3)).sum().backward()
    if isinstance(optimizer, Momentum):
        optimizer.step()
        optimizer.model = model
    model.memory = memory

    def make_batch(n):
        model.meet("batch")
        return torch.randn(n, 3)

    return TrainingStep(model, make_batch, lambda model, batch: model(batch).square().mean(), optimizer)


def state_of(step):
    """Every bit of a step's model and optimizer, with addresses."""
    tensors = [*step.model.parameters(), *step.model.buffers(), *(p.grad for p in step.model.parameters())]
    if isinstance(step.optimizer, torch.optim.Optimizer):
        tensors += [v for s in step.optimizer.state.values() for v in s.values() if v is not None]
    bits = [(id(t), t.data_ptr(), str(t.device), t.detach().cpu().numpy().tobytes()) for t in tensors]
    return bits, torch.get_rng_state().tolist(), step.model.training, sorted(vars(step.model))


def raise_it(error):
    def trouble():
        raise error

    return trouble


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def memory(request):
    if request.param == "fake":
        return FakeMemory()
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return CudaMemory(0)


def a_device(memory, **options):
    if isinstance(memory, FakeMemory):
        return CudaDevice(memory=memory, ask_driver=memory.driver(), **{"predictions": None} | options)
    return CudaDevice(**options)


def test_a_trial_that_fits_says_what_it_took(memory):
    device, step = a_device(memory), a_step(memory)
    with device.trials(step, device.limit_bytes) as run:
        trial = run((2, 2))
    assert trial.verdict is Verdict.FITS
    assert trial.samples == 2 + 2 + 2
    assert 0 < trial.peak_allocated_bytes < trial.peak_reserved_bytes < trial.peak_bytes <= device.limit_bytes
    assert 0 < trial.turn_bytes <= trial.peak_bytes
    assert 0 < trial.step_seconds < trial.seconds


def test_more_samples_take_more(memory):
    device, step = a_device(memory), a_step(memory)
    with device.trials(step, device.limit_bytes) as run:
        small, large = run((2, 2)).peak_bytes, run((8, 8)).peak_bytes
        assert run((2, 2)).peak_bytes <= small + PER_SAMPLE // 2  # nothing stays behind between trials
    assert large - small >= 6 * PER_SAMPLE - SEGMENT


def test_a_peak_above_the_budget_does_not_fit(memory):
    device, step = a_device(memory), a_step(memory)
    with device.trials(step, device.limit_bytes) as run:
        peak = run((4, 4)).peak_bytes
    with device.trials(step, peak - PER_SAMPLE) as run:
        trial = run((4, 4))
    assert trial.verdict is Verdict.OVER_BUDGET
    assert trial.peak_bytes > peak - PER_SAMPLE


def test_the_memory_limit_makes_a_smaller_card_of_it(memory):
    roomy = a_device(memory)
    before = memory.fraction()
    step = a_step(memory)
    with roomy.trials(step, roomy.limit_bytes) as run:
        fitting = run((4, 4)).peak_bytes
    device = a_device(memory, memory_limit=fitting + PER_SAMPLE)
    assert device.limit_bytes == fitting + PER_SAMPLE
    with device.trials(step, device.limit_bytes) as run:
        assert run((4, 4)).verdict is Verdict.FITS
        trial = run((32, 32))
        assert trial.verdict is Verdict.OUT_OF_MEMORY
        assert trial.requested_bytes == pytest.approx(32 * PER_SAMPLE, rel=0.01)
        assert trial.peak_bytes is None
        assert "in the forward phase of the warm-up step" in trial.detail
        again = run((4, 4))
        assert again.verdict is Verdict.FITS
        assert again.peak_bytes <= fitting + PER_SAMPLE // 2  # nothing of the failed step is alive
    assert memory.fraction() == before


@pytest.mark.parametrize("ending", [None, KeyError, KeyboardInterrupt])
def test_everything_is_as_it_was_and_so_is_the_allocators_limit(memory, ending):
    step = a_step(memory, {"forward": raise_it(ending("x"))} if ending else None)
    before, fraction = state_of(step), memory.fraction()
    device = a_device(memory, memory_limit=3 * GIB)
    with pytest.raises(ending) if ending else nullcontext(), device.trials(step, device.limit_bytes) as run:
        run((4, 4))
        run((100, 100))
    assert state_of(step) == before
    assert memory.fraction() == fraction


@pytest.mark.parametrize("phase", ["batch", "forward", "backward", "optimizer"])
def test_running_out_in_any_phase_is_a_verdict_that_leaves_no_trace(memory, phase):
    step = a_step(memory, {phase: raise_it(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."))})
    before = state_of(step)
    device = a_device(memory)
    with device.trials(step, device.limit_bytes) as run:
        trial = run((4, 4))
        assert trial.verdict is Verdict.OUT_OF_MEMORY
        assert trial.requested_bytes == 2 * MIB
        assert f"in the {phase} phase" in trial.detail
        step.model.trouble.clear()
        assert run((4, 4)).verdict is Verdict.FITS
    assert state_of(step) == before


def test_running_out_within_the_optimizers_first_step_does_not_spoil_the_next_trial(memory):
    class Partial(torch.optim.AdamW):
        def _init_group(self, *args):
            super()._init_group(*args)
            for state in self.state.values():
                state.pop("exp_avg_sq")  # torn: the state was half made when memory ran out
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    model = Hungry(None)
    optimizer = Partial(model.parameters())
    step = a_step(memory, optimizer=optimizer)
    step = TrainingStep(step.model, step.make_batch, step.compute_loss, Partial(step.model.parameters()))
    device = a_device(memory)
    with device.trials(step, device.limit_bytes) as run:
        assert run((2, 2)).verdict is Verdict.OUT_OF_MEMORY
        assert not step.optimizer.state
        del Partial._init_group
        assert run((2, 2)).verdict is Verdict.FITS
    assert not step.optimizer.state


def test_an_oom_within_the_frameworks_own_error_is_still_one(memory):
    def trouble():
        raise ValueError("training failed") from torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB."
        )

    device = a_device(memory)
    with device.trials(a_step(memory, {"backward": trouble}), device.limit_bytes) as run:
        assert run((2, 2)).requested_bytes == 2 * GIB


def test_a_bug_of_the_model_is_raised_as_it_is_with_the_size_in_a_note(memory):
    bug = ValueError("out of memory slots in my replay buffer")
    device = a_device(memory)
    with (
        pytest.raises(ValueError, match="replay buffer") as caught,
        device.trials(a_step(memory, {"forward": raise_it(bug)}), device.limit_bytes) as run,
    ):
        run((3, 3))
    assert caught.value is bug
    assert bug.__notes__ == [
        "autobatch: raised in the forward phase of the warm-up step, with micro-batches of 3 samples."
    ]


def test_a_bug_is_a_bug_also_where_the_caller_is_handling_an_oom(memory):
    device = a_device(memory)
    step = a_step(memory, {"forward": raise_it(KeyError("labels"))})
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    except torch.OutOfMemoryError:
        with pytest.raises(KeyError), device.trials(step, device.limit_bytes) as run:
            run((3, 3))


def test_trials_run_with_gradients_wherever_fit_is_called(memory):
    device, step = a_device(memory), a_step(memory)
    with torch.no_grad():
        with device.trials(step, device.limit_bytes) as run:
            assert run((2,)).verdict is Verdict.FITS
        assert not torch.is_grad_enabled()


def test_the_larger_micro_batch_is_tried_last_where_gradients_are_held(memory):
    met = []
    step = a_step(memory)

    def compute_loss(model, batch):
        met.append((len(batch), model.body[0].weight.grad is not None))
        return model(batch).square().mean()

    step = TrainingStep(step.model, step.make_batch, compute_loss, step.optimizer)
    device = a_device(memory)
    with device.trials(step, device.limit_bytes) as run:
        assert run((2, 5)).samples == 5 + 2 + 5
    assert met == [(5, False), (2, False), (5, True)]


def test_a_single_micro_batch_is_tried_as_such(memory):
    device, step = a_device(memory), a_step(memory)
    with device.trials(step, device.limit_bytes) as run:
        assert run((5,)).samples == 10


def test_each_trial_meets_the_same_random_numbers(memory):
    seen = []
    step = a_step(memory)
    make_batch = step.make_batch
    step = TrainingStep(
        step.model, lambda n: seen.append(make_batch(n)) or seen[-1].clone(), step.compute_loss, step.optimizer
    )
    device = a_device(memory)
    with device.trials(step, device.limit_bytes) as run:
        run((2,))
        run((2,))
    assert torch.equal(seen[0], seen[2])


# What only a fake can be made to do.


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


def test_an_allocator_that_had_to_retry_does_not_fit():
    memory = FakeMemory()

    def retry():
        memory.taken_retries += 1

    device = a_device(memory)
    step = a_step(memory, {"backward": retry})
    with device.trials(step, device.limit_bytes) as run:
        trial = run((2, 2))
        assert trial.verdict is Verdict.OVER_BUDGET
        assert "3 times" in trial.detail
        step.model.trouble.clear()
        assert run((2, 2)).verdict is Verdict.FITS


def test_a_loss_that_is_not_a_number_is_said():
    memory = FakeMemory()
    step = a_step(memory)
    step = TrainingStep(step.model, step.make_batch, lambda m, b: m(b).sum() * float("nan"), step.optimizer)
    with a_device(memory).trials(step, 4 * GIB) as run:
        assert run((2, 2)).detail == "the loss is not a number"


def test_a_poisoned_device_stops_everything_and_says_so():
    memory = FakeMemory()
    poison = RuntimeError(POISON)
    step = a_step(memory, {"backward": raise_it(poison)})
    before = state_of(step)
    with (
        pytest.raises(DevicePoisoned, match="in the backward phase of the warm-up step") as caught,
        a_device(memory).trials(step, 4 * GIB) as run,
    ):
        run((2, 2))
    assert caught.value.__cause__ is poison
    assert state_of(step) == before


def test_a_poisoned_device_that_looked_like_a_lack_of_memory_is_found_out():
    memory = FakeMemory()

    def fail():
        memory.poisoned = True
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")

    with pytest.raises(DevicePoisoned), a_device(memory).trials(a_step(memory, {"forward": fail}), 4 * GIB) as run:
        run((2, 2))


def test_when_nothing_can_be_restored_the_first_poisoning_is_what_is_reported(monkeypatch):
    memory = FakeMemory()
    poison = RuntimeError(POISON)
    monkeypatch.setattr(memory, "set_fraction", lambda fraction: memory.synchronize())

    def fail():
        memory.poisoned = True
        raise poison

    step = a_step(memory, {"backward": fail})
    device = a_device(memory)
    with pytest.raises(DevicePoisoned, match="in the backward phase") as caught, device.trials(step, 4 * GIB) as run:
        run((2, 2))
    assert caught.value.__cause__ is poison


def test_a_model_that_does_not_fit_by_itself_is_nothing_fits(monkeypatch):
    memory = FakeMemory()
    device, step = a_device(memory), a_step(memory)
    before = state_of(step)
    real = torch.Tensor.to

    def to(self, *args, **kwargs):
        if args and args[0] == memory.device:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(NothingFits, match="the model alone") as caught, device.trials(step, GIB):
        pytest.fail("the block must not run")
    assert caught.value.needed_bytes > CONTEXT
    assert state_of(step) == before


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
