"""Where the optimizer steps of a `transformers.Trainer` are not those of the whole batch, as its own losses show."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from autobatch.plan import TrainingPlan
from autobatch.workload.runner import on_device
from autobatch.workload.state import preserved

LOSS_TOLERANCE = 1e-3
"""How far two losses may be apart, as a share of them, and be the same: low precisions round."""


def caveats(actor: Any, plan: TrainingPlan, loader: DataLoader[Any]) -> Iterator[str]:
    """A sentence for each thing that is not exact about optimizer steps of these sizes.

    Args:
        actor: the Trainer's stand-in.
        plan: with one size.
        loader: the Trainer's loader; its first two samples are run through the model, without gradients.
    """
    if actor.args.auto_find_batch_size:
        yield (
            "auto_find_batch_size is on: where memory runs out, the Trainer starts again with smaller batches, and "
            f"optimizer steps are no longer of {plan.target_batch_size} samples. Turn it off."
        )
    yield from _short_steps(actor.args, plan, loader)
    name, steps = type(actor.model).__name__, plan.accumulation_steps
    batch = loader.collate_fn(list(islice(iter(loader.dataset), 2)))
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or actor.compute_loss_func is not None or actor.args.n_gpu > 1:
        return
    if not actor.model_accepts_loss_kwargs:
        if steps > 1 and labels.dim() > 1:
            yield (
                f"{name} takes no num_items_in_batch, so the Trainer takes the mean over micro-batches, which is not "
                "the mean over all tokens where micro-batches differ in tokens."
            )
        return
    items, mean, once, twice = _losses(actor, batch)
    if not math.isfinite(mean) or not mean:
        return
    if steps > 1 and math.isclose(once, twice, rel_tol=LOSS_TOLERANCE):
        yield (
            f"{name} is given num_items_in_batch, but its loss does not depend on it, so that the Trainer adds up the "
            f"micro-batches' means without dividing them: gradients are {steps} times too large."
        )
    elif not math.isclose(once, mean, rel_tol=LOSS_TOLERANCE):
        yield (
            f"the Trainer divides the loss of {name} by {items} labels where its mean is over "
            f"{items * once / mean:.0f}: gradients are about {once / mean:.0%} of the batch's, whatever the sizes."
        )


def _short_steps(args: Any, plan: TrainingPlan, loader: DataLoader[Any]) -> Iterator[str]:
    """What `dataloader_drop_last` leaves: it drops micro-batches."""
    if not args.dataloader_drop_last or not isinstance(loader.dataset, Sized):
        return
    together = plan.micro_batch_size * plan.world_size
    left = len(loader.dataset) // together % plan.accumulation_steps
    if left:
        yield (
            "dataloader_drop_last drops an epoch's last micro-batch where that is smaller, not its last optimizer "
            f"step, which has {left * together} of {plan.target_batch_size} samples here. Train on a multiple of "
            f"{plan.target_batch_size} samples where that matters."
        )


def _losses(actor: Any, batch: Any) -> tuple[int, float, float, float]:
    """How many items the Trainer counts in a batch; the batch's mean loss, and the losses of the Trainer when it counts
    so many items, and twice as many."""
    device = next(actor.model.parameters()).device
    batch = on_device(batch, device)
    with preserved(actor.model, tensors=False), torch.no_grad():
        actor.model.eval()
        _, items = actor.get_batch_samples(iter([batch]), 1, device)
        mean, once, twice = (
            float(actor.compute_loss(actor.model, copy.copy(batch), num_items_in_batch=number))
            for number in (None, items, 2 * items)
        )
    # With its count over all processes, each multiplies by how many they are, for DDP's mean over them.
    processes = actor.accelerator.num_processes if actor.args.average_tokens_across_devices else 1
    return int(items), mean, once / processes, twice / processes
