"""How trials become an answer, with trials that are made up."""

import random
from statistics import mean

from torch import nn, optim

from autobatch.probing import Attempts, Question, probe
from autobatch.trial import Trial, Verdict
from autobatch.workload.step import TrainingStep
from benchmarks.fits import fitted

STEP = TrainingStep(nn.Linear(1, 1), lambda n: n, lambda model, batch: batch, optim.AdamW)


class Device:
    """One sample takes 10 bytes; a thorough trial, of the sizes in `growing`, 200 more."""

    def __init__(self, budget, growing=()):
        self.budget, self.growing, self.asked = budget, growing, []

    def __call__(self, sizes, thorough=False, timing=None):
        self.asked.append((sizes, thorough))
        peak = 100 + 10 * max(sizes) + 200 * (thorough and max(sizes) in self.growing)
        verdict = Verdict.FITS if peak <= self.budget else Verdict.OVER_BUDGET
        return Trial(micro_batch_sizes=sizes, verdict=verdict, peak_bytes=peak, samples=sum(sizes))


def answer(device, target, settled_bytes):
    attempt = Attempts(device, device.budget, lambda event: None, settled_bytes, jump_bytes=0)
    return probe(attempt, STEP, Question.checked(target, 0, 1, None, exact=False, per_rank=False)), attempt


def test_a_size_with_a_low_peak_needs_no_second_look():
    device = Device(budget=1000)
    found, attempt = answer(device, 88, settled_bytes=1000)
    assert (found.largest, found.sizes) == (88, (88,))
    assert [sizes for sizes, _ in device.asked].count((88,)) == 1
    assert 88 in attempt.sizes_confirmed


def test_near_the_limit_the_plans_own_sizes_get_a_thorough_look_and_no_second_trial():
    device = Device(budget=1000)
    found, attempt = answer(device, 301, settled_bytes=600)
    assert found.sizes == (76, 75, 75, 75)
    assert [asked for asked in device.asked if max(asked[0]) == 76] == [((75, 76), True)]
    assert {75, 76} <= attempt.sizes_confirmed
    assert 88 <= found.largest <= 90  # it fitted, and nothing has said otherwise


def test_where_a_thorough_look_fails_the_plan_takes_smaller_sizes():
    device = Device(budget=1000, growing=range(72, 100))
    found, attempt = answer(device, 300, settled_bytes=600)
    assert found.sizes == (60, 60, 60, 60, 60)
    assert found.largest < 75
    assert any(trial.micro_batch_size == 75 and not trial.fits for trial in attempt.trials)
    assert ((60, 60), True) in device.asked


def test_the_smallest_trial_is_the_one_that_failed():
    device = Device(budget=115, growing=(1,))
    found, attempt = answer(device, 2, settled_bytes=100)
    assert found is None
    assert not attempt.smallest.fits


def test_on_imagined_cpus_fits_push_about_twice_the_samples_of_an_optimizer_step():
    draw = random.Random(1)
    fits = [fitted(draw) for _ in range(400)]
    assert mean(pushed for _, _, pushed in fits) < 2.3
    assert mean(any(trial.verdict is Verdict.OUT_OF_MEMORY for trial in trials) for _, trials, _ in fits) < 0.3
