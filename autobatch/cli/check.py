"""`autobatch check`: whether training steps still take the memory that they took."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autobatch.cli.common import DebugOption, JsonOption, explained
from autobatch.errors import InvalidInput

if TYPE_CHECKING:
    from autobatch.regression.baseline import Baseline
    from autobatch.regression.cases import Case, Config
    from autobatch.regression.verdict import Outcome


_LOG_WIDTH = 160
"""Columns of a table in a log."""


class Format(str, Enum):
    """What the result is printed as."""

    TEXT = "text"
    GITHUB = "github"
    MARKDOWN = "markdown"
    JUNIT = "junit"


def check(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="CASE", help="Which cases. Default: all.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The pyproject.toml. Default: the nearest that has cases."),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Make what is now the baseline, and say what changed.")
    ] = False,
    form: Annotated[
        Format, typer.Option("--format", help="github: annotations, and the job's summary where there is one.")
    ] = Format.TEXT,
    as_json: JsonOption = False,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, help="Cases side by side. 0: as many as there are processors.")
    ] = 0,
    debug: DebugOption = False,
) -> None:
    """Compare the memory of training steps with a committed baseline, and say which line is to blame for more.

    Needs no GPU: steps are traced, to the same byte each time. The cases stand in pyproject.toml, in the table
    tool.autobatch.check.

    Exit codes: 0 as before, or better; 1 worse, or over a limit; 2 bad usage, or no baseline; 3 the model's own code
    failed, or cannot be traced; 130 interrupted.
    """
    with explained(debug), _ending_when_told_to():
        from autobatch.regression import cases
        from autobatch.regression.baseline import Baseline
        from autobatch.regression.verdict import exit_code, updated

        if as_json and form is not Format.TEXT:
            raise InvalidInput("--json is a format of its own: leave --format out.")
        asked = cases.read(config or cases.find(Path.cwd()))
        chosen = _chosen(asked, names or [])
        baseline = Baseline.read(asked.baseline)
        outcomes = _run(asked, chosen, baseline, jobs)
        problems = [baseline.problem] if baseline.problem and not update else []
        not_written: InvalidInput | None = None
        if update:
            try:
                _update(asked, outcomes, baseline, whole=not names)
            except InvalidInput as error:  # what was found is worth showing all the same
                not_written = error
            outcomes = [updated(outcome) for outcome in outcomes]
        unusable = bool(problems) and baseline.is_there
        code = exit_code([*(outcome.exit_code for outcome in outcomes), 2 if unusable else 0])
        _show(outcomes, problems, form, as_json, asked.root, code)
        if not_written:
            raise not_written
        if debug:
            print(*(o.details for o in outcomes if o.details), sep="\n", file=sys.stderr)
        if code:
            raise typer.Exit(code)


@contextmanager
def _ending_when_told_to() -> Iterator[None]:
    """SIGTERM, with which jobs are cancelled, ends the cases' processes too, as Ctrl-C does."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _chosen(asked: Config, names: Sequence[str]) -> list[str]:
    known = [*(case.name for case in asked.cases), *asked.wrong]
    if unknown := [name for name in names if name not in known]:
        raise InvalidInput(f"there is no case {unknown[0]!r}; these are: {', '.join(known)}.")
    return list(dict.fromkeys(names)) or known


def _run(asked: Config, chosen: Sequence[str], baseline: Baseline, jobs: int) -> list[Outcome]:
    """The outcomes of the chosen cases, in the order that they are listed."""
    from rich.console import Console

    from autobatch.regression.record import Record
    from autobatch.regression.running import Failure, default_jobs, run_all
    from autobatch.regression.verdict import failed, judged
    from autobatch.units import format_bytes

    found: dict[str, Outcome] = {}
    console = Console(stderr=True)
    chosen_cases = [case for case in asked.cases if case.name in chosen]

    def ended(case: Case, answer: Record | Failure) -> None:
        then = baseline.records.get(case.name)
        if isinstance(answer, Failure):
            found[case.name] = failed(case.name, answer.problem, answer.exit_code, answer.details, then)
            told = "failed"
        else:
            found[case.name] = judged(case.name, answer, then, case.tolerance, case.limit)
            told = format_bytes(answer.peak_bytes)
        if not console.is_terminal:
            print(f"[{len(found)}/{len(chosen_cases)}] {case.name}: {told}", file=sys.stderr, flush=True)

    some = f"{len(chosen_cases)} case{'s' if len(chosen_cases) != 1 else ''}"
    with console.status(f"Tracing {some} ...") if console.is_terminal else nullcontext():
        run_all(chosen_cases, asked.root, jobs or default_jobs(), ended)
    found |= {name: failed(name, asked.wrong[name], 2) for name in chosen if name in asked.wrong}
    return [found[name] for name in chosen]


def _update(asked: Config, outcomes: Sequence[Outcome], baseline: Baseline, whole: bool) -> None:
    """Write the baseline anew. Cases that failed, or were not chosen, keep what they have; those that are no longer
    listed go."""
    listed = {case.name for case in asked.cases} | asked.wrong.keys()
    gone = sorted(baseline.records.keys() - listed) if whole else []
    new = {outcome.name: outcome.now for outcome in outcomes if outcome.now}
    if new or gone:
        baseline.update(asked.baseline, new, keeps=lambda name: name not in gone)
    told = [f"{name}: no longer listed, removed" for name in gone]
    for outcome in outcomes:
        if outcome.now and outcome.then is None:
            told.append(f"{outcome.name}: new")
        elif outcome.change:
            told.append(f"{outcome.name}: {'more' if outcome.change > 0 else 'less'} than before")
    done = f"Wrote {os.path.relpath(asked.baseline)}" if new or gone else "Nothing was written"
    print(f"{done}. {'; '.join(told) or 'No peak changed'}.", file=sys.stderr)


def _show(
    outcomes: Sequence[Outcome], problems: Sequence[str], form: Format, as_json: bool, root: Path, code: int
) -> None:
    from rich.console import Console

    from autobatch.report import check as words
    from autobatch.report import check_formats as formats

    if as_json:
        print(formats.as_json(outcomes, problems, code))
    elif form is Format.MARKDOWN:
        print(formats.as_markdown(outcomes, problems, root), end="")
    elif form is Format.JUNIT:
        print(formats.as_junit(outcomes, problems, root), end="")
    else:
        console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)
        words.print_check(console, outcomes, root)
        for problem in problems:
            console.print(f"autobatch: {problem}", soft_wrap=True)
        console.print(words.summary(outcomes))
    if form is Format.GITHUB and not as_json:
        print(*formats.as_github(outcomes, problems, root), sep="\n")
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            try:
                with open(summary, "a", encoding="utf-8") as file:
                    file.write(formats.as_markdown(outcomes, problems, root))
            except OSError as error:
                print(f"autobatch: the summary {summary} cannot be written: {error.strerror}", file=sys.stderr)
