"""A memory check on a terminal, and its reasons in words, which all formats share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autobatch.regression.reason import Change, by_category, common_path, compared_phase, holders
from autobatch.regression.record import THE_REST
from autobatch.regression.verdict import Outcome, Verdict, limit_in_words
from autobatch.report.estimate import source_line
from autobatch.units import format_bytes

CHANGES = 8
"""So many of the largest changes are shown."""
_STYLES = {
    Verdict.SAME: "green",
    Verdict.BETTER: "cyan",
    Verdict.WORSE: "bold red",
    Verdict.OVER_LIMIT: "bold red",
    Verdict.NOT_COMPARED: "yellow",
    Verdict.UPDATED: "green",
    Verdict.FAILED: "magenta",
}
_LEAST_SHARE = 0.02
"""A change that is less of the whole is not shown by itself."""
_GOOD_PART = 0.2
_PHASES = {"forward": "forward pass", "backward": "backward pass", "optimizer": "optimizer's step"}
UPDATE = "autobatch check --update"
"""The command that makes what is now the baseline."""


def needs_words(outcome: Outcome) -> bool:
    """Whether there is more to say about a case than fits in its row."""
    return outcome.verdict is not Verdict.SAME or bool(outcome.warnings)


def row(outcome: Outcome) -> tuple[str, str, str, str, str]:
    """Case, peak then, peak now, change and verdict."""
    then, now = outcome.then, outcome.now
    return (
        outcome.name,
        format_bytes(then.peak_bytes) if then else "none",
        format_bytes(now.peak_bytes) if now else "unknown",
        change_in_words(outcome),
        outcome.verdict.value,
    )


def change_in_words(outcome: Outcome) -> str:
    """Such as "+1.21 GiB (+28.7 %)"; "" where there is nothing to compare."""
    change = outcome.change
    if change is None or outcome.then is None:
        return ""
    if not change:
        return "0"
    share = f" ({change / outcome.then.peak_bytes:+.1%})" if outcome.then.peak_bytes else ""
    return f"{signed(change)}{share}"


def signed(change: int) -> str:
    """Bytes more or fewer.

    >>> signed(1536), signed(-12)
    ('+1.5 KiB', '-12 B')
    """
    return f"{'+' if change > 0 else '-' if change < 0 else ''}{format_bytes(abs(change))}"


def headline(outcome: Outcome, update: str = UPDATE) -> str:
    """The verdict in a sentence.

    Args:
        update: the command that makes what is now the baseline.
    """
    if outcome.verdict is Verdict.FAILED or outcome.now is None:
        return outcome.problem
    peak = format_bytes(outcome.now.peak_bytes)
    told = []
    if outcome.verdict is Verdict.OVER_LIMIT:
        told.append(limit_in_words(outcome))
    if outcome.then is None and outcome.verdict is Verdict.UPDATED:
        told.append(f"its peak is {peak}, remembered from now on")
    elif outcome.then is None and not told:
        told.append(f"its peak is {peak}, and there is no baseline to compare it with: {update}")
    elif outcome.change and outcome.verdict is not Verdict.SAME:
        more = "more" if outcome.change > 0 else "less"
        amount = re.sub(r"[+-](?=\d)", "", change_in_words(outcome))
        tolerated = "" if outcome.verdict is Verdict.UPDATED else f"; tolerated: {outcome.tolerance}"
        told.append(f"its peak is {peak}, {amount} {more} than the baseline's{tolerated}")
    if more := _growth(outcome):
        told.append(more)
    if outcome.verdict is Verdict.BETTER:
        told.append(f"lock it in: {update}")
    return "; ".join(told) or f"its peak is {peak}"


def category_rows(outcome: Outcome) -> list[tuple[str, str, str, str]]:
    """Category, then, now and change, of those that changed."""
    if outcome.then is None or outcome.now is None or not outcome.change:
        return []
    rows = by_category(outcome.then, outcome.now)
    return [
        (name, format_bytes(before), format_bytes(after), signed(after - before))
        for name, before, after in rows
        if before != after
    ]


def moment_in_words(outcome: Outcome) -> str:
    """Which moment of the step is compared, and where the peak was, if that was another one."""
    then, now = outcome.then, outcome.now
    if then is None or now is None or not (phase := compared_phase(then, now)):
        return ""
    peak = now.phases[phase]
    told = f"at the peak of the {_PHASES.get(phase, phase)}"
    where = ", ".join(filter(None, [peak.module, peak.operator.removesuffix(".default")]))
    if then.peak_phase == now.peak_phase:
        return f"{told} ({where})"
    was, is_now = (_PHASES.get(record.peak_phase, record.peak_phase) for record in (then, now))
    return f"{told} ({where}); the highest peak was that of the {was}, and is that of the {is_now}"


def _growth(outcome: Outcome) -> str:
    """That memory grows with every step, if it did not before; else ""."""
    then, now = outcome.then, outcome.now
    if now is None or now.growth_bytes <= (then.growth_bytes if then else 0):
        return ""
    return f"each step leaves {format_bytes(now.growth_bytes)} behind, so that memory grows with every step"


def warnings(outcome: Outcome) -> tuple[str, ...]:
    """Those of the comparison, and where something has changed, those about the case itself."""
    own = outcome.now.warnings if outcome.now and outcome.verdict is not Verdict.SAME else ()
    return (*outcome.warnings, *own)


def main_changes(outcome: Outcome) -> list[Change]:
    """The largest changes in the direction of the whole, without what is next to nothing beside it."""
    total = outcome.change or 0
    sign = -1 if total < 0 else 1
    least = max(abs(total) * _LEAST_SHARE, 1)
    return [c for c in outcome.why if c.bytes * sign >= least and c.operator != THE_REST][:CHANGES]


def against_it(outcome: Outcome) -> list[Change]:
    """The largest changes in the other direction, where they are a good part of the whole: what was replaced."""
    total = outcome.change or 0
    sign = -1 if total < 0 else 1
    return [c for c in outcome.why if -c.bytes * sign >= abs(total) * _GOOD_PART and c.operator != THE_REST][:2]


def shown_changes(outcome: Outcome) -> list[Change]:
    """All that are shown by themselves."""
    found = main_changes(outcome)
    return found + against_it(outcome) if found else []


def main_holders(outcome: Outcome) -> list[Change]:
    """Who holds most at the peak of a case that is over its limit."""
    return holders(outcome.now)[:CHANGES] if outcome.verdict is Verdict.OVER_LIMIT and outcome.now else []


def all_others(outcome: Outcome) -> int:
    """Bytes of the changes that are not among the main ones, together."""
    return sum(change.bytes for change in outcome.why) - sum(change.bytes for change in shown_changes(outcome))


def modules_in_words(change: Change) -> str:
    """One module, or what its modules have in common."""
    first, *others = (path or "the step itself" for path in change.modules)
    if not others:
        return first
    common = common_path(change.modules)
    if common:
        return f"{common} ({len(change.modules)} modules)"
    return f"{first} and {len(others)} more"


def change_words(change: Change, root: Path) -> tuple[str, str, str]:
    """Bytes, what and where."""
    return signed(change.bytes), f"{change.category}, {change.how}", place(change, root)


def place(change: Change, root: Path) -> str:
    """Modules, operator and line."""
    parts = [modules_in_words(change), change.operator.removesuffix(".default"), relative(change.line, root)]
    return "  ".join(filter(None, parts))


def relative(line: str, root: Path) -> str:
    """A `file:line` as people in that folder write it; of a library, the end of it."""
    if not line:
        return ""
    path, _, number = line.rpartition(":")
    with_root = os.path.relpath(path, root) if Path(path).is_absolute() else path
    inside = not with_root.startswith("..") and "site-packages" not in with_root
    return f"{with_root}:{number}" if inside else source_line(line)


def text_lines(outcome: Outcome, root: Path, update: str = UPDATE) -> Iterator[str]:
    """All that there is to say about a case, as plain text."""
    yield f"{outcome.name}: {headline(outcome, update)}"
    if categories := category_rows(outcome):
        yield f"  Then and now, {moment_in_words(outcome)}:"
        widths = [max(len(cells[i]) for cells in categories) for i in range(4)]
        for name, *numbers in categories:
            columns = "  ".join(f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True))
            yield f"    {name:<{widths[0]}}  {columns}"
    if found := shown_changes(outcome):
        yield "  What changed there:"
        for change in found:
            amount, what, where = change_words(change, root)
            yield f"    {amount}  {what}"
            yield f"      {where}"
        if others := all_others(outcome):
            yield f"    {signed(others)}  all other changes together"
    if found := main_holders(outcome):
        yield "  What is there at the peak:"
        for holder in found:
            yield f"    {format_bytes(holder.bytes)}  {holder.category}"
            yield f"      {place(holder, root)}"
    yield from (f"  Warning: {warning}" for warning in warnings(outcome))


def print_check(console: Console, outcomes: Sequence[Outcome], root: Path) -> None:
    """The table, and below it what there is to say about each case."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", overflow="fold")
    for head in ("then", "now", "change"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for outcome in outcomes:
        *cells, verdict = row(outcome)
        table.add_row(*map(Text, cells), Text(verdict, style=_STYLES[outcome.verdict]))
    console.print(table)
    for outcome in filter(needs_words, outcomes):
        first, *rest = text_lines(outcome, root)
        console.print(Text(first, style=_STYLES[outcome.verdict]), soft_wrap=True)
        for line in rest:
            console.print(_coloured(line), soft_wrap=True)
        console.print()


def _coloured(line: str) -> Text:
    text = Text(line)
    text.highlight_regex(re.compile(r"^    \+\S+ \S+"), "red")
    text.highlight_regex(re.compile(r"^    -\S+ \S+"), "green")
    text.highlight_regex(re.compile(r"^  Warning:"), "yellow")
    return text


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many cases went how, in one line."""
    counts = [(verdict.value, sum(outcome.verdict is verdict for outcome in outcomes)) for verdict in Verdict]
    told = ", ".join(f"{count} {name}" for name, count in counts if count)
    return f"{len(outcomes)} case{'s' if len(outcomes) != 1 else ''}: {told}"
