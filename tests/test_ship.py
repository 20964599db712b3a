"""Workloads on their way to another process."""

import io
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from autobatch.errors import WorkloadNotPortable
from autobatch.workload import ship


def there(obj):
    stream = io.BytesIO()
    ship.dump(obj, stream)
    stream.seek(0)
    return ship.load(stream)


def test_tied_weights_stay_tied_and_views_stay_views():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("row", model[0].weight.detach()[2])
    arrived = there(model)
    assert arrived[0].weight is arrived[1].weight
    assert arrived.row.untyped_storage().data_ptr() == arrived[0].weight.untyped_storage().data_ptr()
    assert torch.equal(arrived.row, model.row)
    assert arrived[0].weight.data_ptr() != model[0].weight.data_ptr()


def test_an_optimizer_with_a_learning_rate_scheduler_steps_there():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which wraps the optimizer's step
    arrived_model, arrived = there((model, optimizer))
    arrived_model(torch.ones(1, 3)).sum().backward()
    arrived.step()
    assert torch.allclose(arrived_model.bias, model.bias - 0.1)


def test_an_optimizer_in_mid_training_keeps_its_state_and_its_parameters():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    arrived_model, arrived = there((model, optimizer))
    assert arrived.param_groups[0]["params"][0] is arrived_model.weight
    assert torch.equal(arrived.state[arrived_model.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])


@pytest.mark.parametrize(
    "parametrization", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_modules_compute_the_same_there(parametrization):
    model = nn.Sequential(parametrization(nn.Linear(4, 4)), nn.ReLU()).eval()
    x = torch.randn(2, 4)
    arrived = there(model)
    assert torch.equal(arrived(x), model(x))
    assert type(arrived[0]).__name__ == type(model[0]).__name__
    assert isinstance(model[0], nn.Linear)


def test_an_lstm_and_odd_tensors_arrive():
    lstm = nn.LSTM(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    assert torch.equal(there(lstm)(x)[0], lstm(x)[0])
    odd = [
        torch.empty(0, 3),
        torch.randn(4, 6).t(),
        torch.tensor(7),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor([True]),
    ]
    for sent, arrived in zip(odd, there(odd), strict=True):
        assert arrived.dtype == sent.dtype
        assert arrived.stride() == sent.stride()
        assert torch.equal(arrived, sent)


def test_closures_and_local_classes_arrive():
    scale = nn.Parameter(torch.tensor(3.0))

    class Local(nn.Module):
        def forward(self, x):
            return x * scale

    def step(model, batch):
        return model(batch).sum() + scale

    model, arrived_step = there((Local(), step))
    assert arrived_step(model, torch.ones(2)).item() == pytest.approx(9.0)


def test_what_cannot_be_sent_is_a_clear_error_and_nothing_is_written():
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    stream = io.BytesIO()
    with pytest.raises(WorkloadNotPortable, match=r"cannot be sent.*lock"):
        ship.dump(model, stream)
    assert stream.tell() == 0
