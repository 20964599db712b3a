"""Optimizer steps by a plan: against plain training on whole batches, in float64."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plan_of
from stepping import (
    STEPS,
    Kept,
    Tagger,
    distance,
    gradients_of,
    padding_mean,
    sample_mean,
    shifted_mean,
    texts,
    token_mean,
    token_sum,
)
from torch import nn
from torch.nn import functional as F

from autobatch import InvalidInput

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.filterwarnings("error")
def test_the_gradient_is_that_of_the_whole_batch_whatever_the_loss_is(step):
    batch, model = texts(23), Tagger()
    optimizer = Kept(model.parameters(), lr=0.1)
    whole = gradients_of(model, step, batch)
    loss = float(step(model, batch).detach())
    result = plan_of(23, 6).stepper(model, optimizer, training_step=step).step(batch)
    assert distance(optimizer.seen, whole) < 1e-12
    assert float(result) == pytest.approx(loss, rel=1e-12)
    assert (result.samples, result.micro_batches, result.grad_norm, result.skipped) == (23, 4, None, False)
    assert all(p.grad is None for p in model.parameters())


@settings(max_examples=60, deadline=None)
@given(
    target=st.integers(1, 40),
    largest=st.integers(1, 12),
    samples=st.integers(1, 40),
    step=st.sampled_from(STEPS),
    seed=st.integers(0, 1000),
)
def test_every_size_and_short_batch_gives_the_whole_gradient(target, largest, samples, step, seed):
    samples = min(samples, target)
    batch, model = texts(samples, seed=seed), Tagger()
    told = {
        token_mean: lambda b: (b["labels"] != -100).sum(),
        token_sum: "sum",
        shifted_mean: lambda b: (b["labels"][:, 1:] != -100).sum(),
        sample_mean: "mean",
        padding_mean: lambda b: (b["tokens"] != 0).sum(),
    }[step]
    if callable(told) and not told(batch):
        return  # a mean over nothing
    optimizer = Kept(model.parameters(), lr=0.1)
    whole = gradients_of(model, step, batch)
    plan = plan_of(target, largest, batch_dims={"tokens": 0, "labels": 0})
    plan.stepper(model, optimizer, training_step=step, reduction=told).step(batch)
    assert distance(optimizer.seen, whole) < 1e-12


def test_twenty_steps_of_adamw_with_clipping_and_scheduler_end_where_plain_training_does():
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = Tagger()
    twin = copy.deepcopy(model)

    def training(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    optimizer, scheduler = training(model)
    stepper = plan_of(24, 7).stepper(
        model, optimizer, training_step=token_mean, scheduler=scheduler, clip_grad_norm=0.5
    )
    plain, plain_scheduler = training(twin)
    for i in range(20):
        batch = texts(24 if i % 5 else 13, seed=i)
        result = stepper.step(batch)
        loss = token_mean(twin, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
        plain_scheduler.step()
        assert float(result.grad_norm) == pytest.approx(float(norm), rel=1e-4)
    assert stepper.steps == 20
    assert scheduler.get_last_lr() == plain_scheduler.get_last_lr()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_micro_batches_are_views_of_the_batch():
    batch, model, seen = texts(12), Tagger(), []

    def step(model, micro):
        seen.append(micro["tokens"])
        return sample_mean(model, micro)

    plan_of(12, 4).stepper(model, Kept(model.parameters()), training_step=step, reduction="mean").step(batch)
    storage = batch["tokens"].untyped_storage().data_ptr()
    assert [micro.untyped_storage().data_ptr() for micro in seen] == [storage] * 3


def test_a_model_with_a_loss_of_its_own_needs_none():
    class Own(Tagger):
        def forward(self, tokens, labels):
            return {"loss": F.cross_entropy(super().forward(tokens).transpose(1, 2), labels)}

    batch, model = texts(14), Own()
    optimizer = Kept(model.parameters(), lr=0.1)
    whole = gradients_of(model, lambda m, b: m(**b)["loss"], batch)
    plan_of(14, 4).stepper(model, optimizer).step(batch)
    assert distance(optimizer.seen, whole) < 1e-12


def test_losses_in_half_precision_are_summed_in_float32():
    model = nn.Linear(4, 1).bfloat16()
    optimizer = Kept(model.parameters())
    stepper = plan_of(300, 1).stepper(model, optimizer, training_step=lambda m, b: m(b).sum() * 0 + 1, reduction="mean")
    # In bfloat16 a sum of 1/300 each ends at about a half, where one more is rounded away.
    assert float(stepper.step(torch.ones(300, 4, dtype=torch.bfloat16))) == pytest.approx(1, rel=1e-5)


def test_fp16_scales_unscales_and_skips():
    torch.set_default_dtype(torch.float32)
    model = nn.Linear(4, 1)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    stepper = plan_of(8, 3, precision="fp16").stepper(
        model,
        optimizer,
        training_step=lambda m, b: m(b).float().mean() * 8,
        reduction="mean",
        scheduler=scheduler,
        scaler=scaler,
        clip_grad_norm=1.0,
    )
    batch = torch.full((8, 4), 2.0)
    skipped = stepper.step(batch)  # 2 * 8 * 2 ** 15 is beyond float16
    assert skipped.skipped
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert scheduler.get_last_lr() == [1.0]
    while stepper.step(batch).skipped:
        pass
    moved = before["weight"] - model.weight.detach()
    # The gradient is 16 for each of four weights and 8 for the bias; clipped to a norm of 1.
    assert moved.flatten().tolist() == pytest.approx([16 / math.sqrt(4 * 16**2 + 8**2)] * 4, rel=1e-3)
    assert scheduler.get_last_lr() == [pytest.approx(0.1)]


def test_measuring_the_norm_clips_nothing():
    model, batch = Tagger(), texts(10)
    optimizer = Kept(model.parameters(), lr=0.1)
    whole = gradients_of(model, token_mean, batch)
    stepper = plan_of(10, 4).stepper(model, optimizer, training_step=token_mean, clip_grad_norm=math.inf)
    norm = stepper.step(batch).grad_norm
    assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in whole]).norm()), rel=1e-12)
    assert distance(optimizer.seen, whole) < 1e-12


def test_what_cannot_be_is_an_error():
    model, plan = Tagger(), plan_of(10, 4)
    optimizer = Kept(model.parameters())
    with pytest.raises(InvalidInput, match="Pass one of them"):
        plan.stepper(model, optimizer, loss=nn.MSELoss(), training_step=token_mean)
    with pytest.raises(InvalidInput, match="no parameter of the optimizer is one of the model"):
        plan.stepper(model, Kept(Tagger().parameters()))
    of_another = torch.optim.lr_scheduler.StepLR(Kept(model.parameters()), 1)
    with pytest.raises(InvalidInput, match="learning rates of another optimizer"):
        plan.stepper(model, optimizer, scheduler=of_another)
    with pytest.raises(InvalidInput, match="returns no loss of its own"):
        plan.stepper(model, optimizer).step({"tokens": texts(10)["tokens"]})
    with pytest.raises(InvalidInput, match="clip_grad_norm must be above 0"):
        plan.stepper(model, optimizer, clip_grad_norm=0.0)
    with pytest.raises(InvalidInput, match="reduction is what the loss is"):
        plan.stepper(model, optimizer, reduction="tokens")
    with pytest.raises(InvalidInput, match="gradients that are there, but is LBFGS"):
        plan.stepper(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(InvalidInput, match=r"must be a torch optimizer .* but is SGD"):
        plan.stepper(model, torch.optim.SGD)
    with pytest.raises(InvalidInput, match="once an epoch"):
        plan.stepper(model, optimizer, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(InvalidInput, match="12 samples, more than the 10"):
        plan.stepper(model, optimizer, training_step=token_mean).step(texts(12))
    with pytest.raises(InvalidInput, match=r"NumPy arrays and no tensors.*default_collate"):
        plan.stepper(model, optimizer, training_step=token_mean).step({k: v.numpy() for k, v in texts(10).items()})
    with pytest.raises(InvalidInput, match=r"this batch is empty.*drop_last=True"):
        plan_of(10, 4, batch_dims={"tokens": 0, "labels": 0}).stepper(model, optimizer, training_step=token_mean).step(
            {k: v[:0] for k, v in texts(10).items()}
        )
    with pytest.raises(InvalidInput, match="gave str"):
        plan.stepper(model, optimizer, training_step=token_mean, reduction=lambda batch: "many").step(texts(10))
    with pytest.raises(InvalidInput, match="must be a scalar"):
        plan.stepper(model, optimizer, training_step=lambda m, b: m(b["tokens"]), reduction="mean").step(texts(10))
    with pytest.raises(InvalidInput, match="over 2 ranks, but the model is trained by 1"):
        plan_of(10, 4, ranks=2).stepper(model, optimizer)


def test_a_bug_in_the_model_is_raised_as_it_is():
    model = Tagger()

    def step(model, batch):
        raise LookupError("no such thing")

    stepper = plan_of(10, 4).stepper(model, Kept(model.parameters()), training_step=step, reduction="mean")
    with pytest.raises(LookupError, match="no such thing"):
        stepper.step(texts(10))
    assert stepper.events == []


@pytest.mark.parametrize("recover", [True, False])
@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
def test_a_step_that_fails_in_its_middle_leaves_no_gradients(error, recover):
    model, runs = Tagger(), []

    def step(model, batch):
        runs.append(model.scores.weight.grad is not None)
        if len(runs) == 3:
            raise error
        return sample_mean(model, batch)

    stepper = plan_of(12, 4).stepper(
        model, Kept(model.parameters()), training_step=step, reduction="mean", recover=recover
    )
    with pytest.raises(error):
        stepper.step(texts(12))
    assert runs == [False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_gradients_that_the_optimizer_does_not_know_do_not_add_up():
    model, seen = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), []
    optimizer = torch.optim.SGD(model[1].parameters())
    optimizer.register_step_pre_hook(lambda *_: seen.append(model[0].weight.grad.clone()))
    stepper = plan_of(4, 2).stepper(model, optimizer, training_step=lambda m, b: m(b).mean(), reduction="mean")
    batch = torch.randn(4, 3)
    model[1].requires_grad_(True)
    for _ in range(2):
        with torch.no_grad():
            model[1].weight.fill_(1.0)
        stepper.step(batch)
    assert torch.allclose(seen[0], seen[1])
    assert model[0].weight.grad is None


def test_parameters_that_join_later_are_clipped_with_the_others():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.0)
    stepper = plan_of(4, 2).stepper(
        model, optimizer, training_step=lambda m, b: m(b).mean(), reduction="mean", clip_grad_norm=math.inf
    )
    batch = torch.randn(4, 3)
    before = float(stepper.step(batch).grad_norm)
    optimizer.add_param_group({"params": model[0].parameters()})
    assert float(stepper.step(batch).grad_norm) > before


def test_a_stepper_goes_on_from_its_state():
    model = Tagger()
    plan = plan_of(12, 4)
    stepper = plan.stepper(model, Kept(model.parameters()), training_step=token_mean)
    stepper.step(texts(12))
    state = stepper.state_dict()
    other = plan_of(12, 6).stepper(model, Kept(model.parameters()), training_step=token_mean)
    other.load_state_dict(state)  # memory has never run out, so that this plan's own size stands
    assert (other.steps, other.micro_batch_sizes) == (1, (6, 6))
    other.load_state_dict({**state, "largest": 3})
    assert (other.steps, other.micro_batch_sizes) == (1, (3, 3, 3, 3))
    assert other.state_dict()["largest"] == 3
    with pytest.raises(InvalidInput, match="no state of a stepper"):
        other.load_state_dict({})


def test_a_model_in_evaluation_mode_is_warned_of():
    model = Tagger().eval()
    stepper = plan_of(6, 4).stepper(model, Kept(model.parameters()), training_step=sample_mean, reduction="mean")
    with pytest.warns(UserWarning, match=r"evaluation mode.*model.train\(\)"):
        stepper.step(texts(6))


def test_an_optimizer_of_a_part_of_the_model_is_no_error():
    model = Tagger()
    before = model.embedding.weight.detach().clone()
    plan_of(6, 3).stepper(model, Kept(model.scores.parameters(), lr=0.1), training_step=token_mean).step(texts(6))
    assert torch.equal(model.embedding.weight, before)
