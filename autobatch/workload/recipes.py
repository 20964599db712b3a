"""Recipes for a training step, and the choice among them: every one is proved on fake tensors before anything real
runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from autobatch.errors import InputsNotInferred
from autobatch.workload.calls import Reading, forward_of, split_readings, whole_readings
from autobatch.workload.data import Source
from autobatch.workload.lightning import is_lightning, lightning_step
from autobatch.workload.losses import CriterionLoss, OwnLoss, StandInLoss, describe_stand_in
from autobatch.workload.proof import Proof, Prover

Loss = Callable[[nn.Module, Any], Tensor]
MAX_FAILURES_SHOWN = 6


@dataclass(frozen=True)
class Recipe:
    """Batches, and how they become a loss."""

    make_batch: Callable[[int], Any]
    compute_loss: Loss
    tried: str
    """What this assumes, in a few words, for the message where it does not hold."""
    assumptions: tuple[str, ...] = ()
    proved: bool = False
    """Whether it ran on fake tensors."""


@dataclass
class Attempts:
    """What was tried in vain."""

    failures: dict[str, str] = field(default_factory=dict)
    """The reason, for everything tried."""
    undecided: Recipe | None = None
    """The first recipe that could be neither proved nor refuted, saying so."""

    def first_proved(self, prover: Prover, recipes: Iterable[Recipe], sizes: tuple[int, ...]) -> Recipe | None:
        """The first recipe whose loss runs for batches of each of `sizes`; else the first that may run; else None."""
        for recipe in recipes:
            if recipe.proved:
                return recipe
            for n in sizes:
                proof = prove_loss(prover, recipe.compute_loss, recipe.make_batch(n))
                if not proof.holds:
                    self.note(recipe, proof)
                    break
            else:
                return replace(recipe, proved=True)
        return self.undecided

    def note(self, recipe: Recipe, proof: Proof) -> None:
        """Remember why a recipe does not stand."""
        self.failures.setdefault(recipe.tried, proof.reason)
        if proof.undecided and self.undecided is None:
            doubt = f"What was assumed could not be proved before running: the code depends on values ({proof.reason})."
            self.undecided = replace(recipe, assumptions=(*recipe.assumptions, doubt))


def prove_loss(prover: Prover, loss: Loss, batch: Any) -> Proof:
    """Whether the loss of a batch can be computed and gone backward from."""

    def compute(model: nn.Module, fakes: Any) -> Tensor:
        value = loss(model, fakes)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise TypeError(f"the loss is no scalar that depends on the parameters: {value!r}")
        return value

    return prover.run(compute, batch)


def read_batches(model: nn.Module, prover: Prover, source: Source, criterion: Any) -> Recipe:
    """How the batches of the caller's data become a loss, with the caller's criterion where there is one.

    The order: a LightningModule's training step; with a criterion, the last or label-like part as its target; else the
    loss that the model itself returns, then a stand-in against that target, then a stand-in with everything as input.
    With a criterion and nothing that runs, the likeliest is returned, so that the model's own error is seen as it is.

    Raises:
        InputsNotInferred: there is no criterion, and no way to call the model runs.
    """
    batch = source.make_batch(2)
    recipes = list(_readings(model, prover, batch, source, criterion))
    attempts = Attempts()
    found = attempts.first_proved(prover, recipes, (2,))
    if found is None and criterion is not None:
        found = recipes[0]
    if found is None:
        raise not_inferred(model, attempts, "Say how a batch becomes a loss", EXAMPLE_STEP)
    return found


EXAMPLE_STEP = """\
  autobatch.fit(model, 256, data=data, training_step=lambda model, batch:
      torch.nn.functional.cross_entropy(model(batch[0]), batch[1]))"""


def not_inferred(model: nn.Module, attempts: Attempts, advice: str, example: str) -> InputsNotInferred:
    """The error that names what was tried and shows the call to make."""
    name = type(model).__name__
    shown = list(attempts.failures.items())
    lines = [f"  {tried}: {reason}" for tried, reason in shown[:MAX_FAILURES_SHOWN]]
    if len(shown) > MAX_FAILURES_SHOWN:
        lines.append(f"  and {len(shown) - MAX_FAILURES_SHOWN} more")
    tried = "Tried:\n" + "\n".join(lines) if lines else "No layer, example or configuration says what it takes."
    return InputsNotInferred(
        f"how to train {name} could not be worked out. {tried}\n"
        f"{name}.forward takes {inspect.signature(model.forward)}. {advice}, for example:\n{example}"
    )


def example_call(model: nn.Module) -> str:
    """A call that says everything, with the names of what this model's forward requires."""
    forward = forward_of(model)
    names = forward.required or forward.names[:1] or ("x",)
    tensors = "".join(f'"{name}": torch.randn(n, 16), ' for name in names)
    inputs = ", ".join(f'{name}=batch["{name}"]' for name in names)
    return (
        "  def loss(model, batch):\n"
        f'      return torch.nn.functional.cross_entropy(model({inputs}), batch["target"])\n'
        "  def data(n):\n"
        f'      return {{{tensors}"target": torch.randint(10, (n,))}}\n'
        "  autobatch.fit(model, 256, data=data, training_step=loss)"
    )


def describe_reading(reading: Reading) -> str:
    """The sentence for `plan.assumptions`."""
    return f"Batch read as {reading}."


def _readings(model: nn.Module, prover: Prover, batch: Any, source: Source, criterion: Any) -> Iterator[Recipe]:
    def recipe(loss: Loss, tried: str, *assumptions: str) -> Recipe:
        return Recipe(source.make_batch, loss, tried, (*source.assumptions, *assumptions))

    if criterion is not None:
        reconstruction = [replace(reading, target=(...,)) for reading in whole_readings(model, batch)]
        for reading in (*split_readings(model, batch), *reconstruction):
            yield recipe(CriterionLoss(reading, criterion), str(reading), describe_reading(reading))
        return
    if is_lightning(model):
        yield recipe(lightning_step(model), "training_step(batch, 0)")
    for reading in whole_readings(model, batch):
        said = (describe_reading(reading), "Loss assumed: the one that the model returns, as no loss was given.")
        yield recipe(OwnLoss(reading), f"the model's own loss, {reading}", *said)
    for reading in (*split_readings(model, batch), *whole_readings(model, batch)):
        output = prover.run(lambda shadow, fakes, reading=reading: reading.call(shadow, fakes), batch)
        said = (describe_reading(reading), stand_in_sentence(output, reading.target_of(batch), tokens=False))
        yield recipe(StandInLoss(reading), str(reading), *said)


def stand_in_sentence(output: Proof, target: Any, tokens: bool) -> str:
    """The sentence about a stand-in loss for `plan.assumptions`."""
    kind = describe_stand_in(output.value, target, tokens) if output.holds else ""
    return f"Loss assumed: {kind or 'one that fits the shapes of the outputs'} (a stand-in), as no loss was given."
