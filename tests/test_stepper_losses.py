"""What losses are means over: told, known, or found out."""

import math
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


def test_no_warning_where_nothing_is_assumed():
    model = nn.Linear(4, 2)
    batch = (torch.randn(9, 4), torch.randn(9, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_of(9, 4).stepper(model, Kept(model.parameters()), loss=nn.MSELoss()).step(batch)
