"""Operators of the user's own, on their way to a process that runs no script."""

import importlib
import io
import os
import subprocess
import sys

from autobatch.workload import ship

SCRIPT = """
import sys
import torch
from torch import nn

@torch.library.custom_op("mine_test::rows_twice", mutates_args=())
def rows_twice(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x]) * 3

@rows_twice.register_fake
def _(x):
    return x.new_empty(2 * x.shape[0], *x.shape[1:])

rows_twice.register_autograd(lambda ctx, gradient: 3 * gradient.view(2, -1, gradient.shape[-1]).sum(0))

class ByObject(nn.Linear):
    def forward(self, x):
        return rows_twice(super().forward(x))

class ByName(nn.Linear):
    def forward(self, x):
        return torch.ops.mine_test.rows_twice(super().forward(x))

if __name__ == "__main__":
    from autobatch.workload import ship
    with open(sys.argv[1], "wb") as stream:
        ship.dump([ByObject(4, 4), ByName(4, 4)], stream)
"""

RECEIVER = """
import gc, sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from autobatch.workload import ship
with open(sys.argv[1], "rb") as stream:
    models = ship.load(stream)
gc.collect()
for model in models:
    out = model(torch.ones(3, 4))
    assert out.shape == (6, 4) and torch.equal(out[:3], out[3:])
    out.sum().backward()
    assert torch.equal(model.bias.grad, torch.full((4,), 18.0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.ones(5, 4)).shape == (10, 4)
"""


def python(folder, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )


def check(done):
    assert done.returncode == 0, done.stderr


def path_first(code):
    return f"import sys; sys.path[:0] = {sys.path!r}\n{code}"


def test_operators_of_a_script_arrive_with_their_kernels_and_gradients(tmp_path):
    (tmp_path / "script.py").write_text(path_first(SCRIPT))
    check(python(tmp_path, "script.py", "sent"))
    check(python(tmp_path, "-c", path_first(RECEIVER), "sent"))


def test_operators_of_a_module_are_those_of_the_module(tmp_path, monkeypatch):
    (tmp_path / "rows_of_mine.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("rows_of_mine")
    stream = io.BytesIO()
    ship.dump(module.rows_twice, stream)
    assert b"rows_of_mine" in stream.getvalue() and b"new_empty" not in stream.getvalue()
    stream.seek(0)
    assert ship.load(stream) is module.rows_twice


DEFINED = """
import torch
from torch import nn
import autobatch

torch.library.define("mine_test::half", "(Tensor x) -> Tensor")
torch.library.impl("mine_test::half", "default", lambda x: x / 2)
torch.library.register_fake("mine_test::half", torch.empty_like)

class Net(nn.Linear):
    def forward(self, x):
        return torch.ops.mine_test.half(super().forward(x))

autobatch.estimate(Net(4, 4), 8, device="t4", data=lambda n: torch.ones(n, 4), training_step=lambda m, x: m(x).sum())
"""


def test_other_operators_of_a_script_are_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / "script.py").write_text(path_first(DEFINED))
    done = python(tmp_path, "script.py")
    assert "NotTraceable" in done.stderr and "mine_test::half is not there" in done.stderr
    assert "torch.library.custom_op" in done.stderr
