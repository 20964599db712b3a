"""Regressions as people make them are caught and blamed on the right module; refactorings are not flagged."""

import linecache
from collections.abc import Callable
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
    blamed = common_path(first.modules[:1])
    assert blamed == change.module or (change.module and blamed.startswith(f"{change.module}.")), told
    assert first.how == change.how, told
    path, _, number = first.line.rpartition(":")
    assert change.code in linecache.getline(path, int(number or 0)), told


@pytest.mark.parametrize("name", planted.REFACTORINGS)
def test_a_refactoring_is_not_flagged(name: str) -> None:
    found = outcome(planted.REFACTORINGS[name])

    assert found.verdict is Verdict.SAME, "\n".join(text_lines(found, Path.cwd()))
