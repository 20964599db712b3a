"""Bugs of the user's own, met while a step is traced: raised as they are. Limits of tracing are not taken for them."""

import pytest
import torch
from torch import nn

import autobatch
from autobatch import NotTraceable, Workload
from autobatch.prediction.bugs import bugs_as_they_are
from autobatch.workload import resolve


class Unhappy(Exception):
    def __init__(self, shape, reason):  # does not survive pickling
        super().__init__(f"{reason}: {shape}")


def fails(model, batch):
    raise Unhappy(tuple(batch.shape), "no such shape")


def mismatched(model, batch):
    return model(batch[:, :3]).sum()


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Unhappy(tuple(gradient.shape), "backward")


def fails_backward(model, batch):
    return Backward.apply(model(batch)).sum()


def only_on_known_devices(model, batch):
    if batch.device.type not in ("cpu", "cuda"):
        raise ValueError(f"no kernel for {batch.device.type}")
    return model(batch).sum()


def workload(training_step, device="cpu", **options):
    with torch.device(device):
        model = nn.Linear(4, 4)
    return Workload(model, data=lambda n: torch.ones(n, 4), training_step=training_step, **options)


def test_a_bug_is_raised_by_estimates_and_plans_as_it_is_with_the_micro_batch_size():
    with pytest.raises(Unhappy, match=r"no such shape: \(2, 4\)") as raised:
        autobatch.estimate(workload(fails), 8, device="t4")
    assert "micro-batch of 2 samples" in raised.value.__notes__[-1]
    with pytest.raises(RuntimeError, match=r"\[2, 3\] X \[4, 4\]") as raised:
        autobatch.fit(workload(mismatched), 8, device="t4")
    assert "micro-batch of 2 samples" in raised.value.__notes__[-1]


def test_what_only_the_stand_in_for_the_gpu_runs_into_is_no_bug():
    with pytest.raises(NotTraceable, match="no kernel for sim"):
        autobatch.estimate(workload(only_on_known_devices), 8, device="t4")


def met(step, raised, samples=0):
    """A trace of the step ended with such an exception."""
    with bugs_as_they_are(resolve(step)):
        raise NotTraceable("it cannot be traced", raised=raised, samples=samples)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("step", "reason"), [(fails, "no such"), (fails_backward, "backward")])
def test_bugs_of_forward_and_backward_are_found_without_values(step, reason, device):
    with pytest.raises(Unhappy, match=rf"{reason}.*\(5, 4\)"):
        met(workload(step, device), "Unhappy", samples=5)


def test_bugs_of_the_data_and_of_the_optimizer_are_found():
    def batch(n):
        if n == 67:
            raise KeyError("sample 66")
        return torch.ones(n, 4)

    broken = Workload(nn.Linear(4, 4), data=batch, training_step=lambda model, x: model(x).sum())
    with pytest.raises(KeyError, match="sample 66"):
        met(broken, "KeyError", samples=67)
    refused = workload(lambda model, x: model(x).sum(), optimizer=lambda p: torch.optim.SGD(p, lr=-1.0))
    with pytest.raises(ValueError, match="Invalid learning rate"):
        met(refused, "ValueError")


def test_another_exception_on_the_cpu_or_one_about_values_decides_nothing():
    def looks(model, batch):
        return model(batch).sum() if batch.sum() > 0 else None

    for step, raised in ((fails, "RuntimeError"), (looks, "DataDependentOutputException"), (fails, "")):
        with pytest.raises(NotTraceable, match="cannot be traced"):
            met(workload(step), raised)


def test_bugs_under_autocast_are_those_of_autocast():
    def doubles(model, batch):  # of a type that autocast would not have
        out = model(batch)
        if out.dtype is torch.bfloat16:
            raise Unhappy(tuple(out.shape), "bf16")
        return out.sum()

    with pytest.raises(Unhappy):
        met(workload(doubles, precision="bf16"), "Unhappy")
    with pytest.raises(NotTraceable):
        met(workload(doubles), "Unhappy")
