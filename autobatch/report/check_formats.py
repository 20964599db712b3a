"""A memory check for machines and pull requests: JSON, Markdown, GitHub's annotations, JUnit's XML."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from autobatch.regression.verdict import Outcome, Verdict
from autobatch.report import check
from autobatch.units import format_bytes

_NOT_IN_XML = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")
_MARKS = {
    Verdict.SAME: "✅",
    Verdict.BETTER: "🎉",
    Verdict.WORSE: "❌",
    Verdict.OVER_LIMIT: "❌",
    Verdict.NOT_COMPARED: "❔",
    Verdict.UPDATED: "✅",
    Verdict.FAILED: "💥",
}


def as_json(outcomes: Sequence[Outcome], problems: Sequence[str], code: int) -> str:
    """All of it as data; bytes are bytes."""
    return json.dumps({"exit_code": code, "problems": list(problems), "cases": [_data(o) for o in outcomes]}, indent=2)


def _data(outcome: Outcome) -> dict[str, Any]:
    then, now = outcome.then, outcome.now
    return {
        "name": outcome.name,
        "verdict": outcome.verdict.value,
        "settings": now.settings.model_dump() if now else None,
        "versions": now.versions if now else None,
        "evidence": now.evidence if now else None,
        "peak_bytes": now.peak_bytes if now else None,
        "baseline_peak_bytes": then.peak_bytes if then else None,
        "change_bytes": outcome.change,
        "device_total_bytes": now.device_total_bytes if now else None,
        "limit_bytes": outcome.limit,
        "growth_bytes": now.growth_bytes if now else None,
        "phases": {name: peak.model_dump() for name, peak in now.phases.items()} if now else None,
        "baseline_phases": {name: peak.model_dump() for name, peak in then.phases.items()} if then else None,
        "changes": [
            {
                "bytes": change.bytes,
                "how": change.how,
                "category": change.category,
                "operator": change.operator,
                "modules": list(change.modules),
                "line": change.line,
                "phase": change.phase,
            }
            for change in outcome.why
        ],
        "warnings": list(check.warnings(outcome)),
        "problem": outcome.problem,
    }


def as_markdown(outcomes: Sequence[Outcome], problems: Sequence[str], root: Path) -> str:
    """For the comment of a pull request, or a job's summary."""
    lines = [f"### Training memory: {check.summary(outcomes)}", ""]
    lines += ["| case | then | now | change | |", "| --- | ---: | ---: | ---: | --- |"]
    for outcome in outcomes:
        *cells, verdict = map(_cell, check.row(outcome))
        lines.append(f"| {' | '.join(cells)} | {_MARKS[outcome.verdict]} {verdict} |")
    lines += ["", *(f"> {_html(problem)}" for problem in problems)]
    for outcome in filter(check.needs_words, outcomes):
        opened = " open" if outcome.exit_code else ""
        lines += [
            "",
            f"<details{opened}><summary>{_html(outcome.name)}: {_html(check.headline(outcome))}</summary>",
            "",
        ]
        lines += [*_reasons(outcome, root), "</details>"]
    return "\n".join(lines) + "\n"


def _reasons(outcome: Outcome, root: Path) -> Iterator[str]:
    if categories := check.category_rows(outcome):
        yield from (f"Then and now, {_html(check.moment_in_words(outcome))}:", "")
        yield from ("| | then | now | change |", "| --- | ---: | ---: | ---: |")
        yield from (f"| {' | '.join(map(_cell, cells))} |" for cells in categories)
        yield ""
    if found := check.shown_changes(outcome):
        yield from ("| bytes | what | where |", "| ---: | --- | --- |")
        for change in found:
            amount, what, where = check.change_words(change, root)
            yield f"| {amount} | {_cell(what)} | {_code(where)} |"
        if others := check.all_others(outcome):
            yield f"| {check.signed(others)} | all other changes together | |"
        yield ""
    if holders := check.main_holders(outcome):
        yield from ("| bytes | what is there at the peak | where |", "| ---: | --- | --- |")
        for holder in holders:
            yield f"| {format_bytes(holder.bytes)} | {holder.category} | {_code(check.place(holder, root))} |"
        yield ""
    yield from (f"- {_html(sentence)}" for sentence in check.warnings(outcome))
    yield ""


def _cell(text: str) -> str:
    return _html(text).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{text.replace('|', ' ').replace('`', ' ')}`"


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def as_github(outcomes: Sequence[Outcome], problems: Sequence[str], root: Path) -> Iterator[str]:
    """GitHub's workflow commands: an annotation of the line to blame for each case that is not as it was."""
    for problem in problems:
        yield _annotation("error", "autobatch check", problem, "", root)
    for outcome in outcomes:
        if not check.needs_words(outcome):
            continue
        level = "error" if outcome.exit_code else "notice" if outcome.verdict is Verdict.BETTER else "warning"
        blamed = [*check.main_changes(outcome), *check.main_holders(outcome)]
        lines = [change.line for change in blamed if _in_repository(change.line)]
        message = "\n".join(check.text_lines(outcome, root))
        yield _annotation(level, f"{outcome.name}: {outcome.verdict.value}", message, lines[0] if lines else "", root)


def _annotation(level: str, title: str, message: str, line: str, root: Path) -> str:
    properties = {"title": title}
    if line:
        path, _, number = line.rpartition(":")
        properties = {"file": os.path.relpath(root / path, _repository()), "line": number, **properties}
    told = ",".join(f"{key}={_escaped(value, ':,')}" for key, value in properties.items())
    return f"::{level} {told}::{_escaped(message)}"


def _escaped(text: str, more: str = "") -> str:
    for character in ("%", "\r", "\n", *more):
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def _repository() -> Path:
    return Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd()).resolve()


def _in_repository(line: str) -> bool:
    return bool(line) and not os.path.relpath(line, _repository()).startswith("..") and "site-packages" not in line


def as_junit(outcomes: Sequence[Outcome], problems: Sequence[str], root: Path) -> str:
    """JUnit's XML, for systems that show test reports."""
    failures = sum(outcome.exit_code in (1, 2) for outcome in outcomes)
    errors = sum(outcome.exit_code not in (0, 1, 2) for outcome in outcomes)
    counts = {
        "tests": str(len(outcomes) + len(problems)),
        "failures": str(failures),
        "errors": str(errors + len(problems)),
    }
    suite = ET.Element("testsuite", {"name": "autobatch check", **counts})
    for outcome in outcomes:
        case = ET.SubElement(suite, "testcase", {"classname": "autobatch.check", "name": outcome.name})
        text = "\n".join(check.text_lines(outcome, root))
        if outcome.exit_code:
            kind = "failure" if outcome.exit_code in (1, 2) else "error"
            ET.SubElement(case, kind, {"message": check.headline(outcome), "type": outcome.verdict.value}).text = text
        else:
            ET.SubElement(case, "system-out").text = text
    for problem in problems:
        case = ET.SubElement(suite, "testcase", {"classname": "autobatch.check", "name": "configuration"})
        ET.SubElement(case, "error", {"message": problem, "type": "configuration"})
    ET.indent(suite)
    return _NOT_IN_XML.sub("�", ET.tostring(suite, encoding="unicode", xml_declaration=True)) + "\n"
