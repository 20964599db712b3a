"""A plan on a terminal, and as plain text."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autobatch.plan import TrainingPlan
from autobatch.report import words
from autobatch.trial import Trial, Verdict
from autobatch.units import format_bytes

VERDICT_STYLES = {
    Verdict.FITS: "green",
    Verdict.OVER_BUDGET: "yellow",
    Verdict.OUT_OF_MEMORY: "red",
    Verdict.FAILED: "magenta",
}
_BAR_WIDTH = 20


def plan_panel(plan: TrainingPlan) -> RenderableType:
    """The whole plan as a rich renderable: the answer, the evidence, and what was assumed."""
    about = Table.grid(padding=(0, 2))
    about.add_column(style="dim")
    about.add_column(overflow="fold")
    for label, text in words.facts(plan):
        if label == "peak":
            bar = memory_bar(plan.peak_bytes, plan.budget_bytes, VERDICT_STYLES[Verdict.FITS])
            about.add_row(label, _beside(bar, Text(text)))
        else:
            about.add_row(label, Text(text, style="yellow" if label == "evidence" and not plan.verified else ""))
    parts: list[RenderableType] = [Text(words.headline(plan), style="bold"), Text(), about]
    if plan.trials:
        parts += [Text(), trials_table(plan.trials, plan.budget_bytes)]
    parts += _bullets("Assumed", plan.assumptions, "cyan") + _bullets("Warnings", plan.warnings, "yellow")
    return Panel(Group(*parts), title="[bold]Training plan[/]", title_align="left", padding=(1, 2), expand=False)


def plan_text(plan: TrainingPlan) -> str:
    """The whole plan as plain text, for logs."""
    lines = [f"Training plan: {words.headline(plan)}"]
    lines += [f"  {label:<10} {text}" for label, text in words.facts(plan)]
    if plan.trials:
        lines.append("Trials:")
        lines += [f"  {trial_line(trial, plan.budget_bytes)}" for trial in plan.trials]
    for title, sentences in (("Assumed", plan.assumptions), ("Warnings", plan.warnings)):
        if sentences:
            lines += [f"{title}:", *(f"  - {sentence}" for sentence in sentences)]
    return "\n".join(lines)


def trial_line(trial: Trial, budget_bytes: int) -> str:
    """One trial as one line of plain text."""
    line = f"{words.sizes_in_words(trial.micro_batch_sizes)}: {words.verdict_in_words(trial)}, "
    line += f"{words.peak_in_words(trial, budget_bytes)}, {trial.seconds:.1f} s"
    return line + (f" ({trial.detail})" if trial.detail else "")


def trials_table(trials: tuple[Trial, ...], budget_bytes: int) -> Table:
    """All trials in the order in which they ran."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("trial", overflow="fold")
    table.add_column("verdict")
    table.add_column("peak", justify="right")
    table.add_column(f"of {format_bytes(budget_bytes)}")
    table.add_column("time", justify="right")
    if any(trial.detail or trial.requested_bytes for trial in trials):
        table.add_column("what happened", style="dim")
    for trial in trials:
        table.add_row(*trial_cells(trial, budget_bytes)[: len(table.columns)])
    return table


def trial_cells(trial: Trial, budget_bytes: int) -> tuple[RenderableType, ...]:
    """A trial as cells: micro-batches, verdict, peak, the peak against the budget as a bar, time, detail."""
    style = VERDICT_STYLES[trial.verdict]
    peak = format_bytes(trial.peak_bytes) if trial.peak_bytes is not None else "unknown"
    bar: RenderableType = memory_bar(trial.peak_bytes, budget_bytes, style) if trial.peak_bytes is not None else ""
    verdict = Text(words.verdict_in_words(trial), style=style)
    detail = trial.detail or (words.peak_in_words(trial, budget_bytes) if trial.requested_bytes is not None else "")
    return words.sizes_in_words(trial.micro_batch_sizes), verdict, peak, bar, f"{trial.seconds:.1f} s", Text(detail)


def memory_bar(used_bytes: int, budget_bytes: int, style: str) -> ProgressBar:
    """How much of a budget is used; full where it is more than the budget."""
    return ProgressBar(
        total=budget_bytes, completed=used_bytes, width=_BAR_WIDTH, complete_style=style, finished_style=style
    )


def _beside(bar: RenderableType, text: Text) -> Table:
    row = Table.grid(padding=(0, 2))
    row.add_row(bar, text)
    return row


def _bullets(title: str, sentences: tuple[str, ...], style: str) -> list[RenderableType]:
    if not sentences:
        return []
    grid = Table.grid(padding=(0, 1))
    for sentence in sentences:
        grid.add_row("•", escape(sentence))
    return [Text(), Text(title, style=style), grid]
