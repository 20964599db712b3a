"""What people see while a search runs: each trial with its verdict, and its peak against the budget."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autobatch.progress import ProgressEvent, SearchStarted, TrialEnded, TrialStarted
from autobatch.report import words
from autobatch.report.terminal import trial_cells, trial_line
from autobatch.units import format_bytes

ROW_WIDTH = 80
"""Columns of a terminal from which on a trial is shown with its bar; a narrower one gets a line of text."""


class LiveProgress:
    """Shows a search on `console`: moving on a terminal, plain lines elsewhere, nothing if `quiet`.

    A context manager whose instance is the `progress` to pass to `fit`.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._status = console.status("Reading the model …") if console.is_terminal and not quiet else None

    def __enter__(self) -> LiveProgress:
        if self._status:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()

    def say(self, line: str) -> None:
        """Print a line above what moves."""
        if not self._quiet:
            self._console.print(Text(line), soft_wrap=True)

    def __call__(self, event: ProgressEvent) -> None:
        """Show one event of `fit`."""
        if isinstance(event, SearchStarted):
            self.say(
                f"{words.device_in_words(event.device)}; budget {format_bytes(event.budget_bytes)} "
                f"of {format_bytes(event.limit_bytes)}; micro-batches up to {event.cap}"
            )
            self._doing("Starting the first trial …")
        elif isinstance(event, TrialStarted):
            self._doing(f"Trying micro-batches of {event.micro_batch_size} …")
        elif isinstance(event, TrialEnded):
            if self._status and self._console.width >= ROW_WIDTH:
                self._console.print(_row(event))
            else:
                self.say(trial_line(event.trial, event.budget_bytes))
            self._doing("Choosing the next size …")

    def _doing(self, what: str) -> None:
        if self._status:
            self._status.update(what)


def _row(event: TrialEnded) -> Table:
    row = Table.grid(padding=(0, 2))  # Rows are printed one by one, so fixed widths keep them in columns.
    for width, justify in ((12, "left"), (13, "left"), (10, "right"), (20, "left"), (8, "right"), (None, "left")):
        row.add_column(width=width, justify=justify, no_wrap=justify == "right")  # type: ignore[arg-type]
    row.add_row(*trial_cells(event.trial, event.budget_bytes))
    return row
