"""What a loss is a mean over, where nobody says it: found out by running it, and looked at again."""

import random
import warnings

import pytest
import torch
from plans import plan_of
from stepping import Kept, Tagger, distance, gradients_of, sample_mean, texts, token_mean
from torch import nn
from torch.nn import functional as F

from autobatch import InvalidInput

pytestmark = pytest.mark.usefixtures("float64")


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
    assert len(seen) > 2 and seen[-2:] == [6, 6] and seen[:-2] == [1, 2, 3] * (len(seen) // 3)


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


def running_out_with(samples):
    """A mean over tokens for whose evaluation so many samples are too many."""
    seen = []

    def step(model, batch):
        n = len(batch["tokens"])
        if not torch.is_grad_enabled():
            seen.append(n)
            if n >= samples:
                torch.empty(1 << 50)
        return token_mean(model, batch)

    return step, seen


@pytest.mark.filterwarnings("error")
def test_where_three_samples_are_too_many_two_tell():
    step, seen = running_out_with(3)
    batch, model = texts(12), Tagger()
    optimizer = Kept(model.parameters(), lr=0.1)
    whole = gradients_of(model, token_mean, batch)
    plan_of(12, 4).stepper(model, optimizer, training_step=step).step(batch)
    assert distance(optimizer.seen, whole) < 1e-12
    assert seen[-3:] == [1, 1, 2]


def test_where_two_samples_are_too_many_it_has_to_be_said_and_nothing_is_trained():
    step, _ = running_out_with(2)
    model = Tagger()
    before = [p.detach().clone() for p in model.parameters()]
    stepper = plan_of(12, 1).stepper(model, Kept(model.parameters(), lr=0.1), training_step=step)
    with pytest.raises(InvalidInput, match=r"memory ran out with two samples.*reduction=lambda"):
        stepper.step(texts(12))
    assert all(map(torch.equal, before, model.parameters()))
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("largest", "most"), [(1, 2), (2, 2), (3, 3)])
@pytest.mark.filterwarnings("error")
def test_hardly_more_samples_are_run_together_than_in_training(largest, most):
    step, seen = running_out_with(99)
    batch, model = texts(12), Tagger()
    optimizer = Kept(model.parameters(), lr=0.1)
    batch = {name: rows[(batch["labels"] != -100).any(1)] for name, rows in batch.items()}
    whole = gradients_of(model, token_mean, batch)
    plan_of(12, largest).stepper(model, optimizer, training_step=step).step(batch)
    assert distance(optimizer.seen, whole) < 1e-12
    assert max(seen) == most


def test_candidates_that_hardly_differ_at_first_are_told_apart_when_they_do():
    """At first all tokens have the same loss, and there is a single one of padding, which does not count."""

    def step(model, batch):
        real = batch["tokens"] != 0
        return (model(batch["tokens"]).square().mean(-1) * real).sum() / real.sum()

    model = nn.Embedding(11, 6)
    with torch.no_grad():
        model.weight[0] = model.weight[2]
    first, ragged = {"tokens": torch.full((64, 50), 2)}, {"tokens": torch.randint(1, 11, (64, 50))}
    first["tokens"][5, 49] = 0
    ragged["tokens"][torch.arange(50) >= torch.randint(10, 50, (64, 1))] = 0
    optimizer = Kept(model.parameters(), lr=0.0)
    stepper = plan_of(64, 16).stepper(model, optimizer, training_step=step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepper.step(first)
    whole = gradients_of(model, step, ragged)
    stepper.step(ragged)
    assert distance(optimizer.seen, whole) < 1e-12


def test_a_loss_that_turns_out_to_be_another_is_warned_of_and_weighed_as_that():
    model, losses = Tagger(), [token_mean]

    def step(model, batch):
        return losses[-1](model, batch)

    optimizer = Kept(model.parameters(), lr=0.01)
    stepper = plan_of(12, 4).stepper(model, optimizer, training_step=step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(9):
            stepper.step(texts(12, seed=seed))
    losses.append(sample_mean)
    whole = gradients_of(model, sample_mean, texts(12, seed=9))
    with pytest.warns(UserWarning, match="over samples from the 10th step on; up to there for a mean over labels"):
        stepper.step(texts(12, seed=9))
    assert distance(optimizer.seen, whole) < 1e-12


def test_a_loss_that_turns_out_to_be_no_such_mean_is_warned_of():
    model, losses = Tagger(), [token_mean]

    def power(model, batch):
        return token_mean(model, batch) ** 2

    stepper = plan_of(12, 4).stepper(
        model, Kept(model.parameters(), lr=0.01), training_step=lambda model, batch: losses[-1](model, batch)
    )
    for seed in range(9):
        stepper.step(texts(12, seed=seed))
    losses.append(power)
    with pytest.warns(UserWarning, match=r"a mean over labels other than -100, but in the 10th step the loss of 3"):
        stepper.step(texts(12, seed=9))


@pytest.mark.filterwarnings("error")
def test_looking_again_costs_three_short_runs_in_the_tenth_step():
    step, seen = running_out_with(99)
    model = Tagger()
    stepper = plan_of(12, 4).stepper(model, Kept(model.parameters(), lr=0.01), training_step=step)
    looks = []
    for seed in range(12):
        stepper.step(texts(12, seed=seed))
        looks.append(len(seen))
    assert looks[1] == looks[8]
    assert looks[9] == looks[8] + 3 == looks[11]


@pytest.mark.filterwarnings("error")
def test_masks_that_are_added_to_scores_count_nothing():
    batch, model = texts(12), Tagger()
    batch["mask"] = torch.zeros(12, 5).masked_fill(batch["labels"] == -100, -torch.inf)
    optimizer = Kept(model.parameters(), lr=0.1)
    whole = gradients_of(model, token_mean, batch)
    plan_of(12, 4).stepper(model, optimizer, training_step=token_mean).step(batch)
    assert distance(optimizer.seen, whole) < 1e-12


class Scaled(Tagger):
    """With a buffer of which all elements stand in one place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1).expand(6))

    def forward(self, tokens):
        return self.scores((self.embedding(tokens) * self.scale).tanh().cumsum(1))


@pytest.mark.filterwarnings("error")
def test_buffers_that_cannot_be_written_do_not_keep_the_loss_from_being_found_out():
    batch, model = texts(12), Scaled()
    optimizer = Kept(model.parameters(), lr=0.0)
    whole = gradients_of(model, token_mean, batch)
    plan_of(12, 4).stepper(model, optimizer, training_step=token_mean).step(batch)
    assert distance(optimizer.seen, whole) < 1e-12
    assert model.training


def test_buffers_that_cannot_be_written_do_not_keep_a_step_from_being_run_again():
    batch, model, passes = texts(12), Scaled(), []

    def step(model, batch):
        passes.append(1)
        if len(passes) == 2:
            torch.empty(1 << 50)
        return sample_mean(model, batch)

    stepper = plan_of(12, 4).stepper(model, Kept(model.parameters()), training_step=step, reduction="mean")
    stepper.step(batch)
    assert [event.to_size for event in stepper.events] == [3]


@pytest.mark.filterwarnings("error")
def test_large_buffers_are_put_back_where_a_pass_changed_them():
    class Counts(Tagger):
        def __init__(self):
            super().__init__()
            self.register_buffer("passes", torch.zeros(1 << 18))

        def forward(self, tokens):
            self.passes += 1
            return super().forward(tokens)

    batch, model, passes = texts(12), Counts(), []

    def step(model, batch):
        passes.append(1)
        if len(passes) in runs_out:
            torch.empty(1 << 50)
        return token_mean(model, batch)

    runs_out = set()
    stepper = plan_of(12, 4).stepper(model, Kept(model.parameters()), training_step=step)
    stepper.step(batch)
    assert model.passes.unique().tolist() == [3]  # and not those in which the loss was found out
    runs_out = {len(passes) + 2, len(passes) + 5}
    stepper.step(batch)
    assert len(stepper.events) == 2
    assert model.passes.unique().tolist() == [3 + len(stepper.micro_batch_sizes)]


def test_a_step_that_cannot_be_run_in_evaluation_mode_is_not_run_again_there_in_full_precision():
    looks = []

    def step(model, batch):
        if not torch.is_grad_enabled():
            looks.append(1)
            raise LookupError("for training only")
        return token_mean(model, batch)

    model = Tagger()
    with pytest.warns(UserWarning, match="for training only"):
        plan_of(12, 4).stepper(model, Kept(model.parameters()), training_step=step).step(texts(12))
    assert len(looks) == 1


def _next_tokens(model, batch):
    return F.cross_entropy(model(batch["tokens"]).transpose(1, 2), batch["labels"], ignore_index=2)


def _padded_texts(n, full):
    """Next tokens, where 2 is padding that no mask tells of, and the first texts are as long as can be."""
    tokens = torch.randint(3, 7, (n, 8))
    lengths = torch.where(torch.arange(n) < full, 8, torch.randint(2, 8, (n,)))
    tokens[torch.arange(8) >= lengths[:, None]] = 2
    labels = tokens.roll(-1, 1)
    labels[:, -1] = 2
    return {"tokens": tokens, "labels": labels}


def _labelled(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=254)


def _with_unlabelled(n, full):
    return torch.randn(n, 6), torch.randint(7, (n,)).masked_fill(torch.arange(n) % 5 > 4 * full / n, 254)


def _measured(model, batch):
    there = ~batch["t"].isnan()
    return F.mse_loss(model(batch["x"])[there], batch["t"][there])


def _with_gaps(n, full):
    gaps = (torch.rand(n, 7) < 0.4) & (torch.arange(n) >= full)[:, None]
    return {"x": torch.randn(n, 6), "t": torch.randn(n, 7).masked_fill(gaps, torch.nan)}


def _unmasked(model, batch):
    return model(batch["x"]).square()[~batch["hidden"]].mean()


def _with_masks(n, full):
    return {"x": torch.randn(n, 6), "hidden": (torch.rand(n, 7) < 0.4) & (torch.arange(n) >= full)[:, None]}


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("full", [0, 16, 20], ids=["none full", "most full", "all full"])
@pytest.mark.parametrize(
    ("step", "batch_of"),
    [(_next_tokens, _padded_texts), (_labelled, _with_unlabelled), (_measured, _with_gaps), (_unmasked, _with_masks)],
    ids=["padding", "unlabelled", "gaps", "inverted mask"],
)
@pytest.mark.filterwarnings("error")
def test_marks_of_what_does_not_count_are_found_in_the_data(step, batch_of, full, size):
    torch.manual_seed(0)
    model = Tagger() if step is _next_tokens else nn.Linear(6, 7)
    optimizer = Kept(model.parameters(), lr=0.0)
    stepper = plan_of(20, size).stepper(model, optimizer, training_step=step)
    for seen in (full, 10):
        batch = batch_of(20, seen)
        whole = gradients_of(model, step, batch)
        stepper.step(batch)
        assert distance(optimizer.seen, whole) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.filterwarnings("error")
def test_classes_that_are_common_all_count(size):
    torch.manual_seed(0)
    model = nn.Linear(6, 10)
    stepper = plan_of(32, size).stepper(
        model,
        Kept(model.parameters(), lr=0.0),
        training_step=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    )
    for _ in range(12):
        stepper.step((torch.randn(32, 6), torch.randint(10, (32,))))


def test_a_loss_that_is_no_number_is_said_to_be_that():
    model = Tagger()
    stepper = plan_of(12, 4).stepper(
        model, Kept(model.parameters()), training_step=lambda model, batch: token_mean(model, batch) * torch.nan
    )
    with pytest.warns(UserWarning, match="the loss of 3 samples is nan, and so tells nothing"):
        stepper.step(texts(12))
