import functools
import random
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from autobatch.errors import InvalidInput
from autobatch.workload.state import preserved

ELSEWHERE = torch.device("cpu", 0)  # the same memory by another name: what lies on "cpu" is not on it


class Odd(nn.Module):
    """Everything that is awkward to put back, in one small model."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.weight_normed = parametrizations.weight_norm(nn.Linear(6, 6))
        self.spectral = parametrizations.spectral_norm(nn.Linear(6, 6))
        self.dropout = nn.Dropout(0.5)
        self.transposed = nn.Parameter(torch.randn(6, 6).t())
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0, 6))
        self.register_buffer("nan", torch.tensor([float("nan"), -0.0]))
        self.register_buffer("expanded", torch.zeros(1).expand(4))
        self.register_buffer("view", self.first.weight.detach()[2:])
        self.calls = 0
        self.history = []
        self.scratch = torch.zeros(3)
        self.hidden = [nn.Linear(6, 6)]
        self.generator = torch.Generator().manual_seed(3)
        self.norm.register_forward_hook(self._count)

    def _count(self, module, inputs, output):
        self.calls += 1

    def forward(self, x):
        self.history.append(len(self.history))
        self.scratch += 1
        self.nan.fill_(1)
        self.cache = torch.rand(2, generator=self.generator)
        self.first.register_forward_hook(lambda *_: None)
        x = self.norm(self.tied(self.first(x)))
        return self.spectral(self.weight_normed(self.dropout(x @ self.transposed + self.frozen))) + self.hidden[0](x)


def training(model, optimizer):
    """What training does to its objects, and worse."""
    model.train()
    for _ in range(2):
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(torch.randn(8, 6)).sum().backward()
    model.frozen.requires_grad_(True)
    model.first.weight.register_hook(lambda grad: grad)
    model.transposed.data = torch.zeros(6, 6)
    model.norm.register_buffer("late", torch.zeros(1))
    optimizer.param_groups[0]["lr"] = 7.0
    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    random.random(), np.random.rand()


def raw(tensor):
    return (tensor.dtype, tuple(tensor.shape), tensor.stride(), bytes(tensor.detach().cpu().untyped_storage()))


def fingerprint(model, optimizer):
    """Every bit that must survive, with the identity of every tensor."""
    modules = [*model.modules(), *model.hidden]
    tensors = [t for m in modules for t in [*m.parameters(), *m.buffers()]]
    return {
        "tensors": [(id(t), t.data_ptr(), raw(t), t.requires_grad, t.is_leaf) for t in tensors],
        "grads": [None if t.grad is None else (id(t.grad), raw(t.grad)) for t in tensors],
        "tensor hooks": [dict(t._backward_hooks or {}) for t in tensors],
        "attributes": [
            {k: sorted(map(str, v)) if isinstance(v, dict) else str(v) for k, v in vars(m).items()} for m in modules
        ],
        "scratch": raw(model.scratch),
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "params": [[id(p) for p in g["params"]] for g in optimizer.param_groups],
        "state": [
            (id(p), {k: (id(v), raw(v)) if isinstance(v, torch.Tensor) else v for k, v in state.items()})
            for p, state in optimizer.state.items()
        ],
        "random": (random.getstate(), [str(part) for part in np.random.get_state()], torch.get_rng_state().tolist()),
        "generator": model.generator.get_state().tolist(),
        "flags": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.cudnn.benchmark),
    }


@pytest.fixture(params=["new AdamW", "AdamW in mid-training", "SGD with momentum", "LBFGS-like lists"])
def objects(request):
    torch.manual_seed(0)
    model = Odd().eval()
    if request.param == "SGD with momentum":
        optimizer = torch.optim.SGD([*model.parameters(), *model.hidden[0].parameters()], lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if request.param != "new AdamW":
        model(torch.randn(8, 6)).sum().backward()
        optimizer.step()
        model(torch.randn(8, 6)).sum().backward()  # gradients are there
    if request.param == "LBFGS-like lists":
        optimizer.state[model.frozen]["history"] = [torch.ones(2)]
    return model, optimizer


@pytest.mark.parametrize("ending", [None, ValueError, MemoryError, KeyboardInterrupt])
def test_everything_is_bit_identical_afterwards(objects, ending):
    before = fingerprint(*objects)
    with pytest.raises(ending) if ending else nullcontext(), preserved(*objects):
        training(*objects)
        assert fingerprint(*objects) != before
        if ending:
            raise ending("in the middle")
    assert fingerprint(*objects) == before


def test_an_error_within_a_backward_pass_leaves_no_trace(objects):
    model, optimizer = objects
    before = fingerprint(model, optimizer)
    with pytest.raises(RuntimeError, match="second time"), preserved(model, optimizer):  # noqa: PT012
        loss = model(torch.randn(8, 6)).sum()
        loss.backward()
        loss.backward()
    assert fingerprint(model, optimizer) == before


def test_gradients_are_set_aside_meanwhile(objects):
    model, optimizer = objects
    with preserved(model, optimizer):
        assert all(p.grad is None for p in model.parameters())


def test_without_tensors_all_but_their_contents_is_kept(objects):
    model, optimizer = objects
    before = fingerprint(model, optimizer)
    with preserved(model, optimizer, tensors=False):
        training(model, optimizer)
    after = fingerprint(model, optimizer)
    assert after["random"] == before["random"]
    assert after["groups"] == before["groups"]
    assert [parameter for parameter, _ in after["state"]] == [parameter for parameter, _ in before["state"]]
    assert after["tensor hooks"] == before["tensor hooks"]
    assert "late" not in dict(model.norm.named_buffers())
    assert model.calls == int(before["attributes"][0]["calls"])
    assert not model.training


def test_a_model_that_is_elsewhere_is_swapped_there_and_back_untouched():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LSTM(4, 2))
    model[0].weight.grad = torch.ones(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    held = [*model.parameters(), *model.buffers(), model[0].weight.grad]
    held += [v for state in optimizer.state.values() for v in state.values()]
    before = [(id(t), t.data_ptr(), raw(t)) for t in held]
    with preserved(model, optimizer, device=ELSEWHERE):
        there = [*model.parameters(), *model.buffers(), optimizer.state[model[0].weight]["exp_avg"]]
        assert not {t.data_ptr() for t in there} & {address for _, address, _ in before}
        assert optimizer.state[model[0].weight]["step"].data_ptr() in {address for _, address, _ in before}
        model(torch.randn(5, 3))[0].sum().backward()
        optimizer.step()
    assert [(id(t), t.data_ptr(), raw(t)) for t in held] == before
    assert model[0].weight.grad is held[len([*model.parameters(), *model.buffers()])]


def test_running_out_while_the_model_moves_leaves_everything_as_it_was(monkeypatch):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    before = [(t.device, t.data_ptr()) for t in model.parameters()]
    real, moves = torch.Tensor.to, iter(range(3))

    def to(self, *args, **kwargs):
        if next(moves, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError), preserved(model, device=ELSEWHERE):
        pytest.fail("the block must not run")
    assert [(t.device, t.data_ptr()) for t in model.parameters()] == before


def test_objects_are_found_where_training_code_holds_them():
    class Trainer:
        def __init__(self):
            self.teacher = nn.Linear(2, 2)

        def step(self, model, batch):
            return model(batch)

    trainer, criterion, partial_held = Trainer(), nn.BatchNorm1d(2), nn.Linear(2, 2)
    loader = torch.utils.data.DataLoader(range(4), shuffle=True, generator=torch.Generator().manual_seed(1))

    def loss(model, batch):
        return criterion(model(batch))

    held = [trainer.teacher.weight, criterion.running_mean, partial_held.weight, GLOBAL_MODULE.weight]
    before = [raw(t) for t in held], loader.generator.get_state().tolist()
    with torch.no_grad(), preserved(trainer.step, loss, functools.partial(print, partial_held), uses_a_global, loader):
        for tensor in held:
            tensor.add_(1)
        list(loader)
    assert ([raw(t) for t in held], loader.generator.get_state().tolist()) == before


GLOBAL_MODULE = nn.Linear(2, 2)


def uses_a_global(model, batch):
    return GLOBAL_MODULE(model(batch))


def test_memory_that_two_tensors_share_is_shared_again():
    model = nn.Linear(4, 4)
    model.alias = nn.Parameter(model.weight.data[:2])
    with torch.no_grad(), preserved(model):
        model.weight.zero_()
        model.alias.data = torch.ones(2, 4)
    with torch.no_grad():
        model.weight.fill_(5)
    assert bool((model.alias == 5).all())


def test_a_buffer_written_to_within_a_graph_is_a_leaf_again():
    model = nn.BatchNorm1d(3)
    weight = torch.ones(3, requires_grad=True)
    with preserved(model):
        model.running_mean.mul_(weight)
        assert not model.running_mean.is_leaf
    assert model.running_mean.is_leaf
    assert not model.running_mean.requires_grad


def test_a_wrapping_tensor_subclass_is_kept_in_place_and_refused_elsewhere():
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Module()
    inner = torch.ones(2), torch.zeros(2)
    model.weight = nn.Parameter(TwoTensor(*inner))
    with preserved(model):
        inner[0].fill_(9)
    assert inner[0].tolist() == [1, 1]
    with pytest.raises(InvalidInput, match="Move the model there first"), preserved(model, device=ELSEWHERE):
        pytest.fail("the block must not run")


def test_sparse_buffers_are_kept():
    model = nn.Module()
    model.register_buffer("mask", torch.eye(3).to_sparse())
    with preserved(model):
        model.mask.mul_(4)
    assert torch.equal(model.mask.to_dense(), torch.eye(3))


def test_random_state_is_kept_in_every_generator():
    own, numpy_own, python_own = torch.Generator(), np.random.default_rng(0), random.Random(0)

    def sampler():
        return own, numpy_own, python_own

    def draw():
        return [
            random.random(),
            np.random.rand(),
            torch.rand(1).item(),
            torch.rand(1, generator=own).item(),
            numpy_own.random(),
            python_own.random(),
        ]

    with preserved(sampler, tensors=False):
        first = draw()
    with preserved(sampler, tensors=False):
        assert draw() == first


def test_the_cuda_context_is_not_created_to_keep_its_random_state(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("asked CUDA"))
    with preserved(tensors=False):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to itself")
def test_ctrl_c_while_restoring_waits_until_all_is_restored():
    model = nn.Linear(3, 3)
    before = raw(model.weight)

    calls = []

    class Generator(random.Random):
        def setstate(self, state):
            calls.append(state)
            signal.raise_signal(signal.SIGINT)
            super().setstate(state)

    stubborn = Generator(0)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), preserved(lambda: stubborn, model):  # noqa: PT012
        model.weight.zero_()
        stubborn.random()
        raise KeyboardInterrupt
    assert calls
    assert raw(model.weight) == before
    assert stubborn.random() == random.Random(0).random()


def test_it_works_outside_the_main_thread():
    model = nn.Linear(2, 2)
    before = raw(model.weight)

    def work():
        with torch.no_grad(), preserved(model):
            model.weight.zero_()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert raw(model.weight) == before


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_repeated_real_ctrl_c_restores_all():
    script = """
import os, signal, sys, threading, time, torch
from torch import nn
from autobatch.workload.state import preserved
model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(60)))
before = [p.detach().clone() for p in model.parameters()]
def press():
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.0002)
presser = threading.Thread(target=press)
try:
    with torch.no_grad(), preserved(model):
        for p in model.parameters():
            p.zero_()
        presser.start()
        time.sleep(5)
except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
presser.join()
print(all(torch.equal(a, b) for a, b in zip(before, model.parameters())))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.strip() == "True", result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("start", ["cpu", "cuda"])
def test_a_model_is_bit_identical_after_training_on_the_gpu(start):
    device = torch.device("cuda", 0)
    model = nn.LSTM(8, 8).to(start)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 2, 8, device=start))[0].sum().backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters())]
    held += [v for state in optimizer.state.values() for v in state.values()]
    before = [(id(t), t.device, raw(t)[3]) for t in held]
    random_state = torch.cuda.get_rng_state_all()
    with preserved(model, optimizer, device=device):
        for _ in range(3):
            model(torch.randn(3, 2, 8, device=device))[0].sum().backward()
            optimizer.step()
    assert [(id(t), t.device, raw(t)[3]) for t in held] == before
    assert all(torch.equal(a, b) for a, b in zip(random_state, torch.cuda.get_rng_state_all(), strict=True))
