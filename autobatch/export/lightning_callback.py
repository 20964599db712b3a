"""A Lightning callback that finds the batch size, and accumulates to the target."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, DistributedSampler

from autobatch.errors import InvalidInput
from autobatch.export.configs import mean_of_means
from autobatch.export.one_size import fit_one_size
from autobatch.plan import TrainingPlan
from autobatch.precision import Precision
from autobatch.workload import Workload

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from autobatch.export.one_size import FitOptions

_PRECISIONS: dict[str, Precision] = {"32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}

_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


class AccumulateToTarget(Callback):  # type: ignore[misc]
    """Finds the largest batch size that fits when `trainer.fit` starts, sets it as `batch_size` on the LightningModule
    or the DataModule, and sets `trainer.accumulate_grad_batches`, so that optimizer steps are of exactly `target`
    samples over all devices.

    The trials run the module's own `training_step` and optimizer on the largest samples of its training data, and leave
    everything as it was. `train_dataloader` has to read the attribute, as for Lightning's own `BatchSizeFinder`:

        trainer = Trainer(callbacks=[AccumulateToTarget(256)], precision="bf16-mixed")
        trainer.fit(module)

    Args:
        target: samples behind one optimizer step, over all devices and nodes.
        attribute: the name of the batch size on the module, the DataModule, or their `hparams`.
        **options: `device`, `memory_limit`, `headroom`, `max_micro_batch`, `exact` and `progress` of `autobatch.fit`.

    Raises (by `trainer.fit`): as `autobatch.fit`.
        InvalidInput: also where there is no such attribute, loaders were passed to `trainer.fit`, the module optimizes
            manually, the strategy shards it, the precision is none that autobatch tries, or no single size hits the
            target.
    """

    def __init__(self, target: int, *, attribute: str = "batch_size", **options: Unpack[FitOptions]) -> None:
        self.target = target
        self.attribute = attribute
        self.options = options
        self.plan: TrainingPlan | None = None
        """What was found, once `trainer.fit` has started."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Called by Lightning when the model is on its device."""
        holders = _holders(trainer, pl_module, self.attribute)
        if not holders:
            raise InvalidInput(
                f"neither {type(pl_module).__name__} nor a DataModule has {self.attribute!r}, nor have their hparams. "
                "Have train_dataloader make its loader with such an attribute; attribute=... says another name."
            )
        workload = Workload(
            pl_module,
            data=_train_loader(trainer, pl_module),
            optimizer=_optimizer(trainer, pl_module),
            precision=_precision(trainer),
        )
        options: FitOptions = {"device": trainer.strategy.root_device, **self.options}
        with _detached(pl_module):
            self.plan = plan = fit_one_size(workload, self.target, None, options)
        for holder in holders:
            if isinstance(holder, MutableMapping):
                holder[self.attribute] = plan.micro_batch_size
            else:
                setattr(holder, self.attribute, plan.micro_batch_size)
        trainer.accumulate_grad_batches = plan.accumulation_steps
        limit = trainer.limit_train_batches
        for sentence in _caveats(_train_loader(trainer, pl_module), plan, self.attribute, limit):
            warnings.warn(sentence, stacklevel=2)
        trainer.fit_loop._combined_loader = None  # where it is there already, it has the size of before
        if trainer.lr_scheduler_configs:
            # A schedule may have been made for the number of steps that an epoch had before.
            trainer.strategy.setup_optimizers(trainer)


def _holders(trainer: Any, module: Any, attribute: str) -> list[Any]:
    """Where the batch size is kept: on the module, the DataModule, and in their hyperparameters."""
    owners = [owner for owner in (module, trainer.datamodule) if owner is not None]
    found = [owner for owner in owners if hasattr(owner, attribute)]
    return found + [owner.hparams for owner in owners if attribute in getattr(owner, "hparams", {})]


def _train_loader(trainer: Any, module: Any) -> DataLoader[Any]:
    if not trainer.fit_loop._data_source.is_module():
        raise InvalidInput(
            "loaders were passed to trainer.fit, so their batch size is made already. Make them in train_dataloader of "
            "the LightningModule or of a DataModule."
        )
    owner = module if trainer.datamodule is None else trainer.datamodule
    loader = owner.train_dataloader()
    if not isinstance(loader, DataLoader):
        raise InvalidInput(f"train_dataloader has to return one DataLoader, but returned {type(loader).__name__}.")
    return loader


def _optimizer(trainer: Any, module: Any) -> Any:
    if not module.automatic_optimization or len(trainer.optimizers) != 1:
        raise InvalidInput(
            f"{type(module).__name__} optimizes manually or with {len(trainer.optimizers)} optimizers, and Lightning "
            "accumulates gradients only for one that it steps itself."
        )
    return trainer.optimizers[0]


def _precision(trainer: Any) -> Precision:
    strategy = type(trainer.strategy).__name__
    if strategy in _SHARDING:
        raise InvalidInput(
            f"{strategy} shards the module, and trials run the whole of it on one device. Find the plan with "
            'autobatch.fit(...) where it fits, and pass Trainer(**plan.to("lightning")["trainer"]).'
        )
    if trainer.precision not in _PRECISIONS:
        known = ", ".join(map(repr, _PRECISIONS))
        raise InvalidInput(f"autobatch tries the precisions {known}, but this Trainer's is {trainer.precision!r}.")
    return _PRECISIONS[trainer.precision]


@contextmanager
def _detached(module: Any) -> Iterator[None]:
    """The module without its Trainer, whose loops are not running: `self.log` does nothing then, instead of failing."""
    trainer, module.trainer = module.trainer, None
    try:
        yield
    finally:
        module.trainer = trainer


def _caveats(loader: DataLoader[Any], plan: TrainingPlan, attribute: str, limit: int | float) -> Iterator[str]:
    """What is not exact with the loader that training will have, of which an epoch has `limit` batches (an int), or
    that share of them."""
    size, steps = plan.micro_batch_size, plan.accumulation_steps
    if loader.batch_size != size:
        yield (
            f"train_dataloader makes batches of {loader.batch_size} samples although {attribute} is {size}, so that "
            f"optimizer steps will not be of {plan.target_batch_size}. Have it read {attribute}."
        )
        return
    yield from mean_of_means(plan, "Lightning")
    samples = _samples(loader, plan.world_size)
    if samples is None or steps == 1:
        return
    whole, rest = divmod(samples, size)
    batches = whole + (rest > 0 and not loader.drop_last)
    batches, all_of_them = min(batches, limit) if isinstance(limit, int) else int(batches * limit), batches
    if batches % steps:
        remedy = f"Train on a multiple of {plan.target_batch_size} samples"
        if batches < all_of_them:
            remedy = f"Have limit_train_batches={limit} come to a multiple of {steps} batches"
        yield (
            f"the last optimizer step of an epoch of {batches} micro-batches has {batches % steps} of its {steps}, but "
            f"Lightning divides by accumulate_grad_batches={steps} all the same, so that its gradient is too small. "
            f"{remedy}."
        )
    elif batches > whole:
        yield (
            f"the last micro-batch of an epoch has {rest} samples, and Lightning weighs them as much as {size}. Train "
            f"on a multiple of {plan.target_batch_size} samples, or drop the last batch."
        )


def _samples(loader: DataLoader[Any], world_size: int) -> int | None:
    """One rank's samples of an epoch; None where that is not known."""
    try:
        samples = len(loader.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    # Lightning shares out what is not shared out yet, as evenly as can be, and fills up.
    return samples if isinstance(loader.sampler, DistributedSampler) else -(-samples // world_size)
