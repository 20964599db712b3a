"""What changed between two records of a step, and who is to blame: new tensors, larger ones, more, or longer lives."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autobatch.regression.record import Made, Record, parts_of

LEFT_BEHIND = "left by the step before"
_NOTHING = Made(category="")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A number that is a whole part of a path."""


@dataclass(frozen=True)
class Change:
    """Bytes at the peak that came or went, with the same operator and line of some modules."""

    bytes: int
    """More than before; negative where there are fewer."""
    how: str
    """"new", "larger", "more of them", "lives longer", "left by the step before", and what is the opposite of each."""
    category: str
    operator: str
    modules: tuple[str, ...]
    """Paths, that with the largest change first; "" is the step itself, outside all modules."""
    line: str
    """`file:line` of the user's code as it is now, or ""."""
    phase: str


def compared_phase(then: Record, now: Record) -> str:
    """The phase at whose peaks two records are compared: that of the higher peak, as a change may have moved it, and at
    different moments of a step everything differs. "" where one of them does not know its own."""
    higher = now if now.peak_bytes >= then.peak_bytes else then
    phase = higher.peak_phase
    return phase if phase in then.phases and phase in now.phases else ""


def changes(then: Record, now: Record) -> list[Change]:
    """All that changed at the peak of the phase to compare, the largest first. Together they are the change of all
    bytes there, as requested from the allocator. Nothing where one of the records does not know."""
    at = compared_phase(then, now)
    if not at:
        return []
    return _grouped(_at_their_new_names(then.origins, now.origins), now, at)


def _at_their_new_names(then: Mapping[str, Made], now: Mapping[str, Made]) -> dict[str, Made]:
    """What was there, by the names of now: of a module that was renamed, or has another number, all that it makes is
    still made, byte by byte."""
    new: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for key in sorted(now.keys() - then.keys()):
        new[_whoever_made_it(key, now[key])].append(key)
    renamed = {}
    for key in sorted(then.keys() - now.keys()):
        candidates = new[_whoever_made_it(key, then[key])]
        if candidates:
            renamed[candidates.pop(0)] = key
    back = {old: fresh for fresh, old in renamed.items()}
    return {back.get(key, key): made for key, made in then.items()}


def _whoever_made_it(key: str, made: Made) -> tuple[object, ...]:
    module, operator, phase, earlier = parts_of(key)
    operator = operator.replace(f" {module}.", " ")  # parameters and buffers are called by their paths
    return operator, phase, earlier, made.tensors, made.bytes, tuple(sorted(made.alive.items()))


def holders(record: Record) -> list[Change]:
    """Who holds the bytes at the peak, the most first."""
    return _grouped({}, record, record.peak_phase)


def _grouped(then: Mapping[str, Made], now: Record, at: str) -> list[Change]:
    groups: dict[tuple[str, ...], list[tuple[int, str]]] = defaultdict(list)
    for key in sorted(then.keys() | now.origins.keys()):
        before, after = then.get(key, _NOTHING), now.origins.get(key, _NOTHING)
        difference = after.at(at)[1] - before.at(at)[1]
        if not difference:
            continue
        module, operator, phase, earlier = parts_of(key)
        how = _how(before, after, earlier, at)
        category = (after if after.tensors else before).category
        alike = _NUMBER.sub("*", operator), phase, category, how, now.lines.get(key, "")
        groups[alike].append((difference, module))
    found = [_change(alike, parts) for alike, parts in groups.items()]
    return sorted(found, key=lambda change: (-abs(change.bytes), change.how != LEFT_BEHIND))


def by_category(then: Record, now: Record) -> list[tuple[str, int, int]]:
    """Category, bytes then and bytes now at the peak of the phase to compare, the largest change first."""
    at = compared_phase(then, now)
    if not at:
        return []
    before, after = then.phases[at].by_category, now.phases[at].by_category
    rows = [(name, before.get(name, 0), after.get(name, 0)) for name in sorted(before.keys() | after.keys())]
    return sorted(rows, key=lambda row: -abs(row[2] - row[1]))


def common_path(modules: Iterable[str]) -> str:
    """Modules as one path if nothing but numbers tells them apart, such as `layers.*.attention`, else ""."""
    alike = {_NUMBER.sub("*", module) for module in modules}
    return alike.pop() if len(alike) == 1 else ""


def _change(alike: tuple[str, ...], parts: list[tuple[int, str]]) -> Change:
    operator, phase, category, how, line = alike
    ordered = sorted(parts, key=lambda part: (-abs(part[0]), part[1]))
    total = sum(difference for difference, _ in parts)
    return Change(total, how, category, operator, tuple(module for _, module in ordered), line, phase)


def _how(before: Made, after: Made, earlier: bool, at: str) -> str:
    (held_before, bytes_before), (held_after, bytes_after) = before.at(at), after.at(at)
    more = bytes_after > bytes_before
    if earlier:
        return LEFT_BEHIND if more else "no longer left by the step before"
    if not before.tensors:
        return "new"
    if not after.tensors:
        return "gone"
    if held_after == held_before:
        return "larger" if more else "smaller"
    if after.tensors == before.tensors:
        return "lives longer" if more else "freed sooner"
    return "more of them" if more else "fewer of them"
