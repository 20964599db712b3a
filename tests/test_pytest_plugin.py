"""The pytest plugin: estimates, limits and baselines in tests, blame in their failures."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch._dynamo  # noqa: F401  # whatever is first imported in a run inside this process is forgotten after it

import autobatch.regression.measuring
import autobatch.report.check  # noqa: F401

pytest_plugins = ["pytester"]

MODEL = """
import torch
from torch import nn
import pytest

class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.first, self.last = nn.Linear(32, width), nn.Linear(width, 4)

    def forward(self, x):
        return self.last(self.first(x).relu())

def batch(n):
    return torch.randn(n, 32), torch.randint(4, (n,))

arguments = {"device": "rtx-4090", "data": batch, "loss": nn.functional.cross_entropy}
"""
CHECK = (
    MODEL
    + """
def test_training(step_memory):
    step_memory.check(Net(WIDTH), batch_size=4096, **arguments)
"""
)


@pytest.fixture
def run(pytester: pytest.Pytester):
    installed = any(ep.value == "autobatch.pytest_plugin" for ep in importlib.metadata.entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "autobatch.pytest_plugin"]

    def run(source: str, *arguments: str, new_process: bool = False) -> pytest.RunResult:
        pytester.makepyfile(test_model=source)
        how = pytester.runpytest_subprocess if new_process else pytester.runpytest_inprocess
        return how(*plugin, "-p", "no:cacheprovider", *arguments)

    return run


def check(width: int) -> str:
    return CHECK.replace("WIDTH", str(width))


def test_the_fixture_gives_an_estimate(run) -> None:
    result = run(
        MODEL
        + """
def test_training(step_memory):
    estimate = step_memory(Net(), batch_size=4096, **arguments)
    assert 1e6 < estimate.peak < 64e6
    assert estimate.by_module.bytes > 0
"""
    )

    result.assert_outcomes(passed=1)


def test_a_step_within_its_limit_passes_and_one_over_it_says_what_is_there(run) -> None:
    result = run(
        MODEL
        + """
@pytest.mark.limit_step_memory("12 GiB", device="rtx-4090")
def test_enough(step_memory):
    step_memory(Net(), batch_size=16, data=batch, loss=nn.functional.cross_entropy)

@pytest.mark.limit_step_memory("100 MiB", device="rtx-4090")
def test_too_little(step_memory):
    step_memory(Net(), batch_size=4096, data=batch, loss=nn.functional.cross_entropy)
"""
    )

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*over its limit of 100.0 MiB*", "*What is there at the peak:*", "*first*aten*"])


@pytest.mark.parametrize(
    ("test", "told"),
    [
        ('@pytest.mark.limit_step_memory("1 GiB")\ndef test_it(): pass', "nothing was checked"),
        ('@pytest.mark.limit_step_memory("1 GiB")\ndef test_it(step_memory): pass', "nothing was checked"),
        ('@pytest.mark.limit_step_memory("much")\ndef test_it(step_memory): pass', "'much' is not an amount of memory"),
        ("@pytest.mark.limit_step_memory\ndef test_it(step_memory): pass", "missing 1 required positional argument"),
        ("def test_it(step_memory): step_memory(Net(), 8)", "say for which GPU"),
    ],
)
def test_a_test_that_would_check_nothing_does_not_pass(run, test: str, told: str) -> None:
    result = run(MODEL + test)

    assert result.ret != 0
    assert told in result.stdout.str() + result.stderr.str()


def test_a_marked_test_that_is_skipped_or_fails_says_only_that(run) -> None:
    result = run(
        MODEL
        + """
@pytest.mark.limit_step_memory("12 GiB", device="rtx-4090")
def test_skipped_inside(step_memory):
    pytest.skip("no data")

@pytest.mark.skip
@pytest.mark.limit_step_memory("12 GiB", device="rtx-4090")
def test_skipped():
    pass

@pytest.mark.limit_step_memory("12 GiB", device="rtx-4090")
def test_failing(step_memory):
    assert 1 == 2
"""
    )

    result.assert_outcomes(skipped=2, failed=1)
    result.stdout.no_fnmatch_line("*nothing was checked*")


def test_what_cannot_be_right_is_an_error(run, pytester: pytest.Pytester) -> None:
    twice = run(
        MODEL
        + """
def test_twice(step_memory):
    step_memory.check(Net(), 64, name="net", **arguments)
    step_memory.check(Net(), 128, name="net", **arguments)

def test_fails_later(step_memory):
    step_memory.check(Net(), 64, **arguments)
    assert False
""",
        "--autobatch-update",
    )
    twice.assert_outcomes(failed=2)
    twice.stdout.fnmatch_lines(["*two checks are called*"])
    assert not (pytester.path / ".autobatch").exists(), "failed tests are not remembered"

    assert run(check(64), "--autobatch-tolerance=much").ret == pytest.ExitCode.USAGE_ERROR
    nowhere = run(check(64), "--autobatch-update", "--autobatch-baseline=/proc/nowhere/x.json")
    assert nowhere.ret == pytest.ExitCode.USAGE_ERROR
    assert "cannot be written" in nowhere.stdout.str() + nowhere.stderr.str()


def test_a_baseline_of_a_later_version_is_left_alone(run, pytester: pytest.Pytester) -> None:
    file = pytester.path / ".autobatch/pytest.json"
    file.parent.mkdir()
    file.write_text('{"schema_version": 7, "cases": {}}')

    assert run(check(64), "--autobatch-update").ret == pytest.ExitCode.USAGE_ERROR
    assert file.read_text() == '{"schema_version": 7, "cases": {}}'


def test_a_baseline_is_written_then_held_to_and_more_is_blamed(run, pytester: pytest.Pytester) -> None:
    missing = run(check(64))
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*there is no baseline*pytest --autobatch-update*"])

    written = run(check(64), "--autobatch-update")
    written.assert_outcomes(passed=1)
    written.stdout.fnmatch_lines(["*Wrote what 1 check took to*pytest.json*"])
    first = (pytester.path / ".autobatch/pytest.json").read_text()

    run(check(64)).assert_outcomes(passed=1)

    worse = run(check(96), "--autobatch-tolerance=3%")
    worse.assert_outcomes(failed=1)
    worse.stdout.fnmatch_lines(
        ["*more than the baseline's; tolerated: 3%*", "*saved activation, larger*", "*test_model.py:1*"]
    )
    assert (pytester.path / ".autobatch/pytest.json").read_text() == first

    better = run(check(32))
    better.assert_outcomes(passed=1)
    better.stdout.fnmatch_lines(["*lock it in: pytest --autobatch-update*"])


def test_several_checks_of_one_test_have_records_of_their_own(run, pytester: pytest.Pytester) -> None:
    source = (
        MODEL
        + """
def test_training(step_memory):
    step_memory.check(Net(), 64, **arguments)
    step_memory.check(Net(), 128, **arguments)
    step_memory.check(Net(), 256, name="large", **arguments)
"""
    )
    run(source, "--autobatch-update").assert_outcomes(passed=1)

    cases = json.loads((pytester.path / ".autobatch/pytest.json").read_text())["cases"]
    name = "test_model.py::test_training"
    assert {key: case["settings"]["batch_size"] for key, case in cases.items()} == {
        name: 64,
        f"{name} #2": 128,
        f"{name} large": 256,
    }
    run(source).assert_outcomes(passed=1)


def test_workers_of_xdist_write_one_baseline_together(run, pytester: pytest.Pytester) -> None:
    source = check(64) + check(48).partition("arguments = ")[2].partition("\n")[2].replace(
        "test_training", "test_other"
    )
    run(source, "-n2", "--autobatch-update", new_process=True).assert_outcomes(passed=2)

    cases = json.loads((pytester.path / ".autobatch/pytest.json").read_text())["cases"]
    assert sorted(cases) == ["test_model.py::test_other", "test_model.py::test_training"]


def test_unused_it_imports_neither_torch_nor_pydantic() -> None:
    code = "import autobatch.pytest_plugin, sys; print([m for m in ('torch', 'pydantic', 'rich') if m in sys.modules])"

    # pytest itself may import rich: nothing of it is ours
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert out.strip() == "[]"
