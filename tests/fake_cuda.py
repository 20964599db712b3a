"""A CUDA device's memory that is not there, and training steps that take as much of it as they say."""

import os
import time
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from autobatch.devices.cuda import CudaDevice
from autobatch.devices.nvml import GpuProcess, GpuReading
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

    def seconds_of(self, work):
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

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


def a_device(memory, **options):
    if isinstance(memory, FakeMemory):
        return CudaDevice(memory=memory, ask_driver=memory.driver(), **{"predictions": None} | options)
    return CudaDevice(**options)
