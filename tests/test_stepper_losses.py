"""What losses are means over: told, known, or found out."""

import math
import random
import warnings

import pytest
import torch
from plans import plan_of
from stepping import Kept, Tagger, distance, gradients_of, texts, token_mean
from torch import nn
from torch.nn import functional as F

from autobatch import InvalidInput

pytestmark = pytest.mark.usefixtures("float64")


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


def _labels(batch):
    return (batch["labels"] != -100).sum()


def test_micro_batches_in_which_nothing_counts_leave_no_trace():
    batch, model = texts(12), Tagger()
    batch["labels"][3:6] = -100
    optimizer = Kept(model.parameters(), lr=0.1)
    whole = gradients_of(model, token_mean, batch)
    stepper = plan_of(12, 3).stepper(model, optimizer, training_step=token_mean, reduction=_labels)
    result = stepper.step(batch)
    assert distance(optimizer.seen, whole) < 1e-12
    assert math.isfinite(float(result))


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


def test_no_warning_where_nothing_is_assumed():
    model = nn.Linear(4, 2)
    batch = (torch.randn(9, 4), torch.randn(9, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_of(9, 4).stepper(model, Kept(model.parameters()), loss=nn.MSELoss()).step(batch)
