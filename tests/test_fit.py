"""`fit` from end to end on this machine's memory: small real models, real limits, real failures."""

import copy
import math
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import autobatch
from autobatch import Verdict, Workload
from autobatch.progress import SearchStarted, TrialEnded, TrialStarted

MIB = 1 << 20


class Wide(nn.Module):
    """Keeps 3 MiB of activations for each sample, so that small limits mean few samples."""

    def __init__(self, features=4, fixed_mib=0):
        super().__init__()
        self.linear = nn.Linear(features, 1)
        self.fixed = nn.Parameter(torch.zeros(fixed_mib * MIB // 4)) if fixed_mib else None

    def forward(self, x):
        wide = self.linear(x) * torch.ones(1, MIB // 4)
        return wide.exp().exp().exp().mean(1, keepdim=True)


def wide_batch(n):
    return torch.zeros(n, 4), torch.zeros(n, 1)


def fit_wide(target=64, **changes):
    arguments = {"data": wide_batch, "loss": nn.functional.mse_loss, "device": "cpu", "memory_limit": "600MiB"}
    return autobatch.fit(Wide(), target, **arguments | changes)


def state_of(*things):
    """Everything in modules and optimizers that training would change, as bytes."""
    state = []
    for thing in things:
        if isinstance(thing, nn.Module):
            tensors = [*thing.named_parameters(), *thing.named_buffers()]
            state += [(name, t.detach().numpy().tobytes(), t.requires_grad, id(t)) for name, t in tensors]
            state += [
                (n, p.grad is None or (p.grad.numpy().tobytes(), id(p.grad))) for n, p in thing.named_parameters()
            ]
            state += [(n, m.training, dict(m._forward_hooks), set(vars(m))) for n, m in thing.named_modules()]
        else:
            saved = thing.state_dict()
            state.append(repr(saved["param_groups"]))
            for index, entry in saved["state"].items():
                state += [(index, k, v.numpy().tobytes() if torch.is_tensor(v) else v) for k, v in entry.items()]
    return state


def random_state():
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


@pytest.mark.usefixtures("new_interpreters")
def test_the_plan_hits_the_target_with_sizes_that_ran():
    plan = fit_wide(target=200)
    fitting = {size for trial in plan.trials if trial.fits for size in trial.micro_batch_sizes}
    assert sum(plan.micro_batch_sizes) == 200
    assert set(plan.micro_batch_sizes) <= fitting
    assert plan.max_micro_batch_size in fitting
    assert plan.verified
    assert plan.accumulation_steps == math.ceil(200 / plan.max_micro_batch_size) > 1
    assert 0.5 * plan.budget_bytes < plan.peak_bytes <= plan.budget_bytes == int(600 * MIB * 0.95)
    assert plan.device.type == "cpu"
    assert plan.versions["torch"] == torch.__version__


def test_where_the_whole_target_fits_it_is_run_as_one_micro_batch():
    plan = fit_wide(target=8)
    assert plan.micro_batch_sizes == (8,)
    assert plan.trials[-1].micro_batch_sizes == (8,)
    assert plan.max_is_exact


@pytest.mark.usefixtures("new_interpreters")
def test_gradients_held_between_micro_batches_are_in_the_answer():
    """With 64 MiB of parameters, accumulating takes 64 MiB more than one pass does."""
    model = Wide(fixed_mib=64)

    def fit(target):
        step = lambda m, b: m(b[0]).mean() + m.fixed[0]  # noqa: E731
        sgd = lambda p: torch.optim.SGD(p, 0.1)  # noqa: E731
        return autobatch.fit(
            model, target, data=wide_batch, training_step=step, optimizer=sgd, device="cpu", memory_limit="750MiB"
        )

    whole = fit(20)
    accumulated = fit(1000)
    assert whole.accumulation_steps == 1
    assert accumulated.accumulation_steps > 1
    per_sample = 3 * MIB
    first = next(t for t in whole.trials if t.micro_batch_sizes == (20,))
    at_the_top = max((t for t in accumulated.trials if t.fits), key=lambda t: t.micro_batch_size)
    growth = at_the_top.turn_bytes - first.turn_bytes - per_sample * (at_the_top.micro_batch_size - 20)
    assert growth > 32 * MIB


@pytest.mark.usefixtures("new_interpreters")
def test_exact_proves_that_more_does_not_fit():
    plan = fit_wide(target=1000, exact=True)
    assert plan.max_is_exact
    beyond = [t for t in plan.trials if t.micro_batch_size == plan.max_micro_batch_size + 1]
    assert any(not trial.fits for trial in beyond)


def test_max_micro_batch_is_never_passed():
    plan = fit_wide(target=64, max_micro_batch=5)
    assert plan.max_micro_batch_size == 5
    assert max(trial.micro_batch_size for trial in plan.trials) == 5
    assert plan.micro_batch_sizes == (5,) * 12 + (4,)
    assert plan.verified


def test_ranks_share_the_target_exactly():
    plan = fit_wide(target=50, world_size=4, memory_limit="2GiB")
    assert [sum(plan.for_rank(rank).micro_batch_sizes) for rank in range(4)] == [13, 13, 12, 12]
    assert max(trial.micro_batch_size for trial in plan.trials) <= 13


def test_progress_tells_of_every_trial_in_order():
    events = []
    plan = fit_wide(target=16, progress=events.append)
    assert isinstance(events[0], SearchStarted)
    assert events[0].cap == 16
    assert [type(e) for e in events[1:]] == [TrialStarted, TrialEnded] * len(plan.trials)
    assert tuple(e.trial for e in events if isinstance(e, TrialEnded)) == plan.trials


def busy_model():
    """Everything that a careless search would change: statistics, tied and frozen weights, hooks, parametrizations."""
    model = nn.Sequential(
        nn.Linear(6, 6),
        nn.BatchNorm1d(6),
        nn.Dropout(0.5),
        parametrizations.spectral_norm(nn.Linear(6, 6)),
        nn.Linear(6, 6),
    )
    model[4].weight = model[0].weight
    model[4].bias.requires_grad_(False)
    model[1].eval()
    model.register_buffer("count", torch.zeros(()))

    def count(module, inputs, output):
        module.count.add_(1)

    model.register_forward_hook(count)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], amsgrad=True)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("ending", ["success", "out of memory", "exception", "ctrl-c"])
def test_nothing_of_the_callers_changes(ending):
    model, optimizer = busy_model()
    events = []

    def training_step(model, batch):
        if ending == "exception":
            raise LookupError("the model's own")
        extra = torch.ones(len(batch), MIB if ending == "out of memory" else 1)
        return (model(batch).mean() * extra).exp().mean()

    def progress(event):
        events.append(event)
        if ending == "ctrl-c" and isinstance(event, TrialEnded):
            signal.raise_signal(signal.SIGINT)

    def data(n):
        random.random(), np.random.rand()
        return torch.randn(n, 6)

    before = copy.deepcopy(state_of(model, optimizer)), random_state()
    expected = {"exception": LookupError, "ctrl-c": KeyboardInterrupt}.get(ending)
    arguments = {"data": data, "training_step": training_step, "optimizer": optimizer, "device": "cpu"}
    limit = "450MiB" if ending == "out of memory" else None
    if expected:
        with pytest.raises(expected):
            autobatch.fit(model, 300, memory_limit=limit, progress=progress, **arguments)
    else:
        autobatch.fit(model, 300, memory_limit=limit, headroom=0, exact=True, progress=progress, **arguments)
    assert (state_of(model, optimizer), random_state()) == before
    if ending == "out of memory":
        verdicts = {event.trial.verdict for event in events if isinstance(event, TrialEnded)}
        assert verdicts & {Verdict.OUT_OF_MEMORY, Verdict.OVER_BUDGET}


def test_nothing_fits_says_how_much_one_sample_needs():
    with pytest.raises(autobatch.NothingFits) as caught:
        autobatch.fit(
            Wide(fixed_mib=100),
            8,
            data=wide_batch,
            training_step=lambda model, batch: model(batch[0]).mean() + model.fixed.sum(),
            device="cpu",
            memory_limit="450MiB",
        )
    error = caught.value
    assert error.budget_bytes == int(450 * MIB * 0.95)
    assert error.needed_bytes > 600 * MIB  # parameters, gradients, and two Adam moments of 100 MiB each
    assert "micro-batches of 1 sample takes" in str(error)
    assert "a limit of at least" in str(error)


def test_batchnorm_layers_are_named_when_micro_batches_are_smaller_than_the_batch():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Wide())
    plan = autobatch.fit(model, 100, data=wide_batch, loss=nn.functional.mse_loss, device="cpu", memory_limit="600MiB")
    assert any("BatchNorm (1)" in warning for warning in plan.warnings)
    whole = autobatch.fit(model, 4, data=wide_batch, loss=nn.functional.mse_loss, device="cpu")
    assert not any("BatchNorm" in warning for warning in whole.warnings)


def test_a_batchnorm_that_refuses_one_sample_gets_two():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    plan = autobatch.fit(model, 9, device="cpu", max_micro_batch=2 + 1)
    assert min(plan.micro_batch_sizes) >= 2
    with pytest.raises(autobatch.InvalidInput, match="needs 2"):
        autobatch.fit(model, 1, device="cpu")


def test_a_target_that_the_data_cannot_fill_is_a_warning():
    data = torch.utils.data.TensorDataset(torch.zeros(10, 4), torch.zeros(10, 1))
    plan = autobatch.fit(nn.Linear(4, 1), 64, data=data, loss=nn.functional.mse_loss, device="cpu")
    assert any("10 samples, fewer than the target of 64" in warning for warning in plan.warnings)


def test_a_loss_that_is_not_a_number_is_a_warning_not_a_failure():
    plan = autobatch.fit(
        nn.Linear(4, 1),
        8,
        data=lambda n: torch.full((n, 4), math.nan),
        training_step=lambda m, b: m(b).mean(),
        device="cpu",
    )
    assert plan.accumulation_steps == 1
    assert any("NaN" in warning for warning in plan.warnings)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions(precision):
    plan = autobatch.fit(nn.Linear(4, 1), 8, precision=precision, device="cpu")
    assert plan.precision == precision


def test_a_workload_is_taken_whole():
    workload = Workload(Wide(), data=wide_batch, loss=nn.functional.mse_loss)
    assert autobatch.fit(workload, 8, device="cpu", precision="bf16").precision == "bf16"
    with pytest.raises(autobatch.InvalidInput, match=r"says its own loss.*Workload\("):
        autobatch.fit(workload, 8, loss=nn.functional.l1_loss)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"target": 0}, "target must be a whole number of at least 1, but is 0"),
        ({"target": -256}, "target must be .* but is -256"),
        ({"target": 2.5}, "target must be"),
        ({"target": True}, "target must be"),
        ({"target": 3, "world_size": 4}, "3 samples is smaller than the 4 ranks"),
        ({"target": 8, "world_size": 0}, "world_size must be"),
        ({"target": 8, "max_micro_batch": 0}, "max_micro_batch must be"),
        ({"target": 8, "headroom": 1}, "headroom is the share"),
        ({"target": 8, "headroom": -0.1}, "headroom is the share"),
        ({"target": 8, "headroom": math.nan}, "headroom is the share"),
        ({"target": 8, "memory_limit": "lots"}, "'lots' is not an amount"),
        ({"target": 8, "memory_limit": 0}, "at least 1 byte"),
        ({"target": 8, "device": "toaster"}, "no GPU in the catalogue"),
        ({"target": 8, "device": "mps"}, "not 'mps'"),
        ({"target": 8, "precision": "fp8"}, "fp8"),
    ],
)
def test_bad_input_is_a_clear_error(arguments, complaint):
    with pytest.raises(autobatch.InvalidInput, match=complaint):
        autobatch.fit(nn.Linear(4, 1), **arguments)


def test_a_model_without_parameters_is_a_clear_error():
    with pytest.raises(autobatch.InvalidInput, match="no trainable parameters"):
        autobatch.fit(nn.ReLU(), 8, device="cpu")
    frozen = nn.Linear(4, 1).requires_grad_(False)
    with pytest.raises(autobatch.InvalidInput, match="no trainable parameters"):
        autobatch.fit(frozen, 8, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_that_is_not_there_is_a_clear_error():
    with pytest.raises(autobatch.DeviceUnavailable, match='device="cuda" is not available'):
        autobatch.fit(nn.Linear(4, 1), 8, device="cuda")


@pytest.mark.parametrize(("target", "world_size", "largest"), [(399, 2, 199), (50, 4, None), (7, 3, 2)])
def test_every_rank_of_a_plan_names_only_sizes_that_ran(target, world_size, largest):
    plan = autobatch.fit(nn.Linear(4, 1), target, world_size=world_size, max_micro_batch=largest, device="cpu")
    assert all(plan.for_rank(rank).verified for rank in range(world_size))


def test_a_failed_trial_is_told_to_progress_before_the_error_comes_out():
    events = []

    def training_step(model, batch):
        raise LookupError("a bug")

    with pytest.raises(LookupError, match="a bug"):
        autobatch.fit(
            nn.Linear(4, 1), 8, data=wide_batch, training_step=training_step, device="cpu", progress=events.append
        )
    assert events[-1].trial.verdict is Verdict.FAILED
    assert "LookupError: a bug" in events[-1].trial.detail


def test_a_model_that_calls_exit_does_not_end_the_caller():
    def training_step(model, batch):
        raise SystemExit(4)

    with pytest.raises(autobatch.TrialCrashed, match=r"ended the process with SystemExit\(4\)"):
        autobatch.fit(nn.Linear(4, 1), 8, data=wide_batch, training_step=training_step, device="cpu")
