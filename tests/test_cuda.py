"""Trials on a CUDA device: on a fake one and, where there is one, on a real one."""

import statistics
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from fake_cuda import GIB, MIB, PER_SAMPLE, SEGMENT, FakeMemory, Hungry, a_device, a_step, raise_it, state_of

from autobatch.devices.cuda import CudaMemory
from autobatch.devices.timing import Timing
from autobatch.trial import Verdict
from autobatch.workload.step import TrainingStep


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def memory(request):
    if request.param == "fake":
        return FakeMemory()
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return CudaMemory(0)


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


def test_a_step_is_timed_again_and_again_after_a_warm_up(memory):
    device, step = a_device(memory), a_step(memory)
    made = []
    counted = replace(step, make_batch=lambda n: made.append(n) or step.make_batch(n))
    before = state_of(step)
    with device.trials(counted, device.limit_bytes) as run:
        trial = run((4, 4, 3), timing=Timing(steps=4))
        tight = run((4, 4, 3))
    assert trial.fits and trial.micro_batch_sizes == (4, 4, 3)
    assert len(trial.repeated_seconds) == 4 and min(trial.repeated_seconds) > 0
    assert trial.step_seconds == statistics.median(trial.repeated_seconds)
    assert trial.samples == 4 * 11
    assert made[:2] == [4, 3]  # each size once: the GPU is not to wait for batches
    assert abs(trial.peak_bytes - tight.peak_bytes) < PER_SAMPLE
    assert state_of(step) == before


def test_running_out_while_being_timed_is_a_verdict(memory):
    device, step = a_device(memory), a_step(memory)
    with device.trials(step, device.limit_bytes) as run:
        trial = run((10000,), timing=Timing())
    assert trial.verdict is Verdict.OUT_OF_MEMORY
    assert trial.repeated_seconds == ()
