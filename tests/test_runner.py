"""Training steps as training runs them."""

import pytest
import torch
from torch import nn

from autobatch.errors import InvalidInput
from autobatch.workload.runner import StepRunner
from autobatch.workload.step import TrainingStep


def step_of(compute_loss=lambda model, batch: model(batch).mean(), model=None, optimizer=torch.optim.AdamW, **fields):
    return TrainingStep(model or nn.Linear(4, 2), lambda n: torch.ones(n, 4), compute_loss, optimizer, **fields)


@pytest.mark.parametrize("scale", [1.0, 1e6, float("nan")])
def test_the_optimizers_state_is_there_also_where_fp16_would_skip_the_step(scale):
    runner = StepRunner(step_of(lambda model, batch: (model(batch) * scale).mean(), precision="fp16"))
    runner.run((2, 2))
    assert all("exp_avg" in state for state in runner.optimizer.state.values())
    assert len(runner.optimizer.state) == 2


def test_uneven_micro_batches_make_the_gradient_of_all_samples():
    inputs = iter(torch.arange(5.0).view(5, 1).split([3, 2]))
    step = TrainingStep(
        nn.Linear(1, 1), lambda n: next(inputs), lambda m, b: m(b).mean(), lambda p: torch.optim.SGD(p, 1.0)
    )
    weight = step.model.weight.item()
    StepRunner(step).run((3, 2))
    assert weight - step.model.weight.item() == pytest.approx(2.0)  # the mean of 0 … 4


def test_gradients_are_held_between_micro_batches_and_none_outside():
    seen = []

    def compute_loss(model, batch):
        seen.append(model.weight.grad is not None)
        return model(batch).mean()

    runner = StepRunner(step_of(compute_loss))
    runner.run((2, 2))
    assert seen == [False, True]
    assert runner.step.model.weight.grad is None


def test_a_model_in_eval_mode_is_trained_but_single_frozen_layers_stay_so():
    whole = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval()
    StepRunner(step_of(model=whole))
    assert whole.training
    assert whole[1].training
    part = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval())
    StepRunner(step_of(model=part))
    assert not part[1].training


def test_a_loss_of_one_element_is_a_scalar():
    assert StepRunner(step_of(lambda model, batch: model(batch).mean().view(1))).run((2,)) is not None


@pytest.mark.parametrize(
    ("compute_loss", "complaint"),
    [
        (lambda model, batch: None, "is NoneType"),
        (lambda model, batch: model(batch), r"has the shape \(2, 2\)"),
        (lambda model, batch: model(batch).detach().mean(), "does not depend on any trainable parameter"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_a_clear_error(compute_loss, complaint):
    with pytest.raises(InvalidInput, match=complaint):
        StepRunner(step_of(compute_loss)).run((2,))


@pytest.mark.parametrize(
    ("optimizer", "complaint"), [(lambda p: None, "made NoneType"), (torch.optim.LBFGS, "LBFGS runs the model")]
)
def test_an_optimizer_that_cannot_be_used_is_a_clear_error(optimizer, complaint):
    with pytest.raises(InvalidInput, match=complaint):
        StepRunner(step_of(optimizer=optimizer))


def test_lazy_layers_are_a_clear_error():
    with pytest.raises(InvalidInput, match="run it once"):
        StepRunner(step_of(model=nn.LazyLinear(3)))
