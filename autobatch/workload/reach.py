"""Finds what a caller's objects hold that a training step could change: modules, optimizers, random generators."""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler


@dataclass
class Reach:
    """The modules, optimizers and random generators that were found."""

    modules: list[nn.Module] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)


_CONTAINERS = (dict, list, tuple, set, deque)
_MAX_NESTING = 2
"""How many containers deep to look inside an object: lists of lists of modules, not whole datasets."""


def reach(roots: Iterable[Any]) -> Reach:
    """Find what `roots` hold, directly or through functions, closures, partials, containers and other objects."""
    found = Reach()
    seen: dict[int, Any] = {}  # holds what it has seen, so that no id is used twice
    todo = [(held, 0) for root in roots for held in (root, *_held_by(root))]
    while todo:
        value, nesting = todo.pop()
        if id(value) in seen or not _is_worth_a_look(value):
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            found.modules.append(value)
            todo.append((vars(value), 0))
        elif isinstance(value, Optimizer):
            found.optimizers.append(value)
        elif _is_generator(value):
            found.generators.append(value)
        elif isinstance(value, _CONTAINERS):
            if nesting <= _MAX_NESTING:
                todo.extend((item, nesting + 1) for item in (value.values() if isinstance(value, dict) else value))
        else:
            todo.extend((held, 0) for held in _held_by(value))
    return found


def _is_worth_a_look(value: Any) -> bool:
    """Whether modules and generators may be in it: not every object is searched, or a search would end nowhere."""
    if isinstance(value, (type, types.ModuleType)):
        return False
    kinds = (*_CONTAINERS, types.CellType, Optimizer, DataLoader, Sampler)
    return isinstance(value, kinds) or callable(value) or _is_generator(value)


def _is_generator(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    kinds = (torch.Generator, random.Random) + ((numpy.random.Generator, numpy.random.RandomState) if numpy else ())
    return isinstance(value, kinds)


def _held_by(value: Any) -> Iterator[Any]:
    """What a function, a bound method, a partial or any other object holds."""
    if isinstance(value, types.MethodType):
        yield value.__func__
        yield value.__self__
        yield getattr(value.__self__, "__dict__", None)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.FunctionType):
        yield from (value.__closure__ or ())
        yield from (value.__defaults__, value.__kwdefaults__)
        for name in value.__code__.co_names:
            used = value.__globals__.get(name)
            if isinstance(used, (nn.Module, Optimizer)) or _is_generator(used):
                yield used
    elif isinstance(value, types.CellType):
        with suppress(ValueError):  # a variable that has no value yet
            yield value.cell_contents
    else:
        yield getattr(value, "__dict__", None)
