"""The examples do what they say."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ACCUMULATES = re.compile(r"Training plan: .*(×|\+).* = \d+ samples")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    monkeypatch.delitem(sys.modules, name, raising=False)
    return import_module(name)


def test_digits_needs_accumulation_and_learns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load("digits", monkeypatch).main()
    printed = capsys.readouterr().out
    assert ACCUMULATES.search(printed)
    assert float(re.findall(r"test accuracy ([\d.]+)%", printed)[-1]) > 95


def test_char_gpt_needs_accumulation_and_learns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load("char_gpt", monkeypatch)
    monkeypatch.setattr(example, "STEPS", 10)
    example.main()
    printed = capsys.readouterr().out
    assert ACCUMULATES.search(printed)
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", printed))
    assert last < first - 0.5
