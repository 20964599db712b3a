"""An estimate in words, on a terminal and as plain text, and several of them side by side: which card do I need?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from autobatch.estimates import Estimate, Interval, ModuleBytes, OperatorBytes
from autobatch.report.terminal import memory_bar
from autobatch.report.words import samples_in_words
from autobatch.units import format_bytes

OPERATORS = 10
"""So many of the largest operators are shown."""
_DEPTH = 4
_CHILDREN = 6
_LEAST_SHARE = 0.03
"""A module with less of the peak is not shown by itself."""
_INDENT = "  "
_EVIDENCE = {
    "predicted": "predicted from a traced step, not run on such a GPU",
    "measured": "the peaks are those of a real step on this GPU; where they are from is predicted",
}
_NUMBER = re.compile(r"(?<=\.)\d+(?![^.])")
"""A number that is a whole part of a path, such as in `layers.3.weight`; but the first part says too much to go."""


@dataclass(frozen=True)
class ModuleRow:
    """A line of the module tree that is cut to what matters."""

    depth: int
    name: str
    bytes: int


def headline(estimate: Estimate) -> str:
    """The answer in one line: how much is predicted for which step and GPU, and whether it fits."""
    need = f"{format_bytes(estimate.device_total.likely)} {estimate.evidence}"
    limit = format_bytes(estimate.limit_bytes)
    if estimate.fits:
        verdict = f"fits in {limit}"
    elif estimate.device_total.likely <= estimate.limit_bytes:
        verdict = f"does not fit in {limit} with {estimate.headroom:.0%} head-room"
    else:
        verdict = f"does not fit in {limit}"
    return f"{samples_in_words(estimate.batch_size)} on {estimate.device.name}: {need}, {verdict}"


def facts(estimate: Estimate) -> list[tuple[str, str]]:
    """Labels and texts that tell what the answer is made of, and where it is from."""
    gradients = "; gradients of earlier micro-batches are held meanwhile" if estimate.accumulation else ""
    largest = estimate.largest_micro_batch
    most = [("largest micro-batch", "not even 1 sample fits" if largest is None else samples_in_words(largest))]
    return [
        ("device total", f"{_interval(estimate.device_total)}: smallest capacity and context"),
        ("allocated peak", f"{format_bytes(estimate.allocated_peak_bytes)} in live tensors (max_memory_allocated)"),
        ("smallest capacity", f"{format_bytes(estimate.capacity_bytes)}: with less, the caching allocator runs out"),
        (
            "reserved peak",
            f"{format_bytes(estimate.reserved_peak_bytes)} where there is enough of everything (max_memory_reserved)",
        ),
        ("context", f"{_interval(estimate.context)}: CUDA context, kernels, libraries"),
        ("limit", _limit(estimate)),
        *(most if estimate.largest_was_sought else []),
        ("step", f"{samples_in_words(estimate.batch_size)}, {estimate.precision}{gradients}"),
        ("evidence", _EVIDENCE[estimate.evidence]),
        ("versions", ", ".join(f"{name} {version}" for name, version in estimate.versions.items()) or "unknown"),
    ]


def _interval(amount: Interval) -> str:
    likely = format_bytes(amount.likely)
    if amount.low == amount.high:
        return likely
    return f"{likely} (between {format_bytes(amount.low)} and {format_bytes(amount.high)})"


def _limit(estimate: Estimate) -> str:
    budget = int(estimate.limit_bytes * (1 - estimate.headroom))
    left = budget - estimate.device_total.likely
    less = f" less {estimate.headroom:.0%} head-room = {format_bytes(budget)}" if estimate.headroom else ""
    text = f"{format_bytes(estimate.limit_bytes)}{less}; "
    text += f"{format_bytes(left)} left" if left >= 0 else f"{format_bytes(-left)} too little"
    if left >= 0 and estimate.device_total.high > estimate.limit_bytes:
        text += ", but the upper end of the interval is above the limit"
    return text


def module_rows(root: ModuleBytes) -> Iterator[ModuleRow]:
    """The modules that hold most, each below its parent; small ones of a parent, and deep ones, in one row."""
    yield ModuleRow(0, "the step", root.bytes)
    yield from _rows_below(root, 1, root.bytes * _LEAST_SHARE)


def _rows_below(node: ModuleBytes, depth: int, least: float) -> Iterator[ModuleRow]:
    if depth > _DEPTH:
        return
    children = sorted(node.children, key=lambda child: -child.bytes)
    shown = [child for child in children[:_CHILDREN] if child.bytes >= least]
    if shown and len(shown) == len(children) - 1:
        shown = children  # One row for "1 more" is better spent on its name.
    rest = children[len(shown) :]
    own_due = bool(shown) and node.own_bytes >= least
    for child in shown:
        if own_due and child.bytes < node.own_bytes:
            yield ModuleRow(depth, own_name(node), node.own_bytes)
            own_due = False
        yield ModuleRow(depth, name_below(node, child), child.bytes)
        yield from _rows_below(child, depth + 1, least)
    if own_due:
        yield ModuleRow(depth, own_name(node), node.own_bytes)
    held = sum(child.bytes for child in rest)
    if shown and rest:
        yield ModuleRow(depth, f"… {len(rest)} more", held)
    elif held >= least:  # Such as the layers of a deep model: none matters by itself, together they do.
        yield ModuleRow(depth, f"… {len(rest)} of at most {format_bytes(rest[0].bytes)}", held)


def own_name(node: ModuleBytes) -> str:
    """What is called that a module holds besides what its children do."""
    return "(itself)" if node.path else "(batch, loss and optimizer)"


def name_below(parent: ModuleBytes, child: ModuleBytes) -> str:
    """The path of `child` from `parent` on, such as `3` of `layers.3`."""
    return child.path.removeprefix(f"{parent.path}.") if parent.path else child.path


def source_line(line: str) -> str:
    """The end of a `file:line` that is long enough to know the file by, such as `models/decoder.py:41`.

    >>> source_line("/usr/lib/python3/site-packages/models/decoder.py:41"), source_line("train.py:7")
    ('models/decoder.py:41', 'train.py:7')
    """
    return "/".join(line.replace("\\", "/").split("/")[-2:])


def alike_together(groups: Sequence[OperatorBytes]) -> list[OperatorBytes]:
    """Operators whose modules differ in nothing but numbers as one, the largest first: those of `layers.*`."""
    together: dict[tuple[str, str, str, str], list[OperatorBytes]] = {}
    for group in groups:
        key = (_any_number(group.operator), _any_number(group.module), group.line, group.category)
        together.setdefault(key, []).append(group)
    found = [
        same[0]
        if len(same) == 1
        else OperatorBytes(
            operator=operator,
            module=module,
            line=line,
            category=category,
            bytes=sum(group.bytes for group in same),
            tensors=sum(group.tensors for group in same),
        )
        for (operator, module, line, category), same in together.items()
    ]
    return sorted(found, key=lambda group: -group.bytes)


def _any_number(path: str) -> str:
    return _NUMBER.sub("*", path)


def _place(group: OperatorBytes) -> str:
    tensors = f" in {group.tensors} tensors" if group.tensors > 1 else ""
    line = f", {source_line(group.line)}" if group.line else ""
    return f"{group.category}{tensors}, {group.module or 'outside all modules'}{line}"


def estimate_panel(estimate: Estimate) -> RenderableType:
    """The whole estimate as a rich renderable: the answer, what it is made of, and what was assumed."""
    style = "green" if estimate.fits else "red"
    about = Table.grid(padding=(0, 2))
    about.add_column(style="dim")
    about.add_column(overflow="fold")
    for label, text in facts(estimate):
        about.add_row(label, Text(text, style="yellow" if label == "evidence" else ""))
    parts: list[RenderableType] = [Text(headline(estimate), style=f"bold {style}"), Text(), about]

    total = estimate.by_module.bytes
    if estimate.by_category:
        rows = _bars((category, held, total) for category, held in estimate.by_category.items())
        parts += [Text(), Text("At the peak, by category", style="bold"), rows]
    if total:
        indented = ((_INDENT * row.depth + row.name, row.bytes, total) for row in module_rows(estimate.by_module))
        parts += [Text(), Text("At the peak, by module", style="bold"), _bars(indented)]
    if groups := alike_together(estimate.by_operator)[:OPERATORS]:
        parts += [Text(), Text(_largest(groups), style="bold"), _operators(groups)]
    for title, sentences, colour in (("Assumed", estimate.assumptions, "cyan"), ("Warnings", estimate.warnings, "red")):
        if sentences:
            bullets = Table.grid(padding=(0, 1))
            for sentence in sentences:
                bullets.add_row("•", Text(sentence))
            parts += [Text(), Text(title, style=colour), bullets]
    return Panel(Group(*parts), title="[bold]Predicted memory[/]", title_align="left", padding=(1, 2), expand=False)


def _bars(rows: Iterator[tuple[str, int, int]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column()
    grid.add_column(overflow="fold", ratio=1)
    for name, held, total in rows:
        grid.add_row(format_bytes(held), _share(held, total), memory_bar(held, total, "blue"), Text(name))
    return grid


def _operators(groups: Sequence[OperatorBytes]) -> Table:
    # Two lines for each, because operator, module and line do not fit beside each other on a narrow terminal.
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for group in groups:
        what = Text.assemble(group.operator, "\n", (_place(group), "dim"))
        grid.add_row(format_bytes(group.bytes), what)
    return grid


def _largest(groups: Sequence[OperatorBytes]) -> str:
    return f"At the peak, the {f'{len(groups)} largest operators' if len(groups) > 1 else 'largest operator'}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""


def estimate_text(estimate: Estimate) -> str:
    """The whole estimate as plain text, for logs."""
    total = estimate.by_module.bytes
    lines = [f"Predicted memory: {headline(estimate)}"]
    lines += [f"  {label:<19} {text}" for label, text in facts(estimate)]
    if estimate.by_category:
        lines.append("At the peak, by category:")
        lines += [_row(held, total, category) for category, held in estimate.by_category.items()]
    if total:
        lines.append("At the peak, by module:")
        lines += [_row(row.bytes, total, _INDENT * row.depth + row.name) for row in module_rows(estimate.by_module)]
    if groups := alike_together(estimate.by_operator)[:OPERATORS]:
        lines.append(f"{_largest(groups)}:")
        lines += [_row(group.bytes, total, f"{group.operator}: {_place(group)}") for group in groups]
    for title, sentences in (("Assumed", estimate.assumptions), ("Warnings", estimate.warnings)):
        if sentences:
            lines += [f"{title}:", *(f"  - {sentence}" for sentence in sentences)]
    return "\n".join(lines)


def _row(held: int, total: int, name: str) -> str:
    return f"  {format_bytes(held):>10} {_share(held, total):>4}  {name}"


def cards_table(estimates: Sequence[Estimate]) -> Table:
    """One row per GPU: what is predicted there, whether it fits, and the most samples that do."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")
    table.caption = _caption(estimates)
    table.add_column("GPU", min_width=10)
    for head in ("limit", "samples", "predicted"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    table.add_column("largest", justify="right", no_wrap=True)
    for estimate in estimates:
        table.add_row(
            Text(estimate.device.name),
            format_bytes(estimate.limit_bytes),
            str(estimate.batch_size),
            format_bytes(estimate.device_total.likely),
            Text("yes", style="green") if estimate.fits else Text("no", style="red"),
            "none" if estimate.largest_micro_batch is None else str(estimate.largest_micro_batch),
        )
    return table


def _caption(estimates: Sequence[Estimate]) -> str:
    rooms = sorted({estimate.headroom for estimate in estimates})
    kept = f"; what fits leaves {' or '.join(f'{room:.0%}' for room in rooms)} free" if any(rooms) else ""
    return f"Predicted from a traced step, not run on these GPUs{kept}. Largest: the most samples that fit."
