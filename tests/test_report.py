"""What people look at: the plan on a terminal, as text and in a notebook, and the progress of a search."""

from __future__ import annotations

import io
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from autobatch import DeviceInfo, TrainingPlan, Trial, Verdict
from autobatch.progress import SearchStarted, TrialEnded, TrialStarted
from autobatch.report.live import LiveProgress
from autobatch.report.terminal import plan_text

GIB = 1024**3
TRIALS = (
    Trial(micro_batch_sizes=(2, 2), verdict=Verdict.FITS, peak_bytes=GIB // 2, seconds=0.4),
    Trial(micro_batch_sizes=(38, 38), verdict=Verdict.OVER_BUDGET, peak_bytes=2 * GIB, seconds=3.0),
    Trial(micro_batch_sizes=(40, 40), verdict=Verdict.OUT_OF_MEMORY, requested_bytes=GIB // 4, detail="in backward"),
    Trial(micro_batch_sizes=(37, 36), verdict=Verdict.FITS, peak_bytes=int(1.8 * GIB), seconds=2.9),
)
DEVICE = DeviceInfo(type="cpu", name="Some [bold]CPU[/bold] & <b>more</b>", total_bytes=24 * GIB, free_bytes=22 * GIB)


def make_plan(**changes: Any) -> TrainingPlan:
    fields: dict[str, Any] = {
        "target_batch_size": 256,
        "micro_batch_sizes": (37,) * 4 + (36,) * 3,
        "max_micro_batch_size": 37,
        "max_is_exact": True,
        "peak_bytes": int(1.8 * GIB),
        "limit_bytes": 2 * GIB,
        "budget_bytes": int(2 * GIB * 0.95),
        "headroom": 0.05,
        "verified": True,
        "device": DEVICE,
        "versions": {"torch": "2.13.0"},
        "trials": TRIALS,
        "assumptions": ("Inputs are tokens[n, 128] <script>.",),
        "warnings": ("BatchNorm in [layer1].",),
    }
    return TrainingPlan(**{**fields, **changes})


def rendered(renderable: object, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=120, **options)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("show", [rendered, str], ids=["rich", "text"])
def test_a_plan_shows_the_answer_the_evidence_and_what_was_assumed(show: Any) -> None:
    text = show(make_plan())
    for part in (
        "4 × 37 + 3 × 36 = 256 samples",
        "1.80 GiB",
        "95% of the budget",
        "2 × 38",
        "over budget",
        "out of memory",
        "in backward",
        "Some [bold]CPU[/bold]",
        "tokens[n, 128] <script>",
        "BatchNorm in [layer1]",
        "torch 2.13.0",
    ):
        assert part in text


def test_a_plan_that_needs_no_accumulation_says_so() -> None:
    plan = make_plan(target_batch_size=37, micro_batch_sizes=(37,))
    assert "37 samples per optimizer step, in one micro-batch" in str(plan)


def test_a_single_sample_is_no_samples() -> None:
    trials = (Trial(micro_batch_sizes=(1,), verdict=Verdict.FITS, peak_bytes=int(1.8 * GIB)),)
    text = str(make_plan(target_batch_size=1, micro_batch_sizes=(1,), max_micro_batch_size=1, trials=trials))
    assert "1 sample per optimizer step" in text
    assert "1 sample, all that a step needs" in text


def test_the_budget_adds_up() -> None:
    assert "1.90 GiB: 2.00 GiB less 5% head-room\n" in str(make_plan())
    with_reserve = make_plan(budget_bytes=int(2 * GIB * 0.95) - 24 * 1024**2)
    assert "1.88 GiB: 2.00 GiB less 5% head-room and 24.0 MiB for what trials do not hold" in str(with_reserve)


def test_a_plan_over_ranks_says_whose_share_it_shows() -> None:
    plan = make_plan(target_batch_size=100, world_size=3, rank=1, micro_batch_sizes=(33,), verified=False)
    assert "33 samples per optimizer step, in one micro-batch on rank 1; 100 over 3 ranks" in str(plan)


def test_only_a_verified_plan_claims_that_its_sizes_ran() -> None:
    assert "these very sizes ran" in str(make_plan())
    assert "these very sizes ran" not in str(make_plan(verified=False))


def test_only_a_trial_of_one_more_sample_shows_that_one_more_does_not_fit() -> None:
    assert "one more does not fit" in plan_text(make_plan())
    assert "one more does not fit" not in plan_text(make_plan(trials=TRIALS[:1] + TRIALS[2:]))


def test_the_html_is_well_formed_and_escaped() -> None:
    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    html = make_plan()._repr_html_()
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;more&lt;/b&gt;" in html
    assert "4 × 37 + 3 × 36" in html


def show_a_search(console: Console, quiet: bool = False) -> str:
    with LiveProgress(console, quiet) as live:
        live(SearchStarted(DEVICE, int(1.9 * GIB), 2 * GIB, 256))
        for trial in TRIALS:
            live(TrialStarted(trial.micro_batch_size))
            live(TrialEnded(trial, int(1.9 * GIB)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_progress_is_plain_lines_where_there_is_no_terminal() -> None:
    lines = show_a_search(Console(file=io.StringIO(), width=40)).splitlines()
    assert len(lines) == 1 + len(TRIALS)
    assert lines[1] == "2 × 2: fits, 512.0 MiB (26%), 0.4 s"
    assert "out of memory, could not get 256.0 MiB more" in lines[3]
    assert "\x1b" not in "".join(lines)


def test_progress_on_a_terminal_shows_each_trial_and_what_is_being_tried() -> None:
    shown = show_a_search(Console(file=io.StringIO(), width=100, force_terminal=True))
    assert "Trying micro-batches of 38" in shown
    assert "over budget" in shown
    assert "━" in shown


@pytest.mark.parametrize("width", [60, 80, 100])
def test_progress_keeps_a_number_and_its_unit_together_however_narrow_the_terminal(width: int) -> None:
    shown = show_a_search(Console(file=io.StringIO(), width=width, force_terminal=True))
    for peak in ("512.0 MiB", "2.00 GiB", "1.80 GiB"):
        assert peak in shown


def test_quiet_progress_is_silent() -> None:
    assert show_a_search(Console(file=io.StringIO()), quiet=True) == ""
    assert show_a_search(Console(file=io.StringIO(), force_terminal=True), quiet=True) == ""


def test_printing_takes_no_random_number_not_even_the_first_time():
    code = (
        "import random; before = random.getstate();"
        "from autobatch.report import estimate, notebook, terminal;"
        "assert random.getstate() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
