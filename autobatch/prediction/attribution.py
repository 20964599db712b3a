"""Whose the bytes at the peak of a trace are, and how they came and went."""

from __future__ import annotations

from collections import defaultdict

from autobatch.estimates import ModuleBytes, Moment, OperatorBytes, Origin, PhasePeak, Timeline
from autobatch.prediction.trace import Category, Phase, Site, Trace

_TO_STAY = (
    Category.PARAMETER,
    Category.BUFFER,
    Category.GRADIENT,
    Category.OPTIMIZER_STATE,
    Category.WORKSPACE,
)
"""What is meant to be there when a step begins."""

MOMENTS = 2000
"""Points of a timeline; more cannot be told apart on a screen."""


def by_category(trace: Trace, position: int) -> dict[str, int]:
    """Bytes alive after the event at `position`, as requested, by category, the most first."""
    total: dict[str, int] = defaultdict(int)
    for i in trace.alive_at(position):
        total[trace.sites[i].category.value] += trace.sizes[i]
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def by_operator(trace: Trace, position: int) -> tuple[OperatorBytes, ...]:
    """The same by operator, module and line, the most first."""
    groups: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for i in trace.alive_at(position):
        site = trace.sites[i]
        groups[site.operator, site.module, site.line, site.category.value].append(trace.sizes[i])
    found = [
        OperatorBytes(
            operator=operator, module=module, line=line, category=category, bytes=sum(sizes), tensors=len(sizes)
        )
        for (operator, module, line, category), sizes in groups.items()
    ]
    return tuple(sorted(found, key=lambda group: (-group.bytes, group.module, group.operator, group.line)))


def by_module(trace: Trace, position: int) -> ModuleBytes:
    """The same as a tree of modules."""
    own: dict[str, int] = defaultdict(int)
    for i in trace.alive_at(position):
        own[trace.sites[i].module] += trace.sizes[i]
    children: dict[str, set[str]] = defaultdict(set)
    for path in own:
        while path:
            parent = path.rpartition(".")[0]
            children[parent].add(path)
            path = parent

    def tree(path: str) -> ModuleBytes:
        below = sorted((tree(child) for child in children[path]), key=lambda node: (-node.bytes, node.path))
        return ModuleBytes(
            path=path, own_bytes=own[path], bytes=own[path] + sum(c.bytes for c in below), children=tuple(below)
        )

    return tree("")


def phase_peaks(trace: Trace) -> dict[Phase, int]:
    """The event of the steady step after which most is alive, for each of its phases, in order."""
    found: dict[Phase, tuple[int, int]] = {}
    phase = Phase.BATCH
    for position, (event, alive) in enumerate(zip(trace.events, trace.allocated_bytes(), strict=True)):
        if position < trace.steady_from or event < 0:
            continue
        phase = trace.sites[event].phase
        if phase not in found or alive > found[phase][0]:
            found[phase] = alive, position
    return {phase: position for phase, (_, position) in found.items()}


def phase_peak(trace: Trace, position: int) -> PhasePeak:
    """What is there after the event at `position`, which made something."""
    site = trace.sites[trace.events[position]]
    return PhasePeak(module=site.module, operator=site.operator, by_category=by_category(trace, position))


def origins(trace: Trace, positions: dict[Phase, int]) -> tuple[Origin, ...]:
    """Everything made in the steady step or alive when it begins, by module, operator and phase, and what of it is
    alive after the events at `positions`."""
    groups: dict[tuple[str, str, str, bool], list[int]] = defaultdict(list)
    for i in trace.alive_at(trace.steady_from - 1):
        site = trace.sites[i]
        groups[site.module, site.operator, site.phase.value, site.category not in _TO_STAY].append(i)
    for i in trace.events[trace.steady_from :]:
        if i >= 0:
            site = trace.sites[i]
            groups[site.module, site.operator, site.phase.value, False].append(i)
    alive = {phase.value: set(trace.alive_at(position)) for phase, position in positions.items()}
    return tuple(_origin(trace, key, storages, alive) for key, storages in groups.items())


def _origin(trace: Trace, key: tuple[str, str, str, bool], storages: list[int], alive: dict[str, set[int]]) -> Origin:
    module, operator, phase, earlier = key
    there = {name: [i for i in storages if i in now] for name, now in alive.items()}
    largest = trace.sites[max(storages, key=lambda i: (any(i in now for now in alive.values()), trace.sizes[i]))]
    return Origin(
        module=module,
        operator=operator,
        phase=phase,
        earlier=earlier,
        category=largest.category.value,
        line=largest.line,
        tensors=len(storages),
        bytes=sum(trace.sizes[i] for i in storages),
        alive={name: (len(found), sum(trace.sizes[i] for i in found)) for name, found in there.items() if found},
    )


def growth(trace: Trace) -> tuple[int, Site] | None:
    """What each step leaves behind beside what it found: bytes, and where the largest of it is made. None: nothing."""

    def left(position: int) -> list[int]:
        return [i for i in trace.alive_at(position) if trace.sites[i].category not in _TO_STAY]

    before, after = left(trace.steady_from - 1), left(len(trace.events) - 1)
    more = sum(trace.sizes[i] for i in after) - sum(trace.sizes[i] for i in before)
    new = set(after) - set(before)
    return (more, trace.sites[max(new, key=trace.sizes.__getitem__)]) if more > 0 and new else None


def timeline(trace: Trace, start: int) -> Timeline:
    """Bytes alive over the events from `start` on. Of events too near to each other, the one with most is kept."""
    categories = tuple(category.value for category in Category)
    place = {category: i for i, category in enumerate(Category)}
    alive = [0] * len(categories)
    moments: list[Moment] = []
    last = ("", "", "")
    step = max(1, (len(trace.events) - start) // MOMENTS)
    best: Moment | None = None
    for position, event in enumerate(trace.events):
        i = event if event >= 0 else ~event
        site = trace.sites[i]
        alive[place[site.category]] += trace.sizes[i] if event >= 0 else -trace.sizes[i]
        if event >= 0:
            last = (site.phase.value, site.operator, site.module)
        if position < start:
            continue
        if best is None or sum(alive) > sum(best.bytes):
            best = Moment(phase=last[0], operator=last[1], module=last[2], bytes=tuple(alive))
        if (position - start) % step == step - 1 or position == len(trace.events) - 1:
            moments.append(best)
            best = None
    peak = max(range(len(moments)), key=lambda k: sum(moments[k].bytes), default=0)
    return Timeline(categories=categories, moments=tuple(moments), peak=peak)
