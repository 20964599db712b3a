"""`autobatch check`: baselines, verdicts, blame, and what is wrong said in one line while the other cases still run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner, Result

from autobatch.cli import app
from autobatch.errors import InvalidInput
from autobatch.regression import cases
from autobatch.regression.baseline import Baseline
from autobatch.regression.record import Record, Settings
from autobatch.regression.tolerance import Tolerance

TRAIN = """
import torch
from torch import nn
from autobatch import Workload

WIDTH = 256

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.last(self.first(x).relu())

def make():
    print("a print of the factory")
    return Workload(Net(), lambda n: (torch.randn(n, 64), torch.randint(4, (n,))), nn.functional.cross_entropy)

def broken():
    raise KeyError("no such layer")

def untraceable():
    table = nn.Embedding(10, 4, sparse=True)
    return Workload(table, lambda n: torch.randint(10, (n,)), training_step=lambda model, batch: model(batch).sum())

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(8, 1024), nn.GELU(), nn.Linear(1024, 8)) for _ in range(6)]
        self.layers, self.recompute = nn.ModuleList(layers), False

    def forward(self, x):
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x

    def set_grad_checkpointing(self, enable=True):
        self.recompute = enable

class Faulty(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        raise ValueError("a bug of its own")

def faulty():
    return Workload(Faulty(), lambda n: torch.randn(n, 4))

def dies():
    import os, signal, subprocess
    subprocess.Popen(["sleep", "100"], close_fds=False)
    os.kill(os.getpid(), signal.SIGKILL)

def slow():
    import time
    time.sleep(120)
"""
CASE = '{ name = "net", spec = "train.py:make", batch_size = 4096, device = "rtx-4090"%s }'
DEMO = Path(__file__).parents[1] / "examples" / "ci_check"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a model and one case, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.delenv("GITHUB_WORKSPACE", raising=False)
    (tmp_path / "train.py").write_text(TRAIN)
    configure(tmp_path, CASE % "")
    return tmp_path


def configure(project: Path, *entries: str, more: str = "") -> None:
    listed = ",\n".join(entries)
    (project / "pyproject.toml").write_text(f"[tool.autobatch.check]\n{more}\ncases = [\n{listed}\n]\n")


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def check(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments])


def shown(result: Result) -> dict:
    return json.loads(result.stdout)


def test_a_case_is_new_then_the_same_then_worse_and_blamed_then_updated(project: Path) -> None:
    missing = check()
    assert missing.exit_code == 2
    assert "no baseline" in missing.stdout
    assert "autobatch check --update" in missing.stdout

    assert check("--update").exit_code == 0
    same = check()
    assert same.exit_code == 0, same.output
    assert "1 case: 1 ok" in same.stdout

    edit(project / "train.py", "self.first(x).relu()", "self.first(x).double().relu().float()")
    worse = check()
    assert worse.exit_code == 1
    assert re.search(r"\+4\.0 MiB +saved activation, larger\n +the step itself +aten\.relu +train\.py:14", worse.stdout)

    updated = check("--update")
    assert updated.exit_code == 0
    assert "net: more than before" in updated.stderr
    assert "updated" in updated.stdout
    assert check().exit_code == 0


def test_less_than_before_is_told_and_to_be_locked_in(project: Path) -> None:
    check("--update")
    edit(project / "train.py", "WIDTH = 256", "WIDTH = 128")
    result = check()

    assert result.exit_code == 0
    assert "better" in result.stdout
    assert "lock it in: autobatch check --update" in result.stdout


def test_within_its_tolerance_a_case_is_as_before(project: Path) -> None:
    check("--update")
    configure(project, CASE % ', tolerance = ["0.1%", "10MiB"]')
    edit(project / "train.py", "self.first(x).relu()", "self.first(x).double().relu().float()")
    assert check().exit_code == 1

    configure(project, CASE % ', tolerance = ["0.1%", "100MiB"]')
    assert check().exit_code == 0


def test_a_limit_holds_without_a_baseline_and_says_what_is_there(project: Path) -> None:
    configure(project, CASE % ', limit = "12GiB"')
    assert check().exit_code == 0

    configure(project, CASE % ', limit = "200MiB"')
    over = check()
    assert over.exit_code == 1
    assert "over its limit of 200.0 MiB" in over.stdout
    assert "What is there at the peak:" in over.stdout
    assert check("--update").exit_code == 1, "a limit is a limit"


def test_another_torch_and_another_device_are_compared_with_a_warning(project: Path) -> None:
    check("--update")
    edit(project / ".autobatch/baseline.json", '"torch": "', '"torch": "1')
    edit(project / "pyproject.toml", "rtx-4090", "rtx-3090")
    result = check()

    assert result.exit_code == 0
    assert "device rtx-4090 then, rtx-3090 now" in result.stdout
    assert "torch 1" in result.stdout


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"schema_version": 99, "cases": {}}', "schema version 99, but this autobatch reads version 1"),
        ('{"cases"', "is damaged"),
        ('{"schema_version": 1, "cases": {"net": {"peak_bytes": -1}}}', "is damaged at net.settings"),
        ("[]", "names no schema_version"),
        ("[" * 100_000, "is damaged"),
        (
            '{"schema_version": 1, "cases": {"net": {"settings": {"spec": "a", "batch_size": 1, "precision": "fp32", '
            '"device": "t4"}, "peak_bytes": 1, "device_total_bytes": 1, "origins": {"nothing": {"category": "x"}}}}}',
            "is damaged at net.origins",
        ),
    ],
)
def test_a_baseline_that_cannot_be_used_is_told_left_alone_and_the_cases_run(
    project: Path, content: str, told: str
) -> None:
    (project / ".autobatch").mkdir()
    (project / ".autobatch/baseline.json").write_text(content)
    configure(project, CASE % ', limit = "12GiB"')
    result = check("--json")

    assert result.exit_code == 2
    assert told in shown(result)["problems"][0]
    assert check("--update").exit_code == 2
    assert (project / ".autobatch/baseline.json").read_text() == content
    assert shown(result)["cases"][0]["peak_bytes"] > 1 << 20


def test_cases_that_fail_are_told_in_a_line_each_and_the_others_run(project: Path) -> None:
    failing = [
        '{ name = "broken", spec = "train.py:broken", batch_size = 2, device = "rtx-4090" }',
        '{ name = "sparse", spec = "train.py:untraceable", batch_size = 2, device = "rtx-4090" }',
        '{ name = "card", spec = "train.py:make", batch_size = 2, device = "rtx-9999" }',
        '{ name = "size", spec = "train.py:make", batch_size = "many", device = "rtx-4090" }',
        '{ name = "switch", spec = "train.py:make", batch_size = 2, device = "rtx-4090", checkpointing = true }',
        '{ name = "here", spec = "train.py:make", batch_size = 2, device = "cuda" }',
        '{ name = "faulty", spec = "train.py:faulty", batch_size = 2, device = "t4" }',
    ]
    configure(project, CASE % "", *failing)
    check("--update", "net")
    result = check("--json")

    found = {case["name"]: case for case in shown(result)["cases"]}
    assert result.exit_code == 3
    assert found["net"]["verdict"] == "ok"
    assert "KeyError: 'no such layer'" in found["broken"]["problem"]
    assert "train.py line 21" in found["broken"]["problem"]
    assert "sparse gradients" in found["sparse"]["problem"]
    assert "a bug of its own" in found["faulty"]["problem"]
    assert check("faulty").exit_code == 3
    assert "rtx-9999" in found["card"]["problem"]
    assert "batch_size must be a whole number of at least 1, but is 'many'" in found["size"]["problem"]
    assert "no switch for activation checkpointing" in found["switch"]["problem"]
    assert "device" in found["here"]["problem"]
    assert all("\n" not in case["problem"] for case in found.values())


def test_checkpointing_is_switched_on_for_a_case(project: Path) -> None:
    base = 'spec = "train.py:Deep", batch_size = 4096, device = "rtx-4090"'
    configure(
        project,
        f'{{ name = "kept", {base} }}',
        f'{{ name = "recomputed", {base}, checkpointing = true }}',
    )
    result = check("--json")
    peaks = {case["name"]: case["peak_bytes"] for case in shown(result)["cases"]}

    assert all(peaks.values()), result.stdout
    assert peaks["recomputed"] < peaks["kept"] / 2


def test_one_case_is_updated_and_others_keep_theirs_until_they_are_no_longer_listed(project: Path) -> None:
    second = '{ name = "second", spec = "train.py:make", batch_size = 64, device = "rtx-4090" }'
    configure(project, CASE % "", second)
    check("--update")
    before = json.loads((project / ".autobatch/baseline.json").read_text())["cases"]
    edit(project / "train.py", "WIDTH = 256", "WIDTH = 512")
    check("--update", "second")
    after = json.loads((project / ".autobatch/baseline.json").read_text())["cases"]
    assert after["net"] == before["net"]
    assert after["second"] != before["second"]

    configure(project, second)
    assert "net: no longer listed, removed" in check("--update").stderr
    assert list(json.loads((project / ".autobatch/baseline.json").read_text())["cases"]) == ["second"]


def test_an_edit_of_other_lines_leaves_the_baseline_as_it_is(project: Path) -> None:
    check("--update")
    before = (project / ".autobatch/baseline.json").read_text()
    edit(project / "train.py", "WIDTH = 256", "# a comment\n\nWIDTH = 256")
    check("--update")

    assert (project / ".autobatch/baseline.json").read_text() == before
    assert max(map(len, before.splitlines())) < 400


def test_updates_at_the_same_time_lose_nothing(project: Path) -> None:
    names = [f"net{number}" for number in range(6)]
    record = Record(
        settings=Settings(spec="a", batch_size=1, precision="fp32", device="t4"), peak_bytes=1, device_total_bytes=1
    )
    path = project / ".autobatch/baseline.json"
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: Baseline.update(path, {name: record}), names))

    assert sorted(Baseline.read(path).records) == names


def test_nothing_is_written_where_nothing_ran(project: Path) -> None:
    edit(project / "train.py", "def make():", "def make():\n    raise ValueError('\x1b[31mbad')")
    result = check("--update")

    assert result.exit_code == 3
    assert "Nothing was written" in result.stderr
    assert not (project / ".autobatch").exists()
    ET.fromstring(check("--format", "junit").stdout)


def test_a_step_that_leaves_more_behind_is_worse_whatever_the_tolerance(project: Path) -> None:
    check("--update")
    edit(
        project / "train.py",
        "return self.last(self.first(x).relu())",
        "KEPT.append(y := self.first(x).relu()); return self.last(y)",
    )
    edit(project / "train.py", "WIDTH = 256", "WIDTH = 256; KEPT = []")
    configure(project, CASE % ', tolerance = "50GiB"')
    result = check()

    assert result.exit_code == 1
    assert "each step leaves 4.0 MiB behind, so that memory grows with every step" in result.stdout
    assert "aten.relu.default" in result.stdout


def test_a_case_whose_process_leaves_another_behind_does_not_hang(project: Path) -> None:
    configure(project, '{ name = "dies", spec = "train.py:dies", batch_size = 1, device = "t4" }', CASE % "")
    start = time.monotonic()
    result = check("--json")

    assert time.monotonic() - start < 60
    found = {case["name"]: case for case in shown(result)["cases"]}
    assert "the process that ran it died (status -9)" in found["dies"]["problem"]
    assert found["net"]["peak_bytes"]


def test_an_over_limit_case_says_what_is_there_in_every_format(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_WORKSPACE", str(project))
    configure(project, CASE % ', limit = "200MiB"')
    assert "what is there at the peak" in check("--format", "markdown").stdout
    lines = check("--format", "github").stdout.splitlines()
    (command,) = [line for line in lines if line.startswith("::") and "net" in line]
    assert "file=train.py,line=14" in command


def test_a_project_behind_a_symlink_has_its_lines_annotated(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    link = tmp_path_factory.mktemp("links") / "project"
    link.symlink_to(project)
    monkeypatch.setenv("GITHUB_WORKSPACE", str(link))
    configure(project, CASE % ', limit = "200MiB"')
    result = check("--config", str(link / "pyproject.toml"), "--format", "github")

    assert "::error file=train.py,line=14" in result.stdout


def test_github_gets_annotations_and_a_summary(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check("--update")
    edit(project / "train.py", "self.first(x).relu()", "self.first(x).double().relu().float()")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(project / "summary.md"))
    monkeypatch.setenv("GITHUB_WORKSPACE", str(project))
    result = check("--format", "github")

    assert result.exit_code == 1
    (command,) = [line for line in result.stdout.splitlines() if line.startswith("::")]
    assert command.startswith("::error file=train.py,line=14,title=net%3A worse::net: its peak is ")
    assert "%0A" in command
    summary = (project / "summary.md").read_text()
    assert "| net |" in summary
    assert "❌ worse" in summary
    assert "train.py:14" in summary


def test_markdown_and_junit_say_the_same(project: Path) -> None:
    check("--update")
    edit(project / "train.py", "self.first(x).relu()", "self.first(x).double().relu().float()")
    markdown = check("--format", "markdown")
    assert markdown.exit_code == 1
    assert "<details open><summary>net: its peak is" in markdown.stdout

    junit = check("--format", "junit")
    suite = ET.fromstring(junit.stdout)
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "1", "0")
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert "train.py:14" in failure.text


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("cases = [", "is no valid TOML"),
        ("[tool.other]", "has no cases to check"),
        ("[tool.autobatch.check]\ncases = []", "has no cases to check"),
        ("[tool.autobatch.check]\ncolour = 1\ncases = [{}]", "has 'colour'"),
        ("[tool.autobatch.check]\nbaseline = 3\ncases = [{}]", "baseline in"),
    ],
)
def test_a_table_that_cannot_be_read_is_an_error(tmp_path: Path, table: str, told: str) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(table)

    with pytest.raises(InvalidInput, match=re.escape(told)):
        cases.read(path)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("3", "a case is a table such as"),
        ('{ name = "a", spec = "train.py:make" }', "batch_size and device missing"),
        (CASE % ", size = 3", "'size' is no key of a case"),
        (CASE % ', tolerance = "some"', "'some' is not an amount of memory"),
        (CASE % ', tolerance = ["1%", "2%"]', "two of a kind"),
        (CASE % ', tolerance = "2,5%"', "'2' in the tolerance '2,5%' has no unit"),
        (CASE % ', limit = "-3"', "'-3' is not an amount of memory"),
        (CASE % ", precision = 16", "precision must be one of fp32, bf16, fp16"),
        (CASE % ', checkpointing = "yes"', "checkpointing must be true or false"),
        ((CASE % "").replace("rtx-4090", "cpu"), "a CPU's memory differs from run to run"),
        ((CASE % "").replace("4096", "true"), "batch_size must be a whole number"),
    ],
)
def test_a_case_that_cannot_be_used_is_told_and_the_others_are_there(tmp_path: Path, entry: str, told: str) -> None:
    configure(tmp_path, entry, '{ name = "good", spec = "train.py:make", batch_size = 1, device = "t4" }')
    found = cases.read(tmp_path / "pyproject.toml")

    assert [case.name for case in found.cases] == ["good"]
    assert told in "".join(found.wrong.values())


def test_two_cases_of_one_name_are_told(tmp_path: Path) -> None:
    configure(tmp_path, CASE % "", (CASE % "").replace('"net"', '" net"'))
    found = cases.read(tmp_path / "pyproject.toml")

    assert [case.name for case in found.cases] == ["net"]
    assert "two cases with the name 'net'" in found.wrong["(number 2)"]


def test_what_the_table_says_holds_for_cases_that_do_not(tmp_path: Path) -> None:
    configure(
        tmp_path,
        '{ name = "a", spec = "m:f", batch_size = 1 }',
        '{ name = "b", spec = "m:f", batch_size = 1, device = "t4" }',
        more='device = "h100-80gb"\nprecision = "bf16"\ntolerance = "1%"',
    )
    a, b = cases.read(tmp_path / "pyproject.toml").cases

    assert (a.device, b.device, b.precision, b.tolerance) == ("h100-80gb", "t4", "bf16", Tolerance(0.01))


def test_the_nearest_pyproject_with_cases_is_taken(tmp_path: Path) -> None:
    inner = tmp_path / "package" / "deep"
    inner.mkdir(parents=True)
    configure(tmp_path, CASE % "")
    (tmp_path / "package" / "pyproject.toml").write_text("[project]\nname = 'x'\n")

    assert cases.find(inner) == tmp_path / "pyproject.toml"


def test_a_tolerance_is_a_share_an_amount_or_the_larger_of_both() -> None:
    assert Tolerance.parse("2%").allowed(1000) == 20
    assert Tolerance.parse("64MiB").allowed(1000) == 64 << 20
    assert Tolerance.parse("2%, 64MiB").allowed(1000) == 64 << 20
    assert Tolerance.parse(["2%", "1KiB"]).allowed(1 << 20) == 20971
    assert Tolerance.parse("0").allowed(1 << 40) == 0
    assert str(Tolerance.parse("2.5%, 64MiB")) == "2.5% or 64.0 MiB"


def test_an_unknown_case_and_no_pyproject_are_one_line(project: Path) -> None:
    unknown = check("nets")
    assert (unknown.exit_code, unknown.stderr) == (2, "autobatch: there is no case 'nets'; these are: net.\n")

    (project / "pyproject.toml").unlink()
    nothing = check()
    assert nothing.exit_code == 2
    assert "there is no pyproject.toml in" in nothing.stderr


def test_the_command_itself_needs_no_torch_and_ctrl_c_leaves_nothing_behind(project: Path) -> None:
    configure(project, *(f'{{ name = "{n}", spec = "train.py:slow", batch_size = 1, device = "t4" }}' for n in "abc"))
    code = "import sys; sys.modules['torch'] = None; from autobatch.cli import app; app()"
    process = subprocess.Popen([sys.executable, "-c", code, "check", "-j", "2"], stderr=subprocess.PIPE, text=True)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while len(children) < 2 and time.monotonic() < deadline:
        children = psutil.Process(process.pid).children()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)

    assert process.wait(20) == 130, process.stderr.read()
    assert len(children) == 2
    psutil.wait_procs(children, 10)
    assert not [child for child in children if child.is_running()]


def test_the_demo_is_green_then_a_regression_is_caught_then_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    green = check()
    assert green.exit_code == 0, green.output

    edit(
        tmp_path / "train.py",
        "F.scaled_dot_product_attention(q, k, v)",
        "((q @ k.mT / 8).float().softmax(-1) @ v.float())",
    )
    red = check()
    assert red.exit_code == 1
    assert "blocks.*.attention (4 modules)  aten._softmax  train.py:" in red.stdout

    assert check("--update").exit_code == 0
    assert check().exit_code == 0
    assert os.listdir(tmp_path / ".autobatch") == ["baseline.json"]


def test_the_action_runs_the_check_and_writes_the_summary(tmp_path: Path) -> None:
    action = yaml.safe_load((DEMO.parents[1] / "action.yml").read_text())
    assert action["runs"]["using"] == "composite"
    assert all(step.get("shell") == "bash" for step in action["runs"]["steps"] if "run" in step)
    shutil.copytree(DEMO, tmp_path / "project")
    edit(
        tmp_path / "project/train.py",
        "WIDTH, HEADS, LENGTH, CLASSES = 8000, 256",
        "WIDTH, HEADS, LENGTH, CLASSES = 8000, 320",
    )
    command = tmp_path / "autobatch"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m autobatch "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CASES": "encoder",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "GITHUB_WORKSPACE": str(tmp_path / "project"),
    }
    script = action["runs"]["steps"][-1]["run"]
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script],
        cwd=tmp_path / "project",
        env=environment,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1, done.stderr
    assert "::error file=train.py,line=" in done.stdout
    assert "| encoder |" in (tmp_path / "summary.md").read_text()
