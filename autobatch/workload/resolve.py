"""From a `Workload`, as the caller has it, to a `TrainingStep` that is ready to run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autobatch.batches import Layout, compare_layouts, dims_of, grow
from autobatch.errors import InvalidInput
from autobatch.units import format_bytes
from autobatch.workload.data import read_data
from autobatch.workload.infer import infer
from autobatch.workload.lightning import ConfiguredOptimizer, configured, is_lightning
from autobatch.workload.proof import Prover
from autobatch.workload.recipes import Recipe, prove_loss, read_batches
from autobatch.workload.step import TrainingStep
from autobatch.workload.workload import Workload


def resolve(workload: Workload) -> TrainingStep:
    """Work out everything that the caller left open, and prove it on fake tensors. Nothing real runs, except the
    caller's data: up to 512 samples or 2 seconds of a data set are looked at.

    Raises:
        InvalidInput: the data cannot be used.
        InputsNotInferred: inputs or loss could not be worked out; the message shows the call to make.
    """
    model, reserve, notes, warnings = _unwrap(workload.model)
    inner: nn.Module = getattr(model, "_orig_mod", model)
    prover = Prover(inner)
    source = read_data(workload.data) if workload.data is not None else None
    if source is None:
        recipe = infer(inner, prover, workload.loss, workload.training_step)
    elif workload.training_step is not None:
        recipe = Recipe(source.make_batch, workload.training_step, "training_step", source.assumptions)
    else:
        recipe = read_batches(inner, prover, source, workload.loss)
    optimizer, optimizer_notes = _optimizer(workload, inner, prover)
    two = recipe.make_batch(2)
    layout = _layout(two, recipe)
    fewest, refusal = _fewest_samples(prover, recipe, two, layout)
    return TrainingStep(
        model=model,
        make_batch=recipe.make_batch,
        compute_loss=recipe.compute_loss,
        optimizer=optimizer,
        precision=workload.precision,
        min_micro_batch=fewest,
        max_samples=source.max_samples if source else None,
        batch_dims=dims_of(two, layout) if layout else {},
        reserve_bytes=reserve,
        assumptions=(*notes, *recipe.assumptions, *optimizer_notes),
        warnings=(*warnings, *refusal),
    )


def _unwrap(model: nn.Module) -> tuple[nn.Module, int, list[str], list[str]]:
    """The model within data-parallel wrappers, the bytes that a wrapper takes, what was assumed, what to warn of."""
    reserve, notes, warnings = 0, [], []
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            reserve = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
            notes.append(
                f"DistributedDataParallel's gradient buckets, {format_bytes(reserve)}, were taken off the budget."
            )
        notes.append(f"The module inside {type(model).__name__} was run, without the wrapper.")
        model = model.module
    if hasattr(model, "_orig_mod"):
        warnings.append(
            "The model is compiled: it is traced again for new micro-batch sizes, which takes time in each trial."
        )
    return model, reserve, notes, warnings


def _optimizer(workload: Workload, model: nn.Module, prover: Prover) -> tuple[Any, tuple[str, ...]]:
    if workload.optimizer is not None:
        return workload.optimizer, ()
    default = "Optimizer assumed: AdamW (default settings)"
    if not is_lightning(model):
        return torch.optim.AdamW, (f"{default}.",)
    proof = prover.run(configured)
    if proof.holds:
        name = type(proof.value).__name__
        return ConfiguredOptimizer(model), (f"Optimizer taken from configure_optimizers: {name}.",)
    return torch.optim.AdamW, (f"{default}, as configure_optimizers could not be used ({proof.reason}).",)


def _layout(two: Any, recipe: Recipe) -> Layout | None:
    """Where the samples of a batch are; None where only its own collate function makes one of another size."""
    try:
        return compare_layouts(two, recipe.make_batch(3), (2, 3))
    except InvalidInput:
        return None


def _fewest_samples(prover: Prover, recipe: Recipe, two: Any, layout: Layout | None) -> tuple[int, tuple[str, ...]]:
    """1, or 2 where the model is proved to run on two samples but to refuse a single one, as BatchNorm does."""
    if layout is None or (not recipe.proved and not prove_loss(prover, recipe.compute_loss, two).holds):
        return 1, ()
    # The layout is that of the batch of three, at the same dimensions.
    single = grow(two, replace(layout, size=2), 1)
    proof = prove_loss(prover, recipe.compute_loss, single)
    if proof.holds or proof.undecided:
        return 1, ()
    return 2, (f"The model cannot train on a single sample, so micro-batches have at least 2 ({proof.reason}).",)
