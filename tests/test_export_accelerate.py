"""accelerate's loop with a batch size that was found, and the target held."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plans import plan_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autobatch.errors import InvalidInput, NothingFits
from autobatch.export import find_executable_batch_size

TARGET = 24


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def samples(steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(steps * TARGET, 5, generator=generator)
    return inputs, torch.randint(3, (steps * TARGET,), generator=generator)


def trained_with(accelerator: Any, batch_size: int, fits: int = TARGET) -> nn.Module:
    """A model after an epoch of accelerate's own loop; memory runs out beyond `fits` samples."""
    model = mlp()
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5),
        DataLoader(TensorDataset(*samples(steps=3)), batch_size=batch_size),
    )
    for inputs, classes in loader:
        if len(inputs) > fits:
            raise out_of_memory()
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(inputs), classes))
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model)


def assert_equals_full_batches(trained: nn.Module) -> None:
    reference = mlp()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    for inputs, classes in zip(*(part.split(TARGET) for part in samples(steps=3)), strict=True):
        F.cross_entropy(reference(inputs), classes).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(trained.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_training_with_an_accelerator_equals_full_batches_after_running_out_of_memory() -> None:
    accelerate = pytest.importorskip("accelerate")
    sizes = []

    @find_executable_batch_size(target=TARGET)
    def train(batch_size: int, accumulation_steps: int, fits: int) -> nn.Module:
        sizes.append((batch_size, accumulation_steps))
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=accumulation_steps, cpu=True)
        return trained_with(accelerator, batch_size, fits)

    assert_equals_full_batches(train(fits=6))
    assert sizes == [(24, 1), (12, 2), (8, 3), (6, 4)]


def test_the_keywords_of_a_plan_train_as_full_batches_do() -> None:
    accelerate = pytest.importorskip("accelerate")
    with pytest.warns(UserWarning, match="a multiple of 24 samples"):
        config = plan_of(TARGET, 6).to("accelerate")
    assert_equals_full_batches(
        trained_with(accelerate.Accelerator(**config["accelerator"], cpu=True), **config["dataloader"])
    )


def test_a_target_is_held_by_every_size_from_the_largest_that_may_be_tried() -> None:
    tried = []

    def train(batch_size: int, accumulation_steps: int) -> None:
        tried.append((batch_size, accumulation_steps))
        raise out_of_memory()

    with pytest.raises(NothingFits, match="micro-batches of 1 sample"):
        find_executable_batch_size(train, target=90, starting_batch_size=20)()
    assert tried == [(18, 5), (15, 6), (10, 9), (9, 10), (6, 15), (5, 18), (3, 30), (2, 45), (1, 90)]


def test_each_call_begins_with_the_largest_size() -> None:
    first = []

    @find_executable_batch_size(target=8)
    def train(batch_size: int, accumulation_steps: int, limit: int) -> int:
        first.append(batch_size)
        if batch_size > limit:
            raise out_of_memory()
        return batch_size

    assert train(2) == 2
    assert train(limit=8) == 8
    assert first == [8, 4, 2, 8]


def test_what_failed_is_freed_before_the_next_call() -> None:
    held: list[weakref.ref[nn.Module]] = []

    @find_executable_batch_size(target=4)
    def train(batch_size: int, accumulation_steps: int) -> int:
        assert all(model() is None for model in held)
        model = nn.Linear(2, 2)
        model.parts = [model]  # type: ignore[assignment]  # a cycle, as many objects of training are in
        held.append(weakref.ref(model))
        if batch_size > 1:
            raise out_of_memory()
        return batch_size

    assert train() == 1
    assert len(held) == 3


def test_anything_but_memory_is_raised_as_it_is() -> None:
    calls = []

    @find_executable_batch_size(target=4)
    def train(batch_size: int, accumulation_steps: int) -> None:
        calls.append(batch_size)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied: this model is out of memory lane")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train()
    assert calls == [4]


def test_each_process_of_a_launcher_takes_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")

    def train(batch_size: int, accumulation_steps: int) -> tuple[int, int]:
        return batch_size, accumulation_steps

    assert find_executable_batch_size(train, target=256, starting_batch_size=20)() == (16, 4)
    with pytest.raises(InvalidInput, match=r"not a multiple of 4 ranks.* work: 252, 256"):
        find_executable_batch_size(train, target=255)()


@pytest.mark.parametrize("sizes", [{"target": 0}, {"target": 4, "starting_batch_size": 0}])
def test_sizes_below_one_are_errors(sizes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="must be at least 1 sample"):
        find_executable_batch_size(lambda size, steps: None, **sizes)


def test_a_function_that_does_not_take_both_numbers_is_told_what_to_take() -> None:
    @find_executable_batch_size(target=TARGET)
    def by_size(batch_size: int) -> None: ...

    @find_executable_batch_size(target=TARGET)
    def by_both(batch_size: int, accumulation_steps: int) -> tuple[int, int]:
        return batch_size, accumulation_steps

    with pytest.raises(InvalidInput, match=r"calls by_size\(batch_size, accumulation_steps, ...\) with both.*too many"):
        by_size()
    with pytest.raises(InvalidInput, match="call it without them"):
        by_both(8, 3)
    assert by_both() == (TARGET, 1)
