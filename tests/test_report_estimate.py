"""What people see of an estimate: on a terminal, as text, over several GPUs, and drawn in a page."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from autobatch.errors import InvalidInput
from autobatch.estimates import Estimate, Interval, ModuleBytes, Moment, OperatorBytes, Timeline
from autobatch.report.estimate import alike_together, cards_table, headline, module_rows, source_line
from autobatch.report.timeline import timeline_html
from autobatch.trial import DeviceInfo

GIB = 1024**3
MIB = 1024**2
HOSTILE = """</script><b onclick="x">&amp; 'y' {{data}} <!-- [red]z"""
TIMELINE = Timeline(
    categories=("parameter", "saved activation", "gradient"),
    moments=(
        Moment(phase="batch", operator="aten._to_copy.default", module="", bytes=(8 * GIB, 0, 0)),
        Moment(phase="forward", operator="aten.mm.default", module="layers.0.mlp", bytes=(8 * GIB, 9 * GIB, 0)),
        Moment(phase="backward", operator=HOSTILE, module=HOSTILE, bytes=(8 * GIB, 9 * GIB, GIB // 2)),
        Moment(phase="optimizer", operator="aten._foreach_add_.List", module="", bytes=(8 * GIB, 0, 8 * GIB)),
    ),
    peak=2,
)


def node(path: str, own: int, *children: ModuleBytes) -> ModuleBytes:
    return ModuleBytes(path=path, own_bytes=own, bytes=own + sum(child.bytes for child in children), children=children)


def operator(module: str, held: int, tensors: int = 1, line: str = "/home/me/models/decoder.py:41") -> OperatorBytes:
    return OperatorBytes(
        operator="aten.mm.default",
        module=module,
        line=line,
        category="saved activation",
        bytes=held,
        tensors=tensors,
    )


def make_estimate(**changes: Any) -> Estimate:
    layers = [node(f"layers.{i}", 4 * GIB, node(f"layers.{i}.mlp", 4 * GIB)) for i in range(2)]
    fields: dict[str, Any] = {
        "device": DeviceInfo(type="simulated", name="NVIDIA GeForce RTX 4090", total_bytes=24 * GIB),
        "batch_size": 64,
        "accumulation": False,
        "precision": "bf16",
        "allocated_peak_bytes": int(17.5 * GIB) + 512,
        "capacity_bytes": int(17.75 * GIB),
        "reserved_peak_bytes": 19 * GIB,
        "context": Interval(likely=GIB // 2, low=GIB // 4, high=GIB),
        "device_total": Interval(likely=int(18.25 * GIB), low=18 * GIB, high=int(18.75 * GIB)),
        "limit_bytes": int(23.5 * GIB),
        "headroom": 0.08,
        "largest_micro_batch": 81,
        "by_category": {"saved activation": 9 * GIB, "parameter": 8 * GIB, "gradient": GIB // 2},
        "by_module": node("", GIB, node("layers", 0, *layers), node("head", GIB // 2)),
        "by_operator": (operator("head", 6 * GIB), operator(HOSTILE, 3 * GIB, 7)),
        "timeline": TIMELINE,
        "versions": {"torch": "2.13.0"},
        "assumptions": ("Inputs are tokens[n, 128].",),
        "warnings": (HOSTILE,),
    }
    return Estimate(**{**fields, **changes})


def rendered(renderable: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


class Page(HTMLParser):
    """What a browser would find in a page: text outside scripts, scripts by their id, and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.scripts: list[tuple[str | None, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs).get("id"), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            name, text = self.scripts[-1]
            self.scripts[-1] = name, text + data
        else:
            self.text += data


@pytest.mark.parametrize("show", [rendered, str], ids=["rich", "text"])
def test_an_estimate_shows_every_figure_and_that_it_is_predicted(show: Any) -> None:
    text = show(make_estimate())
    for part in (
        "64 samples on NVIDIA GeForce RTX 4090: 18.25 GiB predicted, fits in 23.50 GiB",
        "18.25 GiB (between 18.00 GiB and 18.75 GiB)",
        "17.50 GiB in live tensors",
        "17.75 GiB: with less",
        "19.00 GiB",
        "512.0 MiB (between 256.0 MiB and 1.00 GiB)",
        "23.50 GiB less 8% head-room = 21.62 GiB; 3.37 GiB left",
        "81 samples",
        "not run on such a GPU",
        "torch 2.13.0",
        "saved activation",
        "(batch, loss and optimizer)",
        "models/decoder.py:41",
        "in 7 tensors",
        "Inputs are tokens[n, 128].",
        "[red]z",
    ):
        assert part in text
    assert "/home/me" not in text
    assert "accum" not in text
    assert "earlier micro-batches" in show(make_estimate(accumulation=True))


def test_the_headline_tells_too_little_memory_from_too_little_head_room() -> None:
    assert headline(make_estimate()).endswith("fits in 23.50 GiB")
    assert headline(make_estimate(headroom=0.25)).endswith("does not fit in 23.50 GiB with 25% head-room")
    assert headline(make_estimate(limit_bytes=18 * GIB)).endswith("does not fit in 18.00 GiB")


def test_the_limit_says_what_is_missing_and_where_the_interval_reaches_above_it() -> None:
    assert "256.0 MiB too little" in str(make_estimate(limit_bytes=18 * GIB, headroom=0.0))
    tight = make_estimate(limit_bytes=int(18.5 * GIB), headroom=0.0)
    assert tight.fits and "upper end of the interval is above the limit" in str(tight)
    assert "upper end" not in str(make_estimate())


def test_where_nothing_fits_the_largest_size_is_none() -> None:
    none = make_estimate(largest_micro_batch=None)
    assert "not even 1 sample fits" in str(none)
    assert "none" in rendered(cards_table([none]))


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_panel_keeps_within_a_terminal_and_loses_no_amount(width: int) -> None:
    lines = rendered(make_estimate(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.startswith("│   9.00 GiB  51%") and "saved" in line for line in lines)
    assert "…" not in "".join(lines)


def test_small_modules_stand_in_one_row_and_the_rows_add_up() -> None:
    small = [node(f"small{i}", MIB) for i in range(12)]
    rows = list(module_rows(node("", 0, *small, node("big", GIB), node("bigger", 2 * GIB))))
    assert [(row.depth, row.name) for row in rows] == [(0, "the step"), (1, "bigger"), (1, "big"), (1, "… 12 more")]
    assert rows[0].bytes == sum(row.bytes for row in rows[1:])


def test_the_bytes_of_a_module_itself_stand_among_those_of_its_children() -> None:
    rows = module_rows(node("", 0, node("a", 3 * GIB, node("a.x", 4 * GIB), node("a.y", 2 * GIB))))
    assert [row.name for row in rows] == ["the step", "a", "x", "(itself)", "y"]


def test_many_equal_layers_are_told_though_none_matters_by_itself() -> None:
    layers = node("layers", 0, *(node(f"layers.{i}", GIB) for i in range(96)))
    assert [row.name for row in module_rows(node("", 0, layers))] == ["the step", "layers", "… 96 of at most 1.00 GiB"]


def test_the_tree_of_a_deep_model_is_cut() -> None:
    path = ".".join("abcdefgh")
    deep = node(path, GIB)
    while deep.path:
        deep = node(deep.path.rpartition(".")[0], 0, deep)
    assert [(row.depth, row.name) for row in module_rows(deep)][1:] == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]


def test_operators_of_equal_layers_are_one_row_but_names_with_digits_stay_apart() -> None:
    groups = [operator(f"layers.{i}.mlp", GIB, tensors=2) for i in range(24)]
    groups += [operator("conv1", 30 * GIB), operator("conv2", 2 * GIB), operator("layers.3.norm", MIB)]
    groups += [operator("0", GIB // 2), operator("2", GIB // 4)]  # parts of a plain sequence have no other name
    found = [(group.module, group.bytes, group.tensors) for group in alike_together(groups)]
    assert found == [
        ("conv1", 30 * GIB, 1),
        ("layers.*.mlp", 24 * GIB, 48),
        ("conv2", 2 * GIB, 1),
        ("0", GIB // 2, 1),
        ("2", GIB // 4, 1),
        ("layers.3.norm", MIB, 1),
    ]


def test_operators_of_other_lines_stay_apart() -> None:
    groups = [operator("layers.0", GIB, line="a.py:1"), operator("layers.1", GIB, line="a.py:2")]
    assert alike_together(groups) == groups


def test_a_source_line_names_the_file_and_its_folder_on_any_system() -> None:
    assert source_line("C:\\Users\\me\\models\\decoder.py:41") == "models/decoder.py:41"
    assert source_line("") == ""


@pytest.mark.parametrize("width", [60, 100])
def test_the_table_of_gpus_has_a_row_for_each(width: int) -> None:
    small = make_estimate(
        device=DeviceInfo(type="simulated", name="Tesla T4", total_bytes=15 * GIB),
        limit_bytes=15 * GIB,
        largest_micro_batch=50,
    )
    text = rendered(cards_table([make_estimate(), small]), width)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if "18.25 GiB" in line}
    assert rows["NVIDIA"][-7:] == ["23.50", "GiB", "64", "18.25", "GiB", "yes", "81"]
    assert rows["Tesla"] == ["Tesla", "T4", "15.00", "GiB", "64", "18.25", "GiB", "no", "50"]
    assert "Predicted" in text and "leaves 8% free" in " ".join(text.split())


def test_the_page_needs_nothing_but_itself() -> None:
    html = timeline_html(make_estimate(by_operator=(), warnings=()))
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    page = Page(html)
    fetched = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert fetched == ["data:,"]
    assert any("default-src 'none'" in value for _, name, value in page.attributes if name == "content")


def test_every_place_of_the_template_is_filled() -> None:
    plain = TIMELINE.model_copy(update={"moments": TIMELINE.moments[:2], "peak": 1})
    assert "{{" not in timeline_html(make_estimate(timeline=plain, by_operator=(), warnings=()))


def test_the_page_carries_the_timeline_whatever_its_names() -> None:
    estimate = make_estimate()
    page = Page(timeline_html(estimate))
    (name, text), (_, program) = page.scripts
    assert name == "estimate" and "addEventListener" in program
    data = json.loads(text)
    assert Timeline.model_validate_json(json.dumps(data["timeline"])) == estimate.timeline
    assert data["limit_bytes"] == estimate.limit_bytes and data["context"]["likely"] == GIB // 2


def test_names_are_text_and_never_markup() -> None:
    hostile = OperatorBytes(operator=HOSTILE, module=HOSTILE, line=HOSTILE, category=HOSTILE, bytes=GIB, tensors=1)
    timeline = TIMELINE.model_copy(update={"categories": (HOSTILE, "saved activation", "gradient")})
    estimate = make_estimate(
        device=DeviceInfo(type="simulated", name=HOSTILE, total_bytes=24 * GIB),
        by_module=node("", GIB, node(HOSTILE, GIB)),
        by_operator=(hostile,),
        timeline=timeline,
        versions={"torch": HOSTILE},
        assumptions=(HOSTILE,),
    )
    page = Page(timeline_html(estimate))
    # Title, headline, legend, versions, module, assumption, warning; category, name, module and line of an operator.
    assert page.text.count(HOSTILE) == 11
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert len(page.scripts) == 2


def test_the_page_has_its_facts_and_tables_without_scripts() -> None:
    page = Page(timeline_html(make_estimate()))
    for part in (
        "needs JavaScript",
        "18.25 GiB predicted, fits in 23.50 GiB",
        "18.25 GiB (between 18.00 GiB and 18.75 GiB)",
        "saved activation 9.00\xa0GiB",
        "which leaves 23.00\xa0GiB for the allocator; shaded below it: the head-room of 8%",
        "mlp4.00\xa0GiB22.9%",
        "(itself)4.00\xa0GiB22.9%",
        "aten.mm.defaultheadmodels/decoder.py:41",
    ):
        assert part in page.text


def test_operators_beyond_those_that_are_listed_are_counted() -> None:
    names = ["".join(chr(97 + int(digit)) for digit in str(i)) for i in range(1000, 1203)]
    page = Page(timeline_html(make_estimate(by_operator=tuple(operator(name, MIB) for name in names))))
    assert page.text.count("aten.mm.default") == 200
    assert "… 3 more hold 3.0\xa0MiB." in page.text


def test_a_step_without_allocations_still_makes_a_page_and_a_panel() -> None:
    empty = make_estimate(
        timeline=Timeline(categories=(), moments=(), peak=0), by_category={}, by_operator=(), by_module=node("", 0)
    )
    assert "At the peak" not in rendered(empty)
    assert "18.25 GiB predicted" in Page(timeline_html(empty)).text


def test_a_page_is_written_whole_or_the_reason_is_told(tmp_path: Path) -> None:
    make_estimate().save_html(str(tmp_path / "out.html"))
    assert (tmp_path / "out.html").read_text(encoding="utf-8") == timeline_html(make_estimate())
    with pytest.raises(InvalidInput, match=r"could not be written to .*No such file"):
        make_estimate().save_html(str(tmp_path / "missing" / "out.html"))
