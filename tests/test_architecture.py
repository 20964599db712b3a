"""The shape of the project: imports point one way, and importing is cheap."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter import cli as import_linter

ROOT = Path(__file__).parents[1]


def modules_after(code: str) -> set[str]:
    code += "\nimport sys; print('\\n' + ' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.splitlines()[-1].split())


def test_imports_point_one_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    status = import_linter.lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert status == import_linter.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_importing_autobatch_does_not_import_torch() -> None:
    assert not {"torch", "numpy", "pydantic"} & modules_after("import autobatch")


def test_reading_a_plan_does_not_import_torch() -> None:
    assert "torch" not in modules_after("from autobatch import TrainingPlan, Trial, InvalidInput")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["probe", "--help"], ["probe", "x"]])
def test_the_command_line_imports_torch_only_when_it_has_work_to_do(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["autobatch", *{arguments}]
try:
    from autobatch.cli import app
    app()
except SystemExit:
    pass
"""
    assert "torch" not in modules_after(code)


def test_all_public_names_exist_and_are_documented() -> None:
    import autobatch

    for name in autobatch.__all__:
        assert getattr(autobatch, name).__doc__, name


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))])
def test_links_and_make_targets_in_the_documentation_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"^\s*(?:\$ )?make ([a-z]+)", text, re.MULTILINE):
        assert target in targets, f"{page} says make {target}"
