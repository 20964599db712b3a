"""How a batch goes through a model: which parts of it are the inputs, and which the target."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from autobatch.batches import is_array

TARGET_NAMES = ("labels", "label", "target", "targets", "y", "class", "classes")


@dataclass(frozen=True)
class Forward:
    """The arguments of a model's forward."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    takes_any: bool
    """Whether there is a **kwargs."""


def forward_of(model: nn.Module) -> Forward:
    """What `model.forward` takes; adapters that pass everything on (PEFT) are looked through."""
    adapter: Any = model
    inner = adapter.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(inner.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Forward(
        tuple(p.name for p in named),
        tuple(p.name for p in named if p.default is p.empty),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


@dataclass(frozen=True)
class Reading:
    """One way to read a batch. A key is a position, a name, or `...` for the whole batch."""

    inputs: tuple[Any, ...]
    target: tuple[Any, ...] = ()
    by_name: bool = False
    spread: bool = False
    """The one input is itself a tuple or mapping of arguments."""

    def call(self, model: nn.Module, batch: Any) -> Any:
        """The model's output."""
        values = [_item(batch, key) for key in self.inputs]
        if self.by_name:
            return model(**dict(zip(self.inputs, values, strict=True)))
        if self.spread:
            return model(**values[0]) if isinstance(values[0], Mapping) else model(*values[0])
        return model(*values)

    def target_of(self, batch: Any) -> Any:
        """The target: None, one part of the batch, or a dict of several."""
        values = {key: _item(batch, key) for key in self.target}
        return next(iter(values.values()), None) if len(values) < 2 else values

    def __str__(self) -> str:
        return f"inputs: {_names(self.inputs)}; target: {_names(self.target) or 'none'}"


def whole_readings(model: nn.Module, batch: Any) -> Iterator[Reading]:
    """Ways in which everything in the batch is an input, likeliest first."""
    keys = _keys(batch)
    if isinstance(batch, Mapping):
        forward = forward_of(model)
        known = tuple(key for key in keys if key in forward.names or forward.takes_any)
        if known:
            yield Reading(known, by_name=True)
    elif keys:
        yield Reading(keys)
    yield Reading((...,))


def split_readings(model: nn.Module, batch: Any) -> Iterator[Reading]:
    """Ways in which the batch is inputs and a target, likeliest first."""
    keys = _keys(batch)
    if isinstance(batch, Mapping):
        known = forward_of(model).names
        spare = [key for key in keys if key not in known]
        target = tuple(key for key in spare if key in TARGET_NAMES) or tuple(spare)
        target = target or tuple(key for key in keys if key in TARGET_NAMES)
        named = tuple(key for key in keys if key in known and key not in target)
        rest = tuple(key for key in keys if key not in target)
        if target and named:
            yield Reading(named, target, by_name=True)
        if target and rest:
            yield Reading(rest, target)
        if target:
            yield Reading((...,), target)
    elif len(keys) > 1:
        yield Reading(keys[:-1], keys[-1:])
        if len(keys) == 2 and isinstance(_item(batch, keys[0]), (tuple, list, Mapping)):
            yield Reading(keys[:-1], keys[-1:], spread=True)
        yield Reading((...,), keys[-1:])


def _names(keys: tuple[Any, ...]) -> str:
    return ", ".join("all of it" if key is ... else f"batch[{key!r}]" for key in keys)


def _keys(batch: Any) -> tuple[Any, ...]:
    if isinstance(batch, Mapping):
        return tuple(batch)
    return tuple(range(len(batch))) if isinstance(batch, (list, tuple)) and not is_array(batch) else ()


def _item(batch: Any, key: Any) -> Any:
    return batch if key is ... else batch[key]
