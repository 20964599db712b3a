"""BatchNorm's running statistics under accumulation."""

import copy

import pytest
import torch
from plans import plan_of
from stepping import Kept
from torch import nn

pytestmark = pytest.mark.usefixtures("float64")


def test_running_means_move_as_over_the_whole_batch():
    batch = torch.randn(20, 3, 4) + 2
    for momentum in (0.1, None, 1.0):
        model = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum), nn.Flatten(), nn.Linear(12, 1))
        twin = copy.deepcopy(model)
        stepper = plan_of(20, 7).stepper(
            model, torch.optim.SGD(model.parameters(), lr=0.0), training_step=lambda m, b: m(b).mean(), reduction="mean"
        )
        for _ in range(3):
            stepper.step(batch)
            twin(batch)
        ours, theirs = model[0], twin[0]
        assert torch.allclose(ours.running_mean, theirs.running_mean, rtol=1e-12)
        # The micro-batches' own means lie apart, which their variances do not show.
        assert torch.allclose(ours.running_var, theirs.running_var, rtol=0.2)
        assert ours.num_batches_tracked == theirs.num_batches_tracked
        assert ours.momentum == momentum


def test_a_step_that_fails_counts_as_one_at_most():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 1))

    def step(model, batch):
        loss = model(batch).mean()
        if failing:
            raise LookupError
        return loss

    stepper = plan_of(8, 2).stepper(model, Kept(model.parameters()), training_step=step, reduction="mean")
    for failing in (True, False):
        try:
            stepper.step(torch.randn(8, 3))
        except LookupError:
            assert failing
        assert model[0].momentum is None
    assert int(model[0].num_batches_tracked) <= 2


def test_frozen_batch_norm_stays_as_it_is():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[0].eval()
    before = copy.deepcopy(model[0].state_dict())
    stepper = plan_of(9, 4).stepper(
        model, torch.optim.SGD(model[1].parameters()), training_step=lambda m, b: m(b).mean(), reduction="mean"
    )
    stepper.step(torch.randn(9, 3))
    assert all(torch.equal(before[name], value) for name, value in model[0].state_dict().items())


def test_compiled_models_have_one_momentum_for_all_micro_batches():
    seen = []
    layer = nn.BatchNorm1d(3, momentum=0.19)
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(module.momentum))
    model = torch.compile(nn.Sequential(layer, nn.Linear(3, 1)), backend="eager")
    stepper = plan_of(8, 4).stepper(
        model, Kept(model.parameters(), lr=0.0), training_step=lambda m, b: m(b).mean(), reduction="mean"
    )
    stepper.step(torch.randn(8, 3))
    assert len(set(seen)) == 1 and seen[0] == pytest.approx(0.1)
    assert layer.momentum == 0.19
