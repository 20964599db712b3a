"""Batch sizes for a `transformers.Trainer`, from trials of its own training step, collator and optimizer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from autobatch.errors import InvalidInput
from autobatch.export.one_size import fit_one_size
from autobatch.export.trainer_losses import caveats
from autobatch.export.trainer_steps import TrainerStep, optimizer_of, precision_of, stand_in
from autobatch.plan import TrainingPlan
from autobatch.workload import Workload
from autobatch.workload.state import preserved

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from autobatch.export.one_size import FitOptions


def fit_trainer(trainer: Any, target: int, **options: Unpack[FitOptions]) -> TrainingPlan:
    """Set `per_device_train_batch_size` and `gradient_accumulation_steps` of a Trainer so that its optimizer steps are
    of exactly `target` samples, in micro-batches that ran.

    The trials run the Trainer's own `training_step`, with its model, data collator, optimizer, precision and activation
    checkpointing, on the largest samples of its training data. Nothing else of it changes.

    Args:
        trainer: a `transformers.Trainer`, before `trainer.train()`.
        target: samples behind one optimizer step, over all processes.
        **options: `device`, `memory_limit`, `headroom`, `max_micro_batch`, `exact` and `progress` of `autobatch.fit`.

    Returns:
        The plan, with the one size that the Trainer takes.

    Raises: as `autobatch.fit`.
        InvalidInput: also where the Trainer shards its model (FSDP, DeepSpeed), trains in fp8, or no single size hits
            the target.
    """
    _check(trainer)
    args = trainer.args
    gpus = max(1, args.n_gpu)  # of one process, which feeds them all (DataParallel)
    with preserved(trainer.model, tensors=False):
        _checkpoint_activations(trainer.model, args)
        actor, loader = stand_in(trainer)
        step = TrainerStep(actor)
        workload = Workload(
            trainer.model,
            data=loader,
            training_step=step,
            optimizer=optimizer_of(trainer, step),
            precision=precision_of(trainer),
        )
        plan = fit_one_size(workload, target, gpus if gpus > 1 else None, options)
    args.per_device_train_batch_size = plan.micro_batch_size
    args.gradient_accumulation_steps = plan.accumulation_steps
    trainer._train_batch_size = args.train_batch_size  # its copy, which its loaders are made by
    for sentence in caveats(actor, plan, loader):
        warnings.warn(sentence, stacklevel=2)
    return plan


def _check(trainer: Any) -> None:
    if trainer.train_dataset is None:
        raise InvalidInput("the Trainer has no train_dataset, and so no batches to try.")
    for flag, name in (("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")):
        if getattr(trainer, flag, False):
            raise InvalidInput(
                f"this Trainer shards its model by {name}, and trials run the whole model on one device. Find the plan "
                'with autobatch.fit(...) where the model fits, and pass TrainingArguments(**plan.to("transformers")).'
            )
    precision_of(trainer)


def _checkpoint_activations(model: Any, args: Any) -> None:
    """Have the model checkpoint its activations, as `train()` will."""
    if not _said(args, "checkpointing"):
        return
    settings = dict(_said(args, "checkpointing_kwargs") or {})
    if hasattr(model, "activation_checkpointing_enable"):
        own = {name: settings.pop(name) for name in ("every_n_layers", "offload") if name in settings}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings or None, **own)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings or None)


def _said(args: Any, name: str) -> Any:
    """An argument by its present name, or by the older one."""
    return getattr(args, f"activation_{name}", None) or getattr(args, f"gradient_{name}", None)
