"""A configuration: a value for each knob that is not left as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from autobatch.errors import InvalidInput
from autobatch.tuning.knobs import KNOBS, PLAIN, knob_named
from autobatch.tuning.optimizers import lacks
from autobatch.workload.state import preserved, sigint_deferred
from autobatch.workload.step import TrainingStep


class Configuration(Mapping[str, str]):
    """Knobs and their values, frozen and hashable. Knobs at their plain value are not in it: the plain configuration is
    empty.

    Raises:
        InvalidInput: a knob or value does not exist.
    """

    def __init__(self, values: Mapping[str, str]) -> None:
        for name, value in values.items():
            known = knob_named(name).values
            if value not in known:
                raise InvalidInput(f"the knob {name!r} has no value {value!r}; it has {', '.join(known)}.")
        # In the registry's order, which is also that of applying them: a model is compiled when the rest is done.
        self._values = {name: values[name] for name in KNOBS if values.get(name, PLAIN) != PLAIN}

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._values.items()) or PLAIN

    def __repr__(self) -> str:
        return f"Configuration({self._values})"

    def as_json(self) -> str:
        """The knobs as a JSON object, the same text for equal configurations."""
        return json.dumps(self._values)

    @property
    def keeps_mathematics(self) -> bool:
        """Whether the same numbers are computed as without it, but for rounding."""
        return all(KNOBS[name].keeps_mathematics for name in self)

    @contextmanager
    def applied(self, step: TrainingStep) -> Iterator[TrainingStep]:
        """The step with these knobs; afterwards the caller's model and optimizer are as they were: strides, attributes,
        hooks, methods, flags, random generators. Values in tensors are left as they are by then.

        Raises:
            Exception: whatever a knob meets in the model; everything is as it was then, too.
        """
        undo = ExitStack()
        with preserved(step, tensors=False):
            try:
                with sigint_deferred():
                    configured = self._enter(undo, step)
                yield configured
            finally:
                with sigint_deferred():
                    undo.close()

    def _enter(self, undo: ExitStack, step: TrainingStep) -> TrainingStep:
        for name, value in self._values.items():
            step = KNOBS[name].apply(undo, step, value)
        return step


def apply_for_training(values: Mapping[str, str], model: nn.Module, optimizer: Optimizer | None) -> None:
    """See `TrainingPlan.apply`."""
    configuration = Configuration(values)
    if implementation := configuration.get("optimizer"):
        if optimizer is None:
            raise InvalidInput(
                f"the plan has the knob optimizer={implementation}: pass the optimizer as well, as in "
                "plan.apply(model, optimizer)."
            )
        if lacking := lacks(optimizer, implementation):
            raise InvalidInput(f"the plan has the knob optimizer={implementation}, but {lacking}.")
    step = TrainingStep(model, _nothing, _nothing, optimizer or _nothing)
    # It stays so: there is nothing to undo.
    trained = configuration._enter(ExitStack(), step).model
    if trained is not model:
        model.compile()  # in place, so that the names in its state_dict stay


def _nothing(*_: Any) -> Any:
    raise AssertionError("nothing is run while knobs are applied")
