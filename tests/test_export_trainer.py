"""A transformers Trainer with the sizes that its own trials found."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plans import plan_of
from torch import Tensor, nn

from autobatch.errors import InvalidInput
from autobatch.export import fit_trainer
from autobatch.export.trainer_losses import caveats
from autobatch.export.trainer_steps import stand_in

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

VOCABULARY = 31
TARGET = 24
STEPS = 3


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def ragged_texts(samples: int) -> list[dict[str, list[int]]]:
    """Texts of 3 to 20 tokens, which lie so that neighbours differ in length."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3 + (7 * i) % 18 for i in range(samples)]
    return [{"input_ids": torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


def padded(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """(n, longest) tokens; those that fill up are no labels."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        tokens = torch.tensor(sample["input_ids"])
        ids[row, : len(tokens)] = labels[row, : len(tokens)] = tokens
    return {"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels}


def trainer_of(model: nn.Module, folder: Path, data: Any, **arguments: Any) -> Any:
    arguments = {"train_sampling_strategy": "sequential", "use_cpu": True, **arguments}
    given = transformers.TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        **arguments,
    )
    return transformers.Trainer(model, given, train_dataset=data, data_collator=padded)


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def trained_on_full_batches(model: Any, data: list[Any], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The weights after one optimizer step for each target of samples at once."""
    model.train()
    for start in range(0, len(data), TARGET):
        batch = padded(data[start : start + TARGET])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(model)


def test_a_trainers_weights_equal_those_of_full_batches_on_ragged_texts(tmp_path: Path) -> None:
    data = ragged_texts(STEPS * TARGET - 5)  # the last optimizer step is of 19
    model = tiny_llama()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    expected = trained_on_full_batches(reference, data, optimizer)

    trainer = trainer_of(model, tmp_path, data, num_train_epochs=1, learning_rate=0.5, optim="sgd")
    plan = fit_trainer(trainer, TARGET, device="cpu", max_micro_batch=7)  # which does not divide the target
    assert plan.verified
    assert trainer.args.per_device_train_batch_size == plan.micro_batch_size == 6
    assert trainer.args.gradient_accumulation_steps == plan.accumulation_steps == 4
    trainer.train()

    assert trainer.state.global_step == STEPS
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_arguments_of_a_plan_train_as_full_batches_do(tmp_path: Path) -> None:
    data = ragged_texts(STEPS * TARGET)
    model = tiny_llama()
    reference = copy.deepcopy(model)
    expected = trained_on_full_batches(reference, data, torch.optim.SGD(reference.parameters(), lr=0.5))
    with pytest.warns(UserWarning, match="takes one micro-batch size: 6 × 4 samples"):
        arguments = plan_of(TARGET, 5).to("transformers")
    trainer_of(model, tmp_path, data, num_train_epochs=1, learning_rate=0.5, optim="sgd", **arguments).train()
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


class Watching(transformers.Trainer):  # type: ignore[misc]
    """Fails in a trial that is not as training will be."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            assert model.is_gradient_checkpointing
            assert inputs["input_ids"].shape[1] == 20, "the longest text"
            assert kwargs["num_items_in_batch"] == (inputs["labels"][:, 1:] != -100).sum()
            assert not torch.is_autocast_enabled("cpu"), "accelerate has it in the forward pass alone"
            with torch.no_grad():
                logits = model(input_ids=inputs["input_ids"][:1]).logits
            assert logits.dtype == torch.float32, "outputs are converted"
            assert torch.equal(logits, logits.bfloat16().float()), "from bfloat16"
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_trials_are_as_training_is_and_leave_the_trainer_as_it_was(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = trainer_of(model, tmp_path, ragged_texts(40), bf16=True, gradient_checkpointing=True)
    trainer.__class__ = Watching
    before = parameters_of(model)
    state = {name: value for name, value in vars(trainer).items() if name != "_train_batch_size"}
    random = torch.get_rng_state()
    plan = fit_trainer(trainer, 8, device="cpu")
    assert plan.precision == "bf16"
    after = {name: value for name, value in vars(trainer).items() if name != "_train_batch_size"}
    assert list(map(id, after.values())) == list(map(id, state.values()))
    assert trainer.optimizer is None
    assert not trainer.accelerator._dataloaders
    assert not model.is_gradient_checkpointing
    assert torch.equal(torch.get_rng_state(), random)
    for ours, theirs in zip(model.parameters(), before, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.grad is None


def test_the_one_size_is_tried_on_a_trainer_that_has_trained_before(tmp_path: Path) -> None:
    model = tiny_llama()
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = trainer_of(model, tmp_path, ragged_texts(64), max_steps=1)
    trainer.optimizer = made
    trainer.train()
    plan = fit_trainer(trainer, 64, device="cpu", max_micro_batch=12)  # 11 + 11 + 11 + 11 + 10 + 10 at first
    assert plan.micro_batch_sizes == (8,) * 8
    assert plan.verified
    assert not made.state
    assert len(next(iter(trainer.get_train_dataloader()))["labels"]) == 8
    assert trainer.get_total_train_batch_size(trainer.args) == 64


class Looking(transformers.Trainer):  # type: ignore[misc]
    """Weighs its loss by how long the texts of its data are."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        longest = max(len(sample["input_ids"]) for sample in self.train_dataset)
        return super().compute_loss(model, inputs, *args, **kwargs) / longest


class Locked(list):  # type: ignore[type-arg]
    """Data that no other process can be given."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle a lock")


def test_methods_of_the_users_own_find_the_training_data_in_trials(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_llama(), tmp_path, ragged_texts(40))
    trainer.__class__ = Looking
    assert fit_trainer(trainer, 8, device="cpu").verified


def test_data_that_cannot_be_sent_is_missed_only_where_it_is_used(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_llama(), tmp_path, Locked(ragged_texts(40)))
    trainer.__class__ = Ignoring
    with pytest.warns(UserWarning, match="does not depend on it"):
        assert fit_trainer(trainer, 8, device="cpu", max_micro_batch=4).verified
    trainer.__class__ = Looking
    with pytest.raises(InvalidInput, match=r"use its train_dataset, which cannot be sent .*: cannot pickle a lock"):
        fit_trainer(trainer, 8, device="cpu")


def caveats_of(trainer: Any) -> str:
    """What is said about four micro-batches of six."""
    return " ".join(caveats(stand_in(trainer)[0], plan_of(TARGET, 6), stand_in(trainer)[1]))


def test_a_model_that_counts_its_tokens_leaves_nothing_to_say(tmp_path: Path) -> None:
    assert not caveats_of(trainer_of(tiny_llama(), tmp_path, ragged_texts(40)))


@pytest.mark.parametrize(("texts", "last"), [(TARGET + 13, "has 12 of 24 samples"), (TARGET + 5, "")])
def test_dropping_micro_batches_where_an_epoch_then_ends_with_a_smaller_step_is_said(
    tmp_path: Path, texts: int, last: str
) -> None:
    trainer = trainer_of(tiny_llama(), tmp_path, ragged_texts(texts))
    trainer.args.dataloader_drop_last = True
    said = caveats_of(trainer)
    assert last in said and bool(said) == bool(last)


def test_a_model_that_takes_no_count_is_said(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_llama(), tmp_path, ragged_texts(40))
    trainer.model_accepts_loss_kwargs = False
    assert "takes no num_items_in_batch" in caveats_of(trainer)


class Ignoring(transformers.Trainer):  # type: ignore[misc]
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(**inputs).loss


def test_a_loss_that_ignores_its_count_is_said_with_how_much_too_large_gradients_are(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_llama(), tmp_path, ragged_texts(40))
    trainer.__class__ = Ignoring
    assert "gradients are 4 times too large" in caveats_of(trainer)


def test_a_count_of_other_labels_than_the_losss_is_said(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_llama(), tmp_path, ragged_texts(40))
    trainer._loss_shifts_labels = False  # as for causal models that transformers does not know as such
    # The first two texts have 3 and 10 tokens; the loss is over all but the first of each.
    assert "by 13 labels where its mean is over 11: gradients are about 85% of" in caveats_of(trainer)


def test_a_trainer_that_may_change_its_batch_size_is_said(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_llama(), tmp_path, ragged_texts(40), auto_find_batch_size=True)
    assert "auto_find_batch_size is on" in caveats_of(trainer)


def test_trainers_that_cannot_be_tried_are_told_why(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_llama(), tmp_path, None)
    with pytest.raises(InvalidInput, match="no train_dataset"):
        fit_trainer(trainer, 8)
    trainer.train_dataset = ragged_texts(8)
    trainer.is_fsdp_enabled = True
    with pytest.raises(InvalidInput, match="shards its model by FSDP"):
        fit_trainer(trainer, 8)
