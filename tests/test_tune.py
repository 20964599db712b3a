"""`tune` from end to end on this machine: tiny real models, real limits, real processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from threading import Thread

import optuna
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autobatch
from autobatch import InvalidInput, NothingFits, TrainingPlan
from autobatch.progress import ConfigurationEnded, ConfigurationStarted
from autobatch.tuning import knobs as registry

MIB = 1 << 20


class Wide(nn.Module):
    """Keeps `kept` times 128 KiB of activations for each sample, and a little more."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = (x[:, :1] * self.scale) * torch.ones(1, 1 << 15)
        for _ in range(self.kept):
            wide = wide.sin()
        return x + 0.01 * wide.mean(1, keepdim=True)


class Stack(nn.Module):
    def __init__(self, depth: int = 4, kept: int = 4) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Wide(kept) for _ in range(depth)))
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(n, 4), torch.zeros(n, 1)


def tune(target: int = 6, model: nn.Module | None = None, **changes) -> TrainingPlan:
    arguments = {"data": batch, "loss": F.mse_loss, "device": "cpu", "memory_limit": "700MiB"}
    return autobatch.tune(model or Stack(), target, **arguments | {"knobs": ["checkpointing"]} | changes)


def test_the_fastest_configuration_becomes_a_plan_that_hits_the_target() -> None:
    events = []
    plan = tune(knobs=["checkpointing", "optimizer"], trials=3, progress=events.append)
    assert sum(plan.micro_batch_sizes) == 6
    assert plan.verified and plan.peak_bytes <= plan.budget_bytes
    assert [one.knobs for one in plan.tried] == [{}, {"checkpointing": "on"}, {"optimizer": "for-loop"}]
    assert all(one.result == "fits" and one.samples_per_second > 0 for one in plan.tried)
    fastest = max(plan.tried, key=lambda one: one.samples_per_second)
    assert plan.knobs in (fastest.knobs, {})  # the plain one, where it was as fast in the end
    if plan.knobs:
        assert plan.throughput.samples_per_second >= plan.throughput.plain_samples_per_second
    timed = [trial for trial in plan.trials if trial.repeated_seconds]
    assert all(sum(trial.micro_batch_sizes) == 6 for trial in timed)
    assert plan.micro_batch_sizes in {trial.micro_batch_sizes for trial in timed}
    assert [e.tried for e in events if isinstance(e, ConfigurationEnded)] == list(plan.tried)
    assert "samples per second" in str(plan)


def test_smaller_micro_batches_are_timed_too() -> None:
    plan = tune(knobs=["checkpointing"], trials=1, target=8)
    assert {len(trial.micro_batch_sizes) for trial in plan.trials if trial.repeated_seconds} >= {1, 2}


def test_where_the_plain_model_does_not_fit_checkpointing_does_with_the_same_gradients() -> None:
    model = Stack(depth=8, kept=150)  # 8 times 19 MiB for one sample, beside the interpreter and torch
    deep = {"data": batch, "loss": F.mse_loss, "device": "cpu"}
    limit = autobatch.fit(Stack(depth=1, kept=150), 2, **deep).peak_bytes + 60 * MIB
    with pytest.raises(NothingFits):
        autobatch.fit(model, 2, **deep, memory_limit=limit)
    plan = autobatch.tune(model, 2, **deep, memory_limit=limit, knobs=["checkpointing"])
    assert plan.knobs == {"checkpointing": "on"}
    assert [one.result for one in plan.tried] == ["infeasible", "fits"]
    assert plan.tried[0].excess > 0
    x, y = batch(2)

    def gradients() -> list[torch.Tensor]:
        F.mse_loss(model(x), y).backward()
        found = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        return found

    plain = gradients()
    plan.apply(model)
    torch.testing.assert_close(gradients(), plain)


def test_nothing_fits_in_any_configuration() -> None:
    told = "a training step with micro-batches of 1 sample takes .* did not help: checkpointing=on"
    with pytest.raises(NothingFits, match=told) as caught:
        tune(memory_limit="100MiB")
    assert caught.value.needed_bytes > caught.value.budget_bytes


def test_a_knob_that_breaks_the_model_is_lost_with_its_reason() -> None:
    class Picky(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if "forward" in vars(self.blocks[0]):
                raise NotImplementedError("not with this")
            return super().forward(x)

    plan = tune(model=Picky(), knobs=["checkpointing", "precision"])
    failed = [one for one in plan.tried if one.result == "failed"]
    assert [one.knobs for one in failed] == [{"checkpointing": "on"}]  # and not once more with another knob
    assert "NotImplementedError: not with this" in failed[0].detail
    assert {"precision": "bf16"} in [one.knobs for one in plan.tried]
    assert not plan.knobs


def test_a_bug_of_the_model_is_raised_as_it_is() -> None:
    class Buggy(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("of the user's")

    with pytest.raises(ZeroDivisionError, match="of the user's"):
        tune(model=Buggy())


def test_precision_is_changed_only_where_it_is_named() -> None:
    plan = tune(knobs="auto", trials=1)
    assert plan.precision == "fp32"
    assert any("channels_last=on was left out: the model has no convolutions" in text for text in plan.assumptions)
    assert not any("precision" in text for text in plan.assumptions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"knobs": "checkpointing"}, 'knobs must be "auto" or a list of names'),
        ({"knobs": ["speed"]}, "no knob 'speed'"),
        ({"timeout": 0}, "timeout is in seconds and must be positive"),
        ({"trials": 0}, "trials must be a whole number of at least 1"),
        ({"device": "rtx-3090", "memory_limit": None}, "how fast a step is cannot be predicted"),
    ],
)
def test_what_cannot_be_tuned_is_said_before_anything_runs(changes, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        tune(**changes)


def test_after_the_timeout_no_configuration_begins() -> None:
    assert len(tune(timeout=0.001).tried) == 1


def test_a_study_goes_on_where_it_ended_and_answers_no_other_question(tmp_path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    first = tune(storage=storage, trials=1, study_name="mine")
    started = []
    second = tune(storage=storage, study_name="mine", progress=started.append)
    ran = [event.knobs for event in started if isinstance(event, ConfigurationStarted)]
    assert ran == [{"checkpointing": "on"}]
    assert second.tried[0] == first.tried[0]
    with pytest.raises(InvalidInput, match="the study 'mine' is about something else: it differs in target"):
        tune(storage=storage, study_name="mine", target=7)


def test_infeasible_configurations_violate_a_constraint_in_the_study(tmp_path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    with pytest.raises(NothingFits):
        tune(storage=storage, study_name="mine", memory_limit="100MiB", trials=1)
    (trial,) = optuna.load_study(study_name="mine", storage=storage).trials
    assert trial.constraints["memory"] > 0
    assert trial.value == 0.0
    assert trial.params == {"checkpointing": registry.PLAIN}


PROGRAM = """
import sys, time
sys.path[:0] = {path!r}
import test_tune, warm
from autobatch import child
from autobatch.progress import ConfigurationEnded, ConfigurationStarted
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

def tell(event):
    if isinstance(event, (ConfigurationStarted, ConfigurationEnded)):
        knobs = event.knobs if isinstance(event, ConfigurationStarted) else event.tried.knobs
        print(type(event).__name__, dict(knobs), flush=True)

child._start = warm.start_child
storage = {storage}
plan = test_tune.tune(knobs=["optimizer"], storage=storage, study_name="shared", progress=tell)
print("tried", len(plan.tried), flush=True)
"""


def test_a_process_with_nothing_left_to_do_waits_for_what_another_finds() -> None:
    storage = optuna.storages.InMemoryStorage()
    plans: list[TrainingPlan] = []

    def other_comes(event) -> None:
        if isinstance(event, ConfigurationStarted):
            threads.append(Thread(target=lambda: plans.append(tune(storage=storage, knobs=[], study_name="one"))))
            threads[0].start()
            time.sleep(2)

    threads: list[Thread] = []
    plans.append(tune(storage=storage, knobs=[], study_name="one", progress=other_comes))
    threads[0].join()
    assert plans[0].tried == plans[1].tried and len(plans[0].tried) == 1


def start(storage: str) -> subprocess.Popen:
    program = textwrap.dedent(PROGRAM).format(path=[p for p in sys.path if p], storage=storage)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def configurations(output: str, event: str) -> list[str]:
    return [line.removeprefix(event) for line in output.splitlines() if line.startswith(event)]


def test_after_a_kill_no_finished_configuration_is_repeated(tmp_path) -> None:
    storage = repr(f"sqlite:///{tmp_path}/study.db")
    process = start(storage)
    before = ""
    while len(configurations(before, "ConfigurationStarted")) < 3:
        before += process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished, begun = (configurations(before, f"Configuration{what}") for what in ("Ended", "Started"))
    assert len(finished) == 2 and len(begun) == 3
    after, _ = start(storage).communicate()
    started = configurations(after, "ConfigurationStarted")
    assert not set(finished) & set(started)
    assert begun[2] in started  # what was cut off is begun anew
    assert len(started) == len(set(started))


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("journal", marks=pytest.mark.slow)])
def test_processes_share_a_study_without_doing_anything_twice(tmp_path, kind: str) -> None:
    storage = {
        "sqlite": repr(f"sqlite:///{tmp_path}/study.db"),
        "journal": f'JournalStorage(JournalFileBackend("{tmp_path}/study.log"))',
    }[kind]
    processes = [start(storage) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    started = [one for output in outputs for one in configurations(output, "ConfigurationStarted")]
    ended = [one for output in outputs for one in configurations(output, "ConfigurationEnded")]
    assert len(started) == len(set(started))
    assert sorted(started) == sorted(ended)
    assert max(int(output.split()[-1]) for output in outputs) == len(started)
