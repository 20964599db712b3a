"""Traces made in a process beside the caller's."""

import importlib
import resource

import pytest
import torch
from torch import nn

from autobatch.errors import NotTraceable
from autobatch.prediction.replay import replay, smallest_capacity
from autobatch.prediction.trace import Category
from autobatch.prediction.tracing import traced
from autobatch.workload import Workload, resolve

GIB = 1 << 30


def total(trace, category):
    alive = trace.alive_at(len(trace.events))
    return sum(trace.sizes[i] for i in alive if trace.sites[i].category is category)


def test_one_trace_gives_every_batch_size_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with traced(resolve(Workload(model))) as steps:
        peaks = {n: replay(steps.of_sizes((n, n))) for n in (64, 128, 4096, 8192)}
        seven, many = steps.of_sizes((7, 7)), steps.of_sizes((4096, 4096))
    saved = 4 * (64 + 2 * 512 + 8)  # inputs, both sides of GELU, and outputs, of each sample
    for n in (64, 4096):
        grown = peaks[2 * n].peak_allocated_bytes - peaks[n].peak_allocated_bytes
        assert n * saved <= grown + 3 * n * 4 * 512 and grown <= n * (saved + 3 * 4 * 512)
    assert smallest_capacity(many) <= peaks[4096].peak_reserved_bytes
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert total(seven, Category.PARAMETER) == weights
    assert total(seven, Category.OPTIMIZER_STATE) == 2 * weights
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_an_earlier_micro_batch_are_held():
    model = nn.Linear(1000, 1000, bias=False)
    workload = Workload(model, optimizer=lambda p: torch.optim.SGD(p, 0.1, foreach=False))
    with traced(resolve(workload)) as steps:
        alone, again = replay(steps.of_sizes((300,))), replay(steps.of_sizes((300, 300)))
    # The new gradient is there before it is added to the old one.
    assert again.peak_allocated_bytes - alone.peak_allocated_bytes == pytest.approx(4 * 1000 * 1000, rel=0.01)


def test_parameters_take_no_memory():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(16384, 16384, bias=False) for _ in range(8)))
    model.to_empty(device="cpu")  # 8 GiB that are never touched
    step = resolve(Workload(model, data=lambda n: (torch.ones(n, 16384),) * 2, loss=nn.functional.mse_loss))
    with traced(step) as steps:
        trace = steps.of_sizes((1, 1))
    assert total(trace, Category.PARAMETER) == 8 * GIB
    assert replay(trace).peak_allocated_bytes > 8 * 4 * GIB  # gradients and AdamW's two moments
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 3 * GIB


class Looks(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2 if x.sum().item() > 0 else super().forward(x).exp()


def looking(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    return resolve(Workload(model, data=lambda n: (torch.ones(n, 4),) * 2, loss=nn.functional.mse_loss))


def test_a_step_that_looks_at_values_goes_the_way_of_real_ones():
    step = looking(Looks(4, 4))
    nn.init.ones_(step.model[0].weight)
    with traced(step) as steps:
        ran = {site.operator for site in steps.of_sizes((9,)).sites}
    assert "aten.mul.Tensor" in ran and "aten.exp.default" not in ran
    assert "aten._local_scalar_dense.default in 1" in steps.caveat and "test_tracing.py" in steps.caveat
    nn.init.constant_(step.model[0].weight, -1.0)
    nn.init.zeros_(step.model[0].bias)
    with traced(step) as steps:
        assert "aten.exp.default" in {site.operator for site in steps.of_sizes((9,)).sites}


def test_rows_that_a_mask_takes_are_counted():
    class Half(nn.Linear):
        def forward(self, x):
            kept = torch.arange(x.shape[0], device=x.device) % 1 == 0  # all of them
            return super().forward(x[kept])

    with traced(looking(Half(4, 4))) as steps:
        small, large = (replay(steps.of_sizes((n, n))).peak_allocated_bytes for n in (1 << 14, 1 << 15))
    assert large / small == pytest.approx(2, rel=0.1)


def test_what_depends_on_values_that_nobody_knows_is_an_error_with_operator_module_and_line():
    with torch.device("meta"):
        step = looking(Looks(4, 4))
    with pytest.raises(NotTraceable, match=r"depends on the values of tensors") as raised, traced(step):
        pass
    assert raised.value.operator == "aten._local_scalar_dense.default"
    assert raised.value.module == "1"
    assert raised.value.line.startswith(__file__)


CUSTOM = """
import torch
library = torch.library.Library("autobatch_test", "FRAGMENT")
library.define("twice(Tensor x) -> Tensor")
library.impl("twice", lambda x: 2 * x, "CPU")

class Custom(torch.nn.Linear):
    def forward(self, x):
        return torch.ops.autobatch_test.twice(super().forward(x))
"""


def test_an_operator_without_a_fake_kernel_is_an_error_that_says_what_to_register(tmp_path, monkeypatch):
    (tmp_path / "operators_of_mine.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    custom = importlib.import_module("operators_of_mine").Custom
    step = resolve(
        Workload(custom(4, 4), data=lambda n: torch.ones(n, 4), training_step=lambda model, x: model(x).sum())
    )
    with pytest.raises(NotTraceable, match=r'register_fake\("autobatch_test::twice"\)'), traced(step):
        pass


def test_a_step_that_does_not_grow_evenly_is_traced_at_each_size():
    def gram(model, batch):
        out = model(batch)
        return (out @ out.T).sum()  # n by n

    workload = Workload(
        nn.Linear(4, 4),
        data=lambda n: torch.ones(n, 4),
        training_step=gram,
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
    )
    with traced(resolve(workload)) as steps:
        assert "aten.mm.default in the step itself" in steps.uneven
        peaks = [replay(steps.of_sizes((n, n))).peak_allocated_bytes for n in (512, 1024, 2048)]
    assert peaks[2] / peaks[1] == pytest.approx(4, rel=0.05)
    assert peaks[1] / peaks[0] == pytest.approx(4, rel=0.1)


def test_code_that_goes_another_way_for_larger_batches_is_traced_at_each_size():
    def padded(model, batch):
        return model(nn.functional.pad(batch, (0, 0, 0, -len(batch) % 64))).sum()

    workload = Workload(nn.Linear(256, 4), data=lambda n: torch.ones(n, 256), training_step=padded)
    with traced(resolve(workload)) as steps:
        assert steps.uneven
        assert max(steps.of_sizes((65,)).allocated_bytes()) > 1.2 * max(steps.of_sizes((64,)).allocated_bytes())


def test_the_callers_choice_of_attention_counts():
    layer = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)
    step = resolve(Workload(layer, data=lambda n: (torch.ones(n, 64, 64),) * 2, loss=nn.functional.mse_loss))

    def saved():
        with traced(step) as steps:
            return max(steps.of_sizes((64,)).allocated_bytes())

    fused = saved()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert saved() > 1.1 * fused


def test_an_optimizer_of_the_users_own_keeps_its_attributes():
    class Mine(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            self.factor = 2

        def step(self):
            assert self.factor == 2
            return super().step()

    model = nn.Linear(4, 4)
    with traced(resolve(Workload(model, optimizer=Mine(model.parameters())))) as steps:
        assert steps.even is not None


def test_what_ends_the_process_or_cannot_be_followed_says_so():
    sparse = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(4, 1))
    data = (torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, 1))
    step = resolve(Workload(sparse, data=data, loss=nn.MSELoss(), optimizer=torch.optim.SGD))
    with pytest.raises(NotTraceable, match="sparse=False"), traced(step):
        pass
    refused = resolve(Workload(nn.Linear(4, 4), optimizer=lambda p: torch.optim.SGD(p, lr=-1.0)))
    with pytest.raises(NotTraceable, match="Invalid learning rate"), traced(refused):
        pass


def test_hooks_on_parameters_are_warned_of_and_those_on_modules_run():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: output.erfinv())
    step = resolve(Workload(model))
    with traced(step) as steps:
        assert any(site.operator == "aten.erfinv.default" for site in steps.of_sizes((9,)).sites)
        assert not steps.warnings
    model[0].weight.register_hook(lambda gradient: gradient * 2)
    model[1].bias.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    for _ in range(2):  # the second time it is known already
        with traced(step) as steps:
            (warning,) = steps.warnings
            assert "hooks on parameters (0.weight, 1.bias)" in warning
