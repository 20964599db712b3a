"""The training step of a `transformers.Trainer`, for trials that may run in another process."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NoReturn

import cloudpickle
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from autobatch.errors import InvalidInput
from autobatch.precision import Precision
from autobatch.workload.runner import autocast


def stand_in(trainer: Any) -> tuple[Any, DataLoader[Any]]:
    """A copy of the Trainer for the trials, which may run in another process, and its loader.

    It shares the model, the data and what steps are made of. What watches training (callbacks, trackers, metrics) is
    left out, and nothing that it does reaches other ranks.
    """
    accelerator = copy.copy(trainer.accelerator)
    accelerator.prepare = _as_it_is
    accelerator.gather = _as_it_is
    accelerator.backward = HeldBackward()
    # That of all accelerators of the process refers to loaders.
    accelerator.gradient_state = SimpleNamespace(sync_gradients=True, num_steps=1)
    for name in ("_models", "_optimizers", "_schedulers", "_dataloaders", "_custom_objects", "trackers"):
        setattr(accelerator, name, [])
    actor = copy.copy(trainer)
    actor.accelerator = accelerator
    actor.model_wrapped = actor.model
    actor.current_gradient_accumulation_steps = 1  # the trial weighs micro-batches itself
    actor._prepare_input = _as_it_is  # the trial's batches are on its device
    actor.log = _as_it_is  # what a step logs is for training
    loader = actor.get_train_dataloader()
    watching = ("callback_handler", "compute_metrics", "preprocess_logits_for_metrics", "gather_function")
    for name in (
        "eval_dataset",
        "optimizer",
        "lr_scheduler",
        "model_init",
        "_memory_tracker",
        *watching,
    ):
        setattr(actor, name, None)
    return actor, loader


def _as_it_is(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def optimizer_of(trainer: Any, step: TrainerStep) -> Optimizer | Callable[..., Optimizer]:
    """The Trainer's optimizer, or what makes it in a trial."""
    if trainer.optimizer is None:
        return TrainerOptimizer(step)
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # out of accelerate's wrapper


class HeldBackward:
    """In place of `accelerator.backward`: keeps the loss, for the trial to go backward from."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None

    def __call__(self, loss: Tensor, **kwargs: Any) -> None:
        self._loss = loss

    def take(self) -> Tensor | None:
        """The loss, which is then held here no longer."""
        loss, self._loss = self._loss, None
        return loss


class TrainerStep:
    """The loss of a Trainer's own `training_step`. It takes the Trainer's data along to another process where methods
    of the user's own may look at it there."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getstate__(self) -> tuple[Any, bytes | _Unsent]:
        actor = copy.copy(self.actor)
        actor.train_dataset = None
        return actor, _sent(self.actor.train_dataset if _has_steps_of_its_own(actor) else None)

    def __setstate__(self, state: tuple[Any, bytes | _Unsent]) -> None:
        self.actor, data = state
        self.actor.train_dataset = pickle.loads(data) if isinstance(data, bytes) else data

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        actor = self.actor
        device = next(model.parameters()).device
        inputs = copy.copy(batch)  # some take their labels out
        # A micro-batch of the trial counts its own items. How many they are changes the loss, but no tensor's size.
        _, items = actor.get_batch_samples(iter([inputs]), 1, device)
        with _as_prepared(model, precision_of(actor), device):
            actor.training_step(model, inputs, items)
        return actor.accelerator.backward.take()


class _Unsent:
    """In place of data that could not be sent to another process."""

    def __init__(self, why: str) -> None:
        self._why = why

    def _fail(self, *args: Any) -> NoReturn:
        raise InvalidInput(
            "methods of this Trainer use its train_dataset, which cannot be sent to the process that runs the trials: "
            f"{self._why}. Keep open files, locks and generators out of it, or make them when they are first used."
        )

    __len__ = __getitem__ = __iter__ = _fail

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # which pickle and copy ask for
            raise AttributeError(name)
        self._fail()


def _sent(data: Any) -> bytes | _Unsent:
    try:
        return cloudpickle.dumps(data)
    except (TypeError, AttributeError, RuntimeError, NotImplementedError, pickle.PicklingError) as error:
        return _Unsent(str(error))


def _has_steps_of_its_own(actor: Any) -> bool:
    """Whether the Trainer is one of the user's own: transformers' own looks at its data only to load it."""
    return not type(actor).__module__.startswith("transformers.")


class TrainerOptimizer:
    """Makes the optimizer that a Trainer would make."""

    def __init__(self, step: TrainerStep) -> None:
        self._step = step

    def __call__(self, params: Iterable[nn.Parameter]) -> Optimizer:
        actor = self._step.actor
        made: Optimizer = actor.create_optimizer()
        actor.optimizer = None
        return made


def precision_of(trainer: Any) -> Precision:
    """The precision of a Trainer.

    Raises:
        InvalidInput: it is none that autobatch tries.
    """
    said = trainer.accelerator.mixed_precision
    precisions: dict[str, Precision] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
    if said not in precisions:
        raise InvalidInput(f"autobatch tries fp32, bf16 and fp16, but this Trainer's mixed precision is {said}.")
    return precisions[said]


@contextmanager
def _as_prepared(model: nn.Module, precision: Precision, device: torch.device) -> Iterator[None]:
    """The model as accelerate prepares it: autocast in its forward alone, and outputs in float32."""
    if precision == "fp32":
        yield
        return
    from accelerate.utils import convert_to_fp32

    forward = model.forward

    def prepared(*args: Any, **kwargs: Any) -> Any:
        with autocast(precision, device):
            outputs = forward(*args, **kwargs)
        return convert_to_fp32(outputs)

    own = vars(model).get("forward")
    model.forward = prepared
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own
