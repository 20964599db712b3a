"""Traces kept for the next time."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import autobatch
from autobatch import cache
from autobatch.prediction import tracing
from autobatch.prediction.tracing import traced
from autobatch.workload import Workload, resolve


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model(width=32):
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))


def traces_of(monkeypatch):
    """Counts the processes that are started to trace."""
    started = []
    start = tracing.Child
    monkeypatch.setattr(tracing, "Child", lambda name: started.append(name) or start(name))
    return started


def trace_of(workload, capability=(8, 0)):
    with traced(resolve(workload), capability) as steps:
        return steps.of_sizes((7, 7))


def test_the_same_step_is_traced_once(own, monkeypatch):
    started = traces_of(monkeypatch)
    assert trace_of(Workload(model())) == trace_of(Workload(model()))
    assert len(started) == 1  # other weights of the same shapes take no other memory


@pytest.mark.parametrize(
    "other",
    [
        lambda: Workload(model(48)),
        lambda: Workload(model(), precision="bf16"),
        lambda: Workload(model(), optimizer=torch.optim.Adagrad),
        lambda: Workload(model(), loss=nn.L1Loss(), data=(torch.ones(4, 16), torch.ones(4, 4))),
        lambda: Workload(model().requires_grad_(False).append(nn.Linear(4, 4))),
    ],
)
def test_another_step_is_traced_itself(own, monkeypatch, other):
    trace_of(Workload(model()))
    started = traces_of(monkeypatch)
    trace_of(other())
    assert len(started) == 1


def test_code_that_has_changed_is_traced_again(own, monkeypatch, tmp_path):
    file = tmp_path / "layers_of_mine.py"
    file.write_text("from torch import nn\nclass Mine(nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import layers_of_mine

    started = traces_of(monkeypatch)
    trace_of(Workload(layers_of_mine.Mine(4, 4)))
    trace_of(Workload(layers_of_mine.Mine(4, 4)))
    assert len(started) == 1
    file.write_text(file.read_text().replace("pass", "def forward(self, x):\n        return super().forward(x).exp()"))
    trace_of(Workload(layers_of_mine.Mine(4, 4)))
    assert len(started) == 2


def test_an_answer_of_another_autobatch_does_not_count(monkeypatch):
    before = cache.key_of("a question")
    assert cache.key_of("a question") == before
    monkeypatch.setattr(cache, "_own_code", lambda: ("cache.py 5 5",))
    assert cache.key_of("a question") != before


def test_what_is_kept_of_a_trace_and_damaged_is_traced_again(own):
    whole = trace_of(Workload(model()))
    (kept,) = own.iterdir()
    for damaged in (b"", b"no pickle", kept.read_bytes()[:100]):
        kept.write_bytes(damaged)
        assert trace_of(Workload(model())) == whole


def test_what_cannot_be_kept_is_worked_out_again(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOBATCH_CACHE", str(tmp_path / "a file"))
    (tmp_path / "a file").write_text("in the way")
    assert autobatch.estimate(model(), 8, device="t4").fits


def test_the_least_used_goes_first(own, monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 25)
    for name in "abc":
        cache.save(name, pickle.dumps(None) + bytes(6))
        if name == "b":
            assert cache.load("a") is not None
    assert cache.load("b") is None
    assert cache.load("a") is not None and cache.load("c") is not None


IN_A_NEW_PROCESS = """
import sys
from torch import nn
from autobatch.prediction import tracing
from autobatch.workload import Workload, resolve
from torch.library import custom_op

class Own(nn.Linear):
    pass

def make(parameters):
    from late import make  # not imported when the step was described
    return make(parameters)

tracing.claim_this_process()
traced_here = []
trace_here = tracing.tracer_of
tracing.tracer_of = lambda *a: traced_here.append(1) or trace_here(*a)
optimizer = make if "late" in sys.argv else None
with tracing.traced(resolve(Workload(nn.Sequential(Own(16, 8), nn.ReLU()), optimizer=optimizer))) as steps:
    print(len(traced_here), sum(steps.of_sizes((7, 7)).sizes))
"""


def traced_in_a_new_process(folder, *arguments, seed):
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_another_process_finds_the_trace_whatever_its_hash_seed(own, tmp_path):
    first, second = (traced_in_a_new_process(tmp_path, seed=seed) for seed in (1, 2))
    assert (first[0], second[0]) == (1, 0)
    assert first[1] == second[1]


def test_code_that_is_imported_only_while_it_is_traced_is_never_out_of_date(own, tmp_path):
    late = tmp_path / "late.py"
    late.write_text("import torch\ndef make(p): return torch.optim.SGD(p, 0.1)\n")
    sgd = traced_in_a_new_process(tmp_path, "late", seed=1)
    late.write_text("import torch\ndef make(p): return torch.optim.AdamW(p, 0.1)\n")
    adam = traced_in_a_new_process(tmp_path, "late", seed=1)
    assert adam[1] > sgd[1]
