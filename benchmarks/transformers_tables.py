"""Predicted memory of transformers beside what others measured: `python -m benchmarks.transformers_tables [TABLE ...]`.

The rows in `transformers_tables.json` are figures that the authors of frameworks published, with all that defines the
training step. Each step is rebuilt (`lit_step`, `peft_llama`) and traced without a GPU, and its predicted peak is
printed beside the figure. Nothing is fitted, except where a row says that it is; such rows do not count. `--explain`
adds what is alive at each peak.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, Literal

from autobatch.prediction.replay import replay
from autobatch.prediction.trace import Phase, Trace
from autobatch.prediction.traced import TracedStep
from autobatch.prediction.tracing import traced
from benchmarks.decoder import Adapters, Architecture
from benchmarks.lit_step import LitFineTuning
from benchmarks.peft_llama import PeftFineTuning

DATA = Path(__file__).with_suffix(".json")
TOLERANCE = 0.08
"""How far a prediction may be off."""


@dataclass(frozen=True)
class Row:
    """One published figure, and the step it was measured on."""

    name: str
    recipe: LitFineTuning | PeftFineTuning
    samples: int
    """Of a micro-batch."""
    accumulation: int
    """Micro-batches of an optimizer step."""
    measured_bytes: int
    fitted: bool
    """Whether something that its authors do not say was chosen so that this row is met."""


@dataclass(frozen=True)
class Table:
    """The figures of one source."""

    name: str
    title: str
    source: str
    """Where they were published, at a commit."""
    measure: Literal["max_memory_allocated", "max_memory_reserved"]
    """The function of `torch.cuda` that was read."""
    peak: Literal["first micro-batch", "steady step"]
    """When it was reached."""
    why: str
    """Why then, and what else there is to know."""
    rows: tuple[Row, ...]


def read_tables() -> list[Table]:
    """The tables that are known."""
    data = json.loads(DATA.read_text())
    models = {name: Architecture(**numbers) for name, numbers in data["models"].items()}

    def recipe_of(row: dict[str, Any]) -> LitFineTuning | PeftFineTuning:
        if "trained" in row:
            adapters = row.get("adapters", {"rank": 0, "layers": ()})
            return PeftFineTuning(row["trained"], row["length"], adapters["rank"], tuple(adapters["layers"]))
        adapters = row["adapters"]
        chosen = Adapters(**{**adapters, "parts": tuple(adapters["parts"])}) if adapters else None
        return LitFineTuning(models[row["model"]], chosen, row["length"])

    def row_of(row: dict[str, Any], unit_bytes: int) -> Row:
        return Row(
            name=row["name"],
            recipe=recipe_of(row),
            samples=row["samples"],
            accumulation=row.get("accumulation", 1),
            measured_bytes=round(row["figure"] * unit_bytes),
            fitted=row.get("fitted", False),
        )

    def table_of(table: dict[str, Any]) -> Table:
        unit_bytes = table.pop("unit_bytes")
        return Table(**{**table, "rows": tuple(row_of(row, unit_bytes) for row in table["rows"])})

    return [table_of(table) for table in data["tables"]]


def trace_of(row: Row, table: Table, steps: TracedStep) -> Trace:
    """What happens until the figure of a row is reached, and after."""
    if table.peak == "steady step":
        return steps.of_sizes((row.samples,) * min(row.accumulation, 2))
    trace = steps.of_sizes((row.samples,))
    phases = (trace.sites[event].phase if event >= 0 else None for event in trace.events)
    end = next(position for position, phase in enumerate(phases) if phase is Phase.OPTIMIZER)
    return replace(trace, events=trace.events[:end])


def alive_at(trace: Trace, position: int) -> Iterator[tuple[int, str]]:
    """Bytes by category, phase and operator, the most first."""
    count: Counter[str] = Counter()
    for i in trace.alive_at(position):
        site = trace.sites[i]
        operator = "" if site.phase is Phase.SETUP else f"{site.phase.value}: {site.operator}"
        count[f"{site.category.value:18} {operator}"] += trace.sizes[i]
    return ((size, what) for what, size in count.most_common())


def judge(table: Table, explain: bool) -> Iterator[float]:
    """Print each row, and give predicted over measured for those that count."""
    print(f"\n{table.name}. {table.title}\n{table.source}")
    print(f"torch.cuda.{table.measure}() in the {table.peak}: {table.why}\n")
    print(f"{'':30} {'measured':>11} {'predicted':>11} {'ratio':>6} {'seconds':>8}")
    for recipe, rows in groupby(table.rows, lambda row: row.recipe):  # they differ in their micro-batch only
        began = time.perf_counter()
        with traced(recipe.step()) as steps:
            seconds = time.perf_counter() - began
            for row in rows:
                trace = trace_of(row, table, steps)
                outcome = replay(trace)
                reserved = table.measure == "max_memory_reserved"
                peak = outcome.peak_reserved_bytes if reserved else outcome.peak_allocated_bytes
                ratio = peak / row.measured_bytes
                figures = f"{row.measured_bytes / 1e9:8.2f} GB {peak / 1e9:8.2f} GB {ratio:6.3f} {seconds:8.1f}"
                print(f"{row.name:30} {figures}{'  fitted' if row.fitted else ''}", flush=True)
                if explain:
                    for size, what in alive_at(trace, outcome.peak_position):
                        if size > 0.001 * peak:
                            print(f"    {size / 1e9:8.3f} GB  {what}")
                if not row.fitted:
                    yield ratio


def main() -> None:
    tables = {table.name: table for table in read_tables()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(tables)}; all if none is named")
    parser.add_argument("--explain", action="store_true", help="print what is alive at each peak")
    arguments = parser.parse_args()
    unknown = set(arguments.tables) - set(tables)
    if unknown:
        parser.error(f"there is no table {', '.join(sorted(unknown))}; there are {', '.join(tables)}")
    ratios: list[float] = []
    for name in arguments.tables or tables:
        try:
            ratios += judge(tables[name], arguments.explain)
        except ImportError as error:
            print(f"not judged, as the model's library is not there: {error}")
    if not ratios:
        return
    errors = [abs(ratio - 1) for ratio in ratios]
    within = sum(error <= TOLERANCE for error in errors)
    print(f"\n{len(ratios)} rows: {within} within {TOLERANCE:.0%} ({within / len(ratios):.0%}), ", end="")
    print(f"median error {median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    main()
