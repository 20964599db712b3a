"""Optimizer steps by a plan: against plain training on whole batches, in float64."""

import copy
import math
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plan_of
from torch import nn
from torch.nn import functional as F

from autobatch import InvalidInput


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Tagger(nn.Module):
    """Scores for every token of padded texts."""

    def __init__(self, classes=7):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.scores = nn.Linear(6, classes)

    def forward(self, tokens):
        return self.scores(self.embedding(tokens).tanh().cumsum(1))


def texts(n, length=5, seed=0):
    """Tokens, and labels of which each text has another number."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (n, length), generator=generator)
    labels = torch.randint(7, (n, length), generator=generator)
    filled = torch.randint(1, length + 1, (n, 1), generator=generator)
    return {"tokens": tokens, "labels": labels.masked_fill(torch.arange(length) >= filled, -100)}


def token_mean(model, batch):
    return F.cross_entropy(model(batch["tokens"]).transpose(1, 2), batch["labels"])


def token_sum(model, batch):
    return F.cross_entropy(model(batch["tokens"]).transpose(1, 2), batch["labels"], reduction="sum")


def shifted_mean(model, batch):
    return F.cross_entropy(model(batch["tokens"])[:, :-1].transpose(1, 2), batch["labels"][:, 1:])


def sample_mean(model, batch):
    return model(batch["tokens"]).square().mean()


def padding_mean(model, batch):
    """A mean over tokens that are no padding, which is 0."""
    real = batch["tokens"] != 0
    return (model(batch["tokens"]).square().mean(-1) * real).sum() / real.sum()


def gradients_of(model, step, batch):
    model.zero_grad()
    step(model, batch).backward()
    return [p.grad.clone() for p in model.parameters()]


class Kept(torch.optim.SGD):
    """Remembers the gradients that it was stepped with."""

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def distance(ours, theirs):
    ours, theirs = (torch.cat([t.detach().flatten() for t in tensors]) for tensors in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())


STEPS = [token_mean, token_sum, shifted_mean, sample_mean, padding_mean]


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


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(ignore_index=3),
        nn.CrossEntropyLoss(weight=torch.arange(1.0, 8), label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
        F.cross_entropy,
    ],
    ids=["plain", "ignored class", "class weights", "sum", "function"],
)
def test_the_counts_of_cross_entropy_are_known(criterion):
    if isinstance(criterion, nn.CrossEntropyLoss) and criterion.weight is not None:
        criterion = criterion.double()
    model = nn.Linear(4, 7)
    targets = torch.randint(7, (19,), generator=torch.Generator().manual_seed(1))
    if getattr(criterion, "ignore_index", -100) == -100:
        targets[::3] = -100
    batch = (torch.randn(19, 4), targets)
    optimizer = Kept(model.parameters(), lr=0.1)
    whole = gradients_of(model, lambda m, b: criterion(m(b[0]), b[1]), batch)
    plan_of(19, 4).stepper(model, optimizer, loss=criterion).step(batch)
    assert distance(optimizer.seen, whole) < 1e-12


def test_an_ignored_class_beyond_the_class_weights_is_no_class():
    criterion = nn.CrossEntropyLoss(weight=torch.arange(1.0, 8), ignore_index=255).double()
    targets = torch.randint(7, (19,), generator=torch.Generator().manual_seed(1))
    targets[::3] = 255
    model, batch = nn.Linear(4, 7), (torch.randn(19, 4), targets)
    optimizer = Kept(model.parameters(), lr=0.1)
    whole = gradients_of(model, lambda m, b: criterion(m(b[0]), b[1]), batch)
    plan_of(19, 4).stepper(model, optimizer, loss=criterion).step(batch)
    assert distance(optimizer.seen, whole) < 1e-12


def test_micro_batches_in_which_nothing_counts_leave_no_trace():
    batch, model = texts(12), Tagger()
    batch["labels"][3:6] = -100
    optimizer = Kept(model.parameters(), lr=0.1)
    whole = gradients_of(model, token_mean, batch)
    stepper = plan_of(12, 3).stepper(model, optimizer, training_step=token_mean, reduction=_labels)
    result = stepper.step(batch)
    assert distance(optimizer.seen, whole) < 1e-12
    assert math.isfinite(float(result))


def _labels(batch):
    return (batch["labels"] != -100).sum()


def test_a_batch_in_which_nothing_counts_is_an_error():
    batch, model = texts(12), Tagger()
    batch["labels"][:] = -100
    stepper = plan_of(12, 3).stepper(model, Kept(model.parameters()), training_step=token_mean, reduction=_labels)
    with pytest.raises(InvalidInput, match="nothing in this batch counts"):
        stepper.step(batch)


def test_a_loss_that_compares_samples_is_said_not_to_add_up():
    def contrast(model, batch):
        codes = F.normalize(model(batch["tokens"]).mean(1), dim=-1)
        return F.cross_entropy(codes @ codes.T / 0.1, torch.arange(len(codes)))

    model = Tagger()
    stepper = plan_of(12, 4).stepper(model, Kept(model.parameters()), training_step=contrast)
    with pytest.warns(UserWarning, match="compared with one another") as caught:
        stepper.step(texts(12))
    assert caught[0].filename == __file__


def test_finding_out_what_the_loss_is_leaves_no_trace():
    model = nn.Sequential(Tagger(), nn.Dropout(0.5), nn.BatchNorm1d(5))
    model[1].eval()
    seen = []

    def step(model, batch):
        seen.append(len(batch["tokens"]))
        random.random()
        torch.rand(1)
        return model(batch["tokens"]).square().mean()

    stepper = plan_of(12, 6).stepper(model, Kept(model.parameters()), training_step=step)
    flags = [module.training for module in model.modules()]
    torch.manual_seed(3)
    random.seed(3)
    stepper.step(texts(12))
    drawn = torch.rand(1), random.random()
    torch.manual_seed(3)
    random.seed(3)
    for _ in range(2):
        torch.rand(1)
        random.random()
    assert drawn == (torch.rand(1), random.random())
    assert [module.training for module in model.modules()] == flags
    assert seen[-2:] == [6, 6] and seen[:-2] == [1, 2, 3] * (len(seen) // 3)


def test_a_first_batch_that_says_nothing_leaves_the_question_open():
    """All labels count in the first batch: whether tokens or samples weigh, only the second shows."""
    even, ragged, model = texts(12), texts(12, seed=1), Tagger()
    even["labels"] = even["labels"].clamp(min=0)
    optimizer = Kept(model.parameters(), lr=0.1)
    stepper = plan_of(12, 4).stepper(model, optimizer, training_step=token_mean)
    stepper.step(even)
    whole = gradients_of(model, token_mean, ragged)
    stepper.step(ragged)
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
        plan.stepper(model, optimizer, loss=nn.MSELoss(), training_step=token_mean).step(texts(10))
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


def micro_texts(samples, size, seed=0):
    whole = texts(samples, seed=seed)
    return whole, [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, samples, size)]


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


@pytest.mark.parametrize("ignored", [-100, 0, 1, -1, 255])
def test_texts_that_lie_along_the_second_dimension_are_counted_too(ignored):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.cells, self.scores = nn.Embedding(11, 6), nn.LSTM(6, 8), nn.Linear(8, 7)

        def forward(self, tokens):
            return self.scores(self.cells(self.embedding(tokens))[0])

    def step(model, batch):
        scores, labels = model(batch[0]), batch[1]
        return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=ignored)

    torch.manual_seed(0)
    tokens, labels = torch.randint(11, (9, 14)), torch.randint(2, 7, (9, 14))
    labels[torch.arange(9)[:, None] >= torch.randint(1, 10, (14,))] = ignored
    model = Recurrent()
    optimizer = Kept(model.parameters(), lr=0.1)
    whole = gradients_of(model, step, (tokens, labels))
    plan_of(14, 4, batch_dims={"0": 1, "1": 1}).stepper(model, optimizer, training_step=step).step((tokens, labels))
    assert distance(optimizer.seen, whole) < 1e-12


@pytest.mark.parametrize("step", [token_mean, token_sum, shifted_mean, padding_mean], ids=lambda step: step.__name__)
def test_single_samples_tell_together_what_the_loss_is(step):
    whole, micros = micro_texts(9, 1)
    model = Tagger()
    optimizer = Kept(model.parameters(), lr=0.1)
    expected = gradients_of(model, step, whole)
    micros = [micro for micro in micros if torch.isfinite(step(model, micro).detach())]
    for micro in plan_of(9, 1).stepper(model, optimizer, training_step=step).accumulate(micros):
        micro.backward()
    if len(micros) == 9:
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


def test_running_means_move_as_over_the_whole_batch():
    batch = torch.randn(20, 3, 4) + 2
    for momentum in (0.1, None, 1.0):
        model = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum), nn.Flatten(), nn.Linear(12, 1))
        twin = copy.deepcopy(model)
        stepper = plan_of(20, 7).stepper(
            model, torch.optim.SGD(model.parameters(), lr=0.0), training_step=lambda m, b: m(b).mean(), reduction="mean"
        )
        for _ in range(3):
            stepper.step(batch)
            twin(batch)
        ours, theirs = model[0], twin[0]
        assert torch.allclose(ours.running_mean, theirs.running_mean, rtol=1e-12)
        # The micro-batches' own means lie apart, which their variances do not show.
        assert torch.allclose(ours.running_var, theirs.running_var, rtol=0.2)
        assert ours.num_batches_tracked == theirs.num_batches_tracked
        assert ours.momentum == momentum


def test_a_step_that_fails_counts_as_one_at_most():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 1))

    def step(model, batch):
        loss = model(batch).mean()
        if failing:
            raise LookupError
        return loss

    stepper = plan_of(8, 2).stepper(model, Kept(model.parameters()), training_step=step, reduction="mean")
    for failing in (True, False):
        try:
            stepper.step(torch.randn(8, 3))
        except LookupError:
            assert failing
        assert model[0].momentum is None
    assert int(model[0].num_batches_tracked) <= 2


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


def test_frozen_batch_norm_stays_as_it_is():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[0].eval()
    before = copy.deepcopy(model[0].state_dict())
    stepper = plan_of(9, 4).stepper(
        model, torch.optim.SGD(model[1].parameters()), training_step=lambda m, b: m(b).mean(), reduction="mean"
    )
    stepper.step(torch.randn(9, 3))
    assert all(torch.equal(before[name], value) for name, value in model[0].state_dict().items())


def test_a_stepper_goes_on_from_its_state():
    model = Tagger()
    plan = plan_of(12, 4)
    stepper = plan.stepper(model, Kept(model.parameters()), training_step=token_mean)
    stepper.step(texts(12))
    state = stepper.state_dict()
    other = plan.stepper(model, Kept(model.parameters()), training_step=token_mean)
    other.load_state_dict({**state, "largest": 3})
    assert (other.steps, other.micro_batch_sizes) == (1, (3, 3, 3, 3))
    with pytest.raises(InvalidInput, match="no state of a stepper"):
        other.load_state_dict({})


def test_a_model_in_evaluation_mode_is_warned_of():
    model = Tagger().eval()
    stepper = plan_of(6, 4).stepper(model, Kept(model.parameters()), training_step=sample_mean, reduction="mean")
    with pytest.warns(UserWarning, match=r"evaluation mode.*model.train\(\)"):
        stepper.step(texts(6))


def test_compiled_models_have_one_momentum_for_all_micro_batches():
    seen = []
    layer = nn.BatchNorm1d(3, momentum=0.19)
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(module.momentum))
    model = torch.compile(nn.Sequential(layer, nn.Linear(3, 1)), backend="eager")
    stepper = plan_of(8, 4).stepper(
        model, Kept(model.parameters(), lr=0.0), training_step=lambda m, b: m(b).mean(), reduction="mean"
    )
    stepper.step(torch.randn(8, 3))
    assert len(set(seen)) == 1 and seen[0] == pytest.approx(0.1)
    assert layer.momentum == 0.19


def test_no_warning_where_nothing_is_assumed():
    model = nn.Linear(4, 2)
    batch = (torch.randn(9, 4), torch.randn(9, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_of(9, 4).stepper(model, Kept(model.parameters()), loss=nn.MSELoss()).step(batch)
