"""What can go wrong on a GPU, and only a fake one can be made to do."""

import pytest
import torch
from fake_cuda import CONTEXT, GIB, POISON, FakeMemory, a_device, a_step, raise_it, state_of

from autobatch.errors import DevicePoisoned, NothingFits
from autobatch.trial import Verdict
from autobatch.workload.step import TrainingStep


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
