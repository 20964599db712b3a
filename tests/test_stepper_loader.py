"""Optimizer steps over loaders that yield micro-batches."""

import copy
import warnings

import pytest
import torch
from plans import plan_of
from stepping import (
    Kept,
    Tagger,
    distance,
    gradients_of,
    micro_texts,
    padding_mean,
    sample_mean,
    shifted_mean,
    texts,
    token_mean,
    token_sum,
)
from torch.nn import functional as F

from autobatch import InvalidInput

pytestmark = pytest.mark.usefixtures("float64")


def test_a_loader_of_micro_batches_gives_the_same_steps():
    (first, micros), (last, short) = micro_texts(12, 4), micro_texts(7, 4, seed=1)
    model = Tagger()
    twin = copy.deepcopy(model)
    stepper = plan_of(12, 4).stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), training_step=token_mean)
    results = []
    for i, micro in enumerate(stepper.accumulate(iter(micros + short))):
        result = micro.backward() if i % 2 else micro.backward(token_mean(model, micro.batch))
        results.append(result)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    losses = []
    for batch in (first, last):
        plain.zero_grad()
        loss = token_mean(twin, batch)
        loss.backward()
        plain.step()
        losses.append(loss.item())
    assert [result is not None for result in results] == [False, False, True, False, True]
    assert [float(result) for result in results if result] == pytest.approx(losses, rel=1e-12)
    assert distance(list(model.parameters()), list(twin.parameters())) < 1e-12


@pytest.mark.parametrize("step", [token_mean, token_sum, shifted_mean, padding_mean], ids=lambda step: step.__name__)
def test_single_samples_tell_together_what_the_loss_is(step):
    _, micros = micro_texts(9, 1)
    model = Tagger()
    optimizer = Kept(model.parameters(), lr=0.1)
    micros = [micro for micro in micros if torch.isfinite(step(model, micro).detach())]
    kept = {name: torch.cat([micro[name] for micro in micros]) for name in micros[0]}
    expected = gradients_of(model, step, kept)
    for micro in plan_of(9, 1).stepper(model, optimizer, training_step=step).accumulate(micros):
        micro.backward()
    assert distance(optimizer.seen, expected) < 1e-12


def test_means_over_samples_are_not_weighed_by_padding():
    """Micro-batches are padded to lengths of their own."""
    model = Tagger()
    micros = [{"tokens": torch.randint(11, (3, length)), "classes": torch.randint(7, (3,))} for length in (3, 11, 5)]

    def step(model, batch):
        return F.cross_entropy(model(batch["tokens"])[:, -1], batch["classes"])

    optimizer = Kept(model.parameters(), lr=0.1)
    model.zero_grad()
    (sum(step(model, micro) for micro in micros) / 3).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one batch of a single length does not tell
        for micro in plan_of(9, 3).stepper(model, optimizer, training_step=step).accumulate(micros):
            micro.backward()
    assert distance(optimizer.seen, expected) < 1e-12


def test_micro_batches_that_do_not_add_up_and_forgotten_backward_passes_are_errors():
    _, micros = micro_texts(15, 5)
    model = Tagger()
    stepper = plan_of(12, 5).stepper(model, Kept(model.parameters()), training_step=sample_mean)
    with pytest.raises(InvalidInput, match=r"do not add up to the 12 .* 10 are there, and 5 come next"):
        list(stepper.accumulate(micros))
    _, micros = micro_texts(12, 4)
    with pytest.raises(InvalidInput, match="call backward"):
        list(stepper.accumulate(micros))


def test_an_optimizer_step_that_the_caller_breaks_off_leaves_no_gradients():
    _, micros = micro_texts(12, 4)
    model = Tagger()
    stepper = plan_of(12, 4).stepper(model, Kept(model.parameters()), training_step=sample_mean, reduction="mean")
    passes = stepper.accumulate(micros)
    next(passes).backward()
    assert model.scores.weight.grad is not None
    passes.close()
    assert all(p.grad is None for p in model.parameters())


def test_texts_as_long_as_the_optimizer_step_has_samples_are_not_taken_for_samples():
    whole = texts(16, length=16)
    model = Tagger()
    stepper = plan_of(16, 4).stepper(model, Kept(model.parameters()), training_step=token_mean, reduction="mean")
    micros = [{name: rows[i : i + 4] for name, rows in whole.items()} for i in range(0, 16, 4)]
    results = [micro.backward() for micro in stepper.accumulate(micros)]
    assert [result and result.samples for result in results] == [None, None, None, 16]


def test_the_tensors_that_a_plan_knows_say_how_many_samples_there_are_beside_others():
    whole = texts(16, length=16)
    model = Tagger()
    plan = plan_of(16, 4, batch_dims={"tokens": 0, "classes": 0})
    stepper = plan.stepper(model, Kept(model.parameters()), training_step=token_mean, reduction="mean")
    assert stepper.step({name: rows[:5] for name, rows in whole.items()}).samples == 5


def test_a_step_amid_the_micro_batches_of_another_is_an_error_and_harms_none():
    whole, micros = micro_texts(12, 4)
    model = Tagger()
    optimizer = Kept(model.parameters(), lr=0.0)
    stepper = plan_of(12, 4).stepper(model, optimizer, training_step=token_mean)
    expected = gradients_of(model, token_mean, whole)
    passes, others = stepper.accumulate(micros + micros), stepper.accumulate(micros)
    next(passes).backward()
    with pytest.raises(InvalidInput, match=r"still open.*close\(\)"):
        stepper.step(whole)
    with pytest.raises(InvalidInput, match="still open"):
        next(others)
    next(passes).backward()
    result = next(passes).backward()
    assert result is not None
    assert distance(optimizer.seen, expected) < 1e-12
    stepper.step(whole)  # between two steps of the loader's there is room
    others = stepper.accumulate(micros)
    next(others).backward()
    passes.close()
    assert [micro.backward() is None for micro in others] == [True, False]
    assert distance(optimizer.seen, expected) < 1e-12


def test_who_brings_the_losses_and_says_what_they_are_needs_no_other():
    whole, micros = micro_texts(12, 4)
    model = Tagger()
    optimizer = Kept(model.parameters(), lr=0.1)
    expected = gradients_of(model, token_mean, whole)
    stepper = plan_of(12, 4).stepper(model, optimizer, reduction=lambda batch: (batch["labels"] != -100).sum())
    for micro in stepper.accumulate(micros):
        micro.backward(token_mean(model, {"tokens": micro.batch["tokens"], "labels": micro.batch["labels"]}))
    assert distance(optimizer.seen, expected) < 1e-12
    with pytest.raises(InvalidInput, match="returns no loss of its own"):
        stepper.step(whole)


def test_memory_that_runs_out_in_a_loaders_micro_batch_is_raised_with_advice():
    def step(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    _, micros = micro_texts(12, 4)
    model = Tagger()
    stepper = plan_of(12, 4).stepper(model, Kept(model.parameters()), training_step=step, reduction="mean")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        next(stepper.accumulate(micros)).backward()
    assert "stepper.step(batch), which recovers" in caught.value.__notes__[0]
