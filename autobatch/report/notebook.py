"""A plan as a small piece of HTML that stands alone: no script, no file beside it, light and dark."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from autobatch.plan import TrainingPlan
from autobatch.report import words
from autobatch.trial import Trial, Verdict
from autobatch.units import format_bytes

_STYLE = """
.autobatch-plan { font: 14px/1.45 system-ui, sans-serif; max-width: 46em; padding: 1em 1.25em; border-radius: 8px;
  border: 1px solid #8886; color: inherit; }
.autobatch-plan h3 { margin: 0 0 .6em; font-size: 1.15em; }
.autobatch-plan h4 { margin: 1em 0 .2em; font-size: 1em; }
.autobatch-plan table { border-collapse: collapse; margin: .6em 0; background: none; }
.autobatch-plan th, .autobatch-plan td { padding: .15em 1em .15em 0; text-align: left; border: 0; background: none;
  color: inherit; vertical-align: middle; }
.autobatch-plan th { font-weight: normal; opacity: .7; }
.autobatch-plan .trials td { white-space: nowrap; } .autobatch-plan .trials td:last-child { white-space: normal; }
.autobatch-plan td.number { text-align: right; font-variant-numeric: tabular-nums; }
.autobatch-plan ul { margin: 0; padding-left: 1.3em; }
.autobatch-plan .bar { display: inline-block; width: 10em; height: .6em; border-radius: .3em; background: #8884;
  overflow: hidden; vertical-align: middle; }
.autobatch-plan .bar i { display: block; height: 100%; background: currentColor; }
.autobatch-plan .fits { color: #1a7f37; } .autobatch-plan .over_budget { color: #9a6700; }
.autobatch-plan .out_of_memory { color: #cf222e; } .autobatch-plan .failed { color: #8250df; }
@media (prefers-color-scheme: dark) {
  .autobatch-plan .fits { color: #3fb950; } .autobatch-plan .over_budget { color: #d29922; }
  .autobatch-plan .out_of_memory { color: #f85149; } .autobatch-plan .failed { color: #a371f7; }
}
"""


def plan_html(plan: TrainingPlan) -> str:
    """The whole plan as HTML: the answer, the evidence, and what was assumed. All text is escaped."""
    facts = "".join(f"<tr><th>{escape(label)}</th><td>{escape(text)}</td></tr>" for label, text in words.facts(plan))
    parts = [
        f"<style>{_STYLE}</style>",
        f"<h3>{escape(words.headline(plan))}</h3>",
        _bar(plan.peak_bytes, plan.budget_bytes, Verdict.FITS),
        f"<table>{facts}</table>",
        _trials(plan.trials, plan.budget_bytes),
        _bullets("Assumed", plan.assumptions),
        _bullets("Warnings", plan.warnings),
    ]
    return f'<div class="autobatch-plan">{"".join(parts)}</div>'


def _trials(trials: Iterable[Trial], budget_bytes: int) -> str:
    rows = "".join(
        f"<tr><td>{escape(words.sizes_in_words(trial.micro_batch_sizes))}</td>"
        f'<td class="{trial.verdict.value}">{escape(words.verdict_in_words(trial))}</td>'
        f"<td>{_bar(trial.peak_bytes, budget_bytes, trial.verdict) if trial.peak_bytes is not None else ''}</td>"
        f"<td>{escape(words.peak_in_words(trial, budget_bytes))}</td>"
        f'<td class="number">{trial.seconds:.1f} s</td><td>{escape(trial.detail)}</td></tr>'
        for trial in trials
    )
    if not rows:
        return ""
    heads = ("trial", "verdict", f"of {format_bytes(budget_bytes)}", "peak", "time", "")
    head = "".join(f"<th>{escape(head)}</th>" for head in heads)
    return f'<table class="trials"><tr>{head}</tr>{rows}</table>'


def _bar(used_bytes: int, budget_bytes: int, verdict: Verdict) -> str:
    width = min(used_bytes / budget_bytes, 1)
    return f'<span class="bar {verdict.value}"><i style="width:{width:.1%}"></i></span>'


def _bullets(title: str, sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<h4>{title}</h4><ul>{items}</ul>" if items else ""
