"""Traces made in a process beside the caller's."""

import resource

import pytest
import torch
from torch import nn

from autobatch.errors import WorkloadNotPortable
from autobatch.prediction.replay import replay, smallest_capacity
from autobatch.prediction.trace import Category, NotAffine
from autobatch.prediction.tracing import trace
from autobatch.workload import Workload, resolve

GIB = 1 << 30


def total(step, category):
    alive = step.alive_at(len(step.events))
    return sum(step.sizes[i] for i in alive if step.sites[i].category is category)


def test_one_trace_gives_every_batch_size_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    line = trace(resolve(Workload(model)))
    peaks = {n: replay(line.at(n)) for n in (64, 128, 4096, 8192)}
    saved = 4 * (64 + 2 * 512 + 8)  # inputs, both sides of GELU, and outputs, of each sample
    for n in (64, 4096):
        grown = peaks[2 * n].peak_allocated_bytes - peaks[n].peak_allocated_bytes
        assert n * saved <= grown + 3 * n * 4 * 512 and grown <= n * (saved + 3 * 4 * 512)
    assert smallest_capacity(line.at(4096)) <= peaks[4096].peak_reserved_bytes
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert total(line.at(7), Category.PARAMETER) == weights
    assert total(line.at(7), Category.OPTIMIZER_STATE) == 2 * weights
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_parameters_take_no_memory():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(16384, 16384, bias=False) for _ in range(8)))
    model.to_empty(device="cpu")  # 8 GiB that are never touched
    step = resolve(Workload(model, data=lambda n: (torch.ones(n, 16384),) * 2, loss=nn.functional.mse_loss))
    line = trace(step)
    assert total(line.at(1), Category.PARAMETER) == 8 * GIB
    assert replay(line.at(1)).peak_allocated_bytes > 8 * 4 * GIB  # gradients and AdamW's two moments
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 3 * GIB


def test_what_cannot_be_traced_is_an_error_with_the_line():
    class Looks(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else x

    step = resolve(Workload(Looks(4, 4), data=lambda n: (torch.ones(n, 4),) * 2, loss=nn.functional.mse_loss))
    with pytest.raises(WorkloadNotPortable, match=r"x\.sum\(\)\.item\(\)(.|\n)*_local_scalar_dense"):
        trace(step)


def test_a_step_that_does_not_grow_evenly_is_no_line():
    def gram(model, batch):
        out = model(batch)
        return (out @ out.T).sum()  # n by n

    step = resolve(Workload(nn.Linear(4, 4), data=lambda n: torch.ones(n, 4), training_step=gram))
    with pytest.raises(NotAffine, match=r"do not grow evenly with the batch, the first made by aten\.mm\.default"):
        trace(step)
