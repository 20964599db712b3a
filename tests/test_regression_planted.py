"""Regressions as people make them are caught and blamed on the right module; refactorings are not flagged."""

import linecache
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import planted
import pytest

from autobatch.regression.cases import Case
from autobatch.regression.measuring import step_on
from autobatch.regression.reason import common_path
from autobatch.regression.record import Record, Settings, record_of
from autobatch.regression.tolerance import Tolerance
from autobatch.regression.verdict import Outcome, Verdict, judged
from autobatch.report.check import main_changes, text_lines
from autobatch.workload import Workload

CASE = Case("case", "planted.py:decoder", batch_size=16, device="rtx-4090", tolerance=Tolerance(0.005))


@cache
def record(make: Callable[[], Workload]) -> Record:
    workload = make()
    settings = Settings(spec=CASE.spec, batch_size=16, precision=workload.precision, device=CASE.device)
    return record_of(step_on(CASE.device, workload, CASE.batch_size), settings)


def outcome(change: planted.Planted) -> Outcome:
    return judged(CASE.name, record(change.after), record(change.before), CASE.tolerance)


@pytest.mark.parametrize("name", planted.REGRESSIONS)
def test_a_regression_is_caught_and_blamed_on_the_right_module(name: str) -> None:
    change = planted.REGRESSIONS[name]
    found = outcome(change)
    told = "\n".join(text_lines(found, Path.cwd()))

    assert found.verdict is Verdict.WORSE, told
    first = main_changes(found)[0]
    blamed = first.modules[0] if first.modules[0].isdecimal() else common_path(first.modules[:1])
    assert blamed == change.module or (change.module and blamed.startswith(f"{change.module}.")), told
    assert first.how == change.how, told
    path, _, number = first.line.rpartition(":")
    assert change.code in linecache.getline(path, int(number or 0)), told


@pytest.mark.parametrize("name", planted.REFACTORINGS)
def test_a_refactoring_is_not_flagged(name: str) -> None:
    found = outcome(planted.REFACTORINGS[name])

    assert found.verdict is Verdict.SAME, "\n".join(text_lines(found, Path.cwd()))


IN_A_NEW_PROCESS = """
import sys, planted, torch
from test_regression_planted import record
from autobatch.prediction import tracing
torch.set_num_threads(int(sys.argv[1]))
tracing.claim_this_process()
for make in (planted.cnn, planted.BASE, planted.RECOMPUTING):
    print(record(make).model_dump_json())
"""


def recorded(seed: int) -> str:
    """The records of a CNN, a transformer with autocast and one with checkpointing, from a fresh process."""
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": str(seed % 3 + 1)}
    environment |= {"AUTOBATCH_CACHE": os.devnull, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, str(seed % 3 + 1)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(1200)
@pytest.mark.slow
def test_every_process_gives_the_same_record() -> None:
    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(recorded, range(1, 21)))

    assert len(found) == 1
