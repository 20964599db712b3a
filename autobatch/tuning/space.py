"""Which configurations there are for a training step on a device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from autobatch.errors import InvalidInput
from autobatch.tuning.configuration import Configuration
from autobatch.tuning.knobs import KNOBS, PLAIN, Knob, Situation, knob_named


@dataclass(frozen=True)
class Space:
    """The knobs that can be turned, and why others cannot."""

    values: dict[str, tuple[str, ...]]
    """The values of each knob, the plain one first."""
    left_out: tuple[str, ...]
    """Why the others, or some of their values, are not among them, in sentences."""

    def configurations(self) -> Iterator[Configuration]:
        """All of them: the plain one, then those that change one thing, then two, and so on."""
        rows = itertools.product(*(range(len(values)) for values in self.values.values()))
        ordered = sorted(rows, key=lambda row: (sum(map(bool, row)), [not index for index in row], row))
        for row in ordered:
            chosen = zip(self.values.items(), row, strict=True)
            yield Configuration({name: values[index] for (name, values), index in chosen})

    def row(self, configuration: Configuration) -> dict[str, str]:
        """The configuration with the plain values in it."""
        return {name: configuration.get(name, PLAIN) for name in self.values}


def space_of(situation: Situation, knobs: str | Iterable[str]) -> Space:
    """The space that the user allows and the step has.

    Args:
        knobs: "auto" for all that keep the mathematics, or the names of some.

    Raises:
        InvalidInput: there is no knob of a name.
    """
    values: dict[str, tuple[str, ...]] = {}
    left_out = []
    for knob in _chosen(situation, knobs):
        obstacles = {value: knob.obstacle(situation, value) for value in knob.values[1:]}
        for reason in dict.fromkeys(filter(None, obstacles.values())):
            without = [value for value, obstacle in obstacles.items() if obstacle == reason]
            left_out.append(f"{knob.name}={'/'.join(without)} was left out: {reason}.")
        possible = tuple(value for value, obstacle in obstacles.items() if obstacle is None)
        if possible:
            values[knob.name] = (PLAIN, *possible)
    return Space(values, tuple(left_out))


def _chosen(situation: Situation, knobs: str | Iterable[str]) -> list[Knob]:
    if knobs == "auto":
        return [knob for knob in KNOBS.values() if knob.automatic(situation.device)]
    if isinstance(knobs, str):
        raise InvalidInput(f'knobs must be "auto" or a list of names, but is {knobs!r}; there are {", ".join(KNOBS)}.')
    return [knob_named(name) for name in dict.fromkeys(knobs)]
