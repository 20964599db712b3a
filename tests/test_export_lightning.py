"""A Lightning Trainer with the sizes that its module's own trials found."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plans import plan_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autobatch.errors import InvalidInput
from autobatch.export import AccumulateToTarget

lightning = pytest.importorskip("lightning")

TARGET = 24
STEPS = 3


def dataset(samples: int = STEPS * TARGET) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 5, generator=generator)
    return TensorDataset(inputs, torch.randint(3, (samples,), generator=generator))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, batch_size: int = 2, samples: int = STEPS * TARGET, automatic: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = mlp()
        self.automatic_optimization = automatic
        self.stepping_batches: float = 0
        self.sizes_seen: set[int] = set()

    def training_step(self, batch: Any, index: int) -> Tensor:
        inputs, classes = batch
        self.sizes_seen.add(len(inputs))
        loss = F.cross_entropy(self.net(inputs), classes)
        self.log("loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(self.hparams["samples"]), batch_size=self.hparams["batch_size"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        self.stepping_batches = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class WithOwnSize(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Data(lightning.LightningDataModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.width = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(), batch_size=self.width)


def trainer_with(callback: Any, folder: Any, **arguments: Any) -> Any:
    callbacks = [] if callback is None else [callback]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    arguments = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, **quiet, **arguments}
    return lightning.Trainer(callbacks=callbacks, default_root_dir=folder, **arguments)


def trained_on_full_batches() -> nn.Sequential:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for inputs, classes in DataLoader(dataset(), batch_size=TARGET):
        F.cross_entropy(model(inputs), classes).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_modules_weights_equal_those_of_full_batches(tmp_path: Any) -> None:
    module = Classifier()
    callback = AccumulateToTarget(TARGET, max_micro_batch=7)  # which does not divide the target
    trainer = trainer_with(callback, tmp_path)
    trainer.fit(module)

    assert callback.plan is not None
    assert callback.plan.verified
    assert module.hparams["batch_size"] == callback.plan.micro_batch_size == 6
    assert trainer.accumulate_grad_batches == callback.plan.accumulation_steps == 4
    assert trainer.global_step == STEPS
    assert module.sizes_seen == {6}
    assert module.stepping_batches == STEPS  # what a schedule is made for
    for ours, theirs in zip(module.net.parameters(), trained_on_full_batches().parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_keywords_of_a_plan_train_as_full_batches_do(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match="a multiple of 24 samples"):
        config = plan_of(TARGET, 6).to("lightning")
    module = WithOwnSize()
    trainer = trainer_with(None, tmp_path, **config["trainer"])
    trainer.fit(module, DataLoader(dataset(), **config["dataloader"]))
    assert trainer.global_step == STEPS
    for ours, theirs in zip(module.net.parameters(), trained_on_full_batches().parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_data_module_with_a_name_of_its_own_is_set(tmp_path: Any) -> None:
    module, data = WithOwnSize(), Data()
    trainer = trainer_with(AccumulateToTarget(TARGET, attribute="width", max_micro_batch=8), tmp_path)
    trainer.fit(module, datamodule=data)
    assert data.width == 8
    assert trainer.global_step == STEPS
    for ours, theirs in zip(module.net.parameters(), trained_on_full_batches().parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_trainers_precision_is_tried_and_a_last_step_that_it_divides_by_too_much_is_said(tmp_path: Any) -> None:
    callback = AccumulateToTarget(TARGET, max_micro_batch=6)
    trainer = trainer_with(callback, tmp_path, precision="bf16-mixed")
    with pytest.warns(UserWarning, match="of 5 micro-batches has 1 of its 4, but Lightning divides by .*=4 all"):
        trainer.fit(Classifier(samples=TARGET + 6))
    assert callback.plan is not None
    assert callback.plan.precision == "bf16"


@pytest.mark.parametrize(
    ("samples", "limit", "said"),
    [
        (TARGET * 3, 10, "an epoch of 10 micro-batches has 2 of its 4.*Have limit_train_batches=10 come to a multiple"),
        (TARGET * 3, 0.25, "an epoch of 3 micro-batches has 3 of its 4.*Have limit_train_batches=0.25 come to"),
        (TARGET * 3 - 1, 1.0, "the last micro-batch of an epoch has 5 samples, and Lightning weighs them as much as 6"),
    ],
)
def test_an_epoch_that_is_no_whole_number_of_optimizer_steps_is_said(
    tmp_path: Any, samples: int, limit: Any, said: str
) -> None:
    trainer = trainer_with(AccumulateToTarget(TARGET, max_micro_batch=6), tmp_path, limit_train_batches=limit)
    with pytest.warns(UserWarning, match=said):
        trainer.fit(Classifier(samples=samples))


def test_an_epoch_that_is_cut_to_whole_optimizer_steps_leaves_nothing_to_say(tmp_path: Any) -> None:
    trainer = trainer_with(AccumulateToTarget(TARGET, max_micro_batch=6), tmp_path, limit_train_batches=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(optimizer step|micro-batch)")
        trainer.fit(Classifier(samples=TARGET * 3 - 1))
    assert trainer.global_step == 2


def test_a_loader_that_does_not_read_the_size_is_said(tmp_path: Any) -> None:
    module = Classifier()
    module.train_dataloader = lambda: DataLoader(dataset(), batch_size=3)
    with pytest.warns(UserWarning, match="batches of 3 samples although batch_size is 6"):
        trainer_with(AccumulateToTarget(TARGET, max_micro_batch=6), tmp_path).fit(module)


def test_what_cannot_be_set_or_tried_is_an_error_with_advice(tmp_path: Any) -> None:
    with pytest.raises(InvalidInput, match="neither WithOwnSize nor a DataModule has 'batch_size'"):
        trainer_with(AccumulateToTarget(TARGET), tmp_path).fit(WithOwnSize(), datamodule=Data())
    with pytest.raises(InvalidInput, match="loaders were passed to"):
        trainer_with(AccumulateToTarget(TARGET), tmp_path).fit(Classifier(), DataLoader(dataset()))
    with pytest.raises(InvalidInput, match="optimizes manually"):
        trainer_with(AccumulateToTarget(TARGET), tmp_path).fit(Classifier(automatic=False))
    with pytest.raises(InvalidInput, match="Trainer's is '64-true'"):
        trainer_with(AccumulateToTarget(TARGET), tmp_path, precision="64-true").fit(Classifier())
