"""Inputs, and a loss, for a bare model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.batches import describe, find_layout
from autobatch.workload.calls import Reading
from autobatch.workload.huggingface import guesses_from_config, is_huggingface, labelled
from autobatch.workload.layers import Guess, float_dtype, guesses_from_layers
from autobatch.workload.lightning import is_lightning, lightning_step
from autobatch.workload.losses import CriterionLoss, OwnLoss, StandInLoss, own_loss, trainable_outputs
from autobatch.workload.proof import Proof, Prover
from autobatch.workload.recipes import Attempts, Loss, Recipe, example_call, not_inferred, stand_in_sentence
from autobatch.workload.tensors import GrownBatch, RandomBatch, RandomTensor

SIZES = (2, 3)
"""Samples in the batches of a proof: two sizes show whether the outputs grow with the batch."""


def infer(model: nn.Module, prover: Prover, criterion: Any = None, training_step: Loss | None = None) -> Recipe:
    """A recipe for a bare model: its inputs, and a loss where none is given.

    Guesses come from Lightning's `example_input_array`, a Hugging Face config, timm's `pretrained_cfg` and the first
    layers, in this order.

    Raises:
        InputsNotInferred: no guess runs; the message shows the call to make.
    """
    attempts = Attempts()
    step = training_step or (lightning_step(model) if criterion is None and is_lightning(model) else None)
    found = attempts.first_proved(prover, _step_recipes(model, prover, step), SIZES) if step else None
    if found is None and training_step is None:
        found = attempts.first_proved(prover, _forward_recipes(model, prover, criterion, attempts), SIZES[:1])
    if found is None:
        raise not_inferred(model, attempts, "Give it batches of n samples, in your shapes", example_call(model))
    return found


def _guesses(model: nn.Module) -> Iterator[Guess]:
    example = getattr(model, "example_input_array", None)
    if example is not None:
        template = GrownBatch(example, find_layout(example))
        yield Guess(template, f"from example_input_array ({describe(example)})", tokens=_has_ids(example))
    if is_huggingface(model):
        yield from guesses_from_config(model)
    yield from _guesses_from_timm(model)
    yield from guesses_from_layers(model)


def _guesses_from_timm(model: nn.Module) -> Iterator[Guess]:
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)  # may differ from the pretrained one
    for source in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, source, None)
        shape = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        if shape:
            sizes = [(*shape[:-2], *size)] if isinstance(size, tuple) and len(size) == 2 else []
            for one in dict.fromkeys([*sizes, tuple(shape)]):
                yield Guess(RandomTensor(one, float_dtype(model)), f"from the model's {source}")


def _forward_recipes(model: nn.Module, prover: Prover, criterion: Any, attempts: Attempts) -> Iterator[Recipe]:
    """Recipes that call the model itself."""
    for guess in _guesses(model):
        make_batch = _maker(guess)
        output = prover.run(_call(guess), make_batch(SIZES[0]))
        runs = output.holds
        if output.undecided:
            output = prover.run(_call(guess), make_batch(SIZES[0]), training=False)
        elif output.holds and not isinstance(guess.parts, Mapping):  # what a position takes is a guess, a name is not
            larger = prover.run(_call(guess), make_batch(SIZES[1]))
            if not larger.holds or not _grows(output.value, larger.value):
                shapes = f"{describe(output.value)} and {describe(larger.value) if larger.holds else larger.reason}"
                attempts.failures[_shown(guess)] = f"2 and 3 samples gave the outputs {shapes}"
                continue
        if not output.holds and not output.undecided:
            attempts.note(_stand_in_recipe(guess, output), output)
        elif criterion is not None:
            yield from _criterion_recipes(guess, output.value, criterion)
        else:
            yield from _own_loss_recipes(model, guess, output.value)
            yield replace(_stand_in_recipe(guess, output), proved=runs and bool(trainable_outputs(output.value)))


def _criterion_recipes(guess: Guess, output: Any, criterion: Callable[[Any, Any], Tensor]) -> Iterator[Recipe]:
    spread = isinstance(_example(guess), (tuple, Mapping))
    for target in _targets(output, guess.tokens):
        said = (_said(guess), f"Target assumed: {target}.")
        loss = CriterionLoss(Reading((0,), (1,), spread=spread), criterion)
        yield Recipe(RandomBatch((_maker(guess), target)), loss, f"{_shown(guess)} with the target {target}", said)


def _own_loss_recipes(model: nn.Module, guess: Guess, output: Any) -> Iterator[Recipe]:
    said = "Loss assumed: the one that the model returns, as no loss was given."
    complete = (
        list(labelled(model, guess, output)) if is_huggingface(model) and isinstance(guess.parts, Mapping) else []
    )
    for one in [*complete, *([guess] if own_loss(output) is not None else [])]:
        yield Recipe(_maker(one), OwnLoss(_reading(one)), _shown(one), (_said(one), said))


def _stand_in_recipe(guess: Guess, output: Proof) -> Recipe:
    said = (_said(guess), stand_in_sentence(output, None, guess.tokens))
    return Recipe(_maker(guess), StandInLoss(_reading(guess), guess.tokens), _shown(guess), said)


def _step_recipes(model: nn.Module, prover: Prover, step: Loss) -> Iterator[Recipe]:
    """Recipes for a training step that takes a batch of unknown structure: inputs alone, or with a target."""
    inner = next((part for part in model.modules() if part is not model and is_huggingface(part)), None)
    if inner is not None and not is_huggingface(model):
        yield from _step_recipes_of_part(inner, step)
    for guess in _guesses(model):
        output = prover.run(_call(guess), _maker(guess)(2))
        if not output.holds and not output.undecided and not isinstance(output.error, NotImplementedError):
            continue  # a model with a forward that does not take these inputs
        known = output.value if output.holds else None
        if isinstance(guess.parts, Mapping):
            for one in [*labelled(model, guess, known), guess]:
                yield Recipe(_maker(one), step, _shown(one), (_said(one),))
            continue
        for target in _targets(known, guess.tokens) if output.holds else _targets_of_head(model):
            said = (_said(guess), f"Target assumed: {target}.")
            parts = guess.parts if isinstance(guess.parts, tuple) else (guess.parts,)
            yield Recipe(RandomBatch((*parts, target)), step, f"{_shown(guess)} with the target {target}", said)
        yield Recipe(_maker(guess), step, _shown(guess), (_said(guess),))


def _step_recipes_of_part(part: nn.Module, step: Loss) -> Iterator[Recipe]:
    """Batches of a Hugging Face model within another module."""
    prover = Prover(part)
    for guess in guesses_from_config(part):
        output = prover.run(_call(guess), _maker(guess)(2))
        if output.holds:
            for one in labelled(part, guess, output.value):
                yield Recipe(_maker(one), step, _shown(one), (_said(one),))


def _targets(output: Any, tokens: bool) -> list[RandomTensor]:
    """Targets that usual losses take for such an output, likeliest first."""
    outputs = trainable_outputs(output)
    if not outputs:
        return []
    shape, dtype = tuple(outputs[0].shape), outputs[0].dtype
    targets = []
    if len(shape) == 2 and shape[1] > 1:
        targets.append(RandomTensor((), torch.long, high=shape[1]))
    if len(shape) > 2 and tokens:
        targets.append(RandomTensor(shape[1:-1], torch.long, high=shape[-1]))
    targets.append(RandomTensor(shape[1:], dtype))
    if len(shape) == 2 and shape[1] == 1:
        targets.append(RandomTensor((), dtype))
    if len(shape) > 2:
        targets.append(RandomTensor(shape[2:], torch.long, high=shape[1]))
    return targets


def _targets_of_head(model: nn.Module) -> list[RandomTensor]:
    """The same, where only the last linear layer says what comes out."""
    widths = [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not widths:
        return []
    dtype = float_dtype(model)
    classes = [RandomTensor((), torch.long, high=widths[-1])] if widths[-1] > 1 else []
    return [*classes, RandomTensor((widths[-1],), dtype), RandomTensor((), dtype)]


def _grows(smaller: Any, larger: Any) -> bool:
    """Whether an output has one item per sample, or is a loss."""
    if own_loss(smaller) is not None:
        return True
    pairs = zip(trainable_outputs(smaller), trainable_outputs(larger), strict=False)
    return any(SIZES in zip(a.shape, b.shape, strict=False) for a, b in pairs)


def _maker(guess: Guess) -> Callable[[int], Any]:
    return guess.parts if isinstance(guess.parts, GrownBatch) else RandomBatch(guess.parts)


def _example(guess: Guess) -> Any:
    return guess.parts.template if isinstance(guess.parts, GrownBatch) else guess.parts


def _reading(guess: Guess) -> Reading:
    """How the guessed inputs, which are the whole batch, go into the model."""
    return Reading((...,), spread=isinstance(_example(guess), (tuple, Mapping)))


def _call(guess: Guess) -> Callable[[nn.Module, Any], Any]:
    return _reading(guess).call


def _shown(guess: Guess) -> str:
    return describe(guess.parts.template) if isinstance(guess.parts, GrownBatch) else str(RandomBatch(guess.parts))


def _said(guess: Guess) -> str:
    return f"Inputs assumed: {_shown(guess)}, {guess.why}."


def _has_ids(example: Any) -> bool:
    return isinstance(example, Tensor) and not example.is_floating_point()
