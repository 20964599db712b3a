"""`tune`: the fastest way to a target within the budget, over knobs that trade time for memory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from autobatch import cache, ranks
from autobatch.errors import InvalidInput, NothingFits
from autobatch.plan import TrainingPlan
from autobatch.precision import Precision
from autobatch.probing import Question
from autobatch.progress import ConfigurationEnded, ConfigurationStarted, OnProgress
from autobatch.session import Session, opened
from autobatch.trial import Trial
from autobatch.tuned import Throughput, Tried
from autobatch.tuning.configuration import Configuration
from autobatch.tuning.knobs import Situation
from autobatch.tuning.measuring import FASTER, Result, measure, paired_ratio, time_again
from autobatch.tuning.space import Space, space_of
from autobatch.workload import Workload, as_workload

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from autobatch.tuning.record import Claim, Record

PATIENCE = 4
"""The search ends after this many configurations, or as many as there are knobs, without a faster one."""
WAIT = 0.5
"""Seconds between looks at what other processes do, where they have all that is left."""


def tune(
    model: nn.Module | Workload,
    target: int,
    *,
    knobs: str | Iterable[str] = "auto",
    timeout: float | None = None,
    trials: int | None = None,
    storage: str | BaseStorage | None = None,
    study_name: str | None = None,
    data: Any = None,
    loss: Callable[..., Any] | None = None,
    training_step: Callable[..., Any] | None = None,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    precision: Precision = "fp32",
    device: object = None,
    memory_limit: int | str | None = None,
    headroom: float = 0.05,
    world_size: int | None = None,
    max_micro_batch: int | None = None,
    exact: bool = False,
    progress: OnProgress | None = None,
) -> TrainingPlan:
    """Find the configuration that trains on the most samples per second at the target, within the budget.

    Each configuration gets its largest micro-batch, as `fit` finds it, and whole optimizer steps are timed with that
    and with smaller ones. Nothing of the caller's changes; `plan.apply(model, optimizer)` sets the knobs for training.

    Args:
        knobs: "auto" for all that keep the mathematics, or the names of those to try: "checkpointing", "optimizer",
            "channels_last", "attention", "compile", "precision".
        timeout: seconds after which no configuration begins.
        trials: configurations to try at most, over all processes that share the study.
        storage: where the record is kept: a storage of Optuna's, or its URL, such as "sqlite:///tuning.db". The same
            call goes on where an earlier one ended, however it did, and processes that make it at the same time share
            the work. None: in memory.
        study_name: of the Optuna study. None: made from the question.
        (the rest): as for `autobatch.fit`. The first configuration is the one that they describe.

    Returns:
        The plan of the fastest configuration that fits, at least as fast as the plain one in a paired measurement at
        the end. `plan.tried` lists all.

    Raises:
        InvalidInput: an argument cannot be used, or the study of that name is about something else.
        NothingFits: no configuration fits with the smallest micro-batch.
        Exception: whatever the model's own code raises without any knob.
        (others): as for `autobatch.fit`.
    """
    if timeout is not None and not timeout > 0:
        raise InvalidInput(f"timeout is in seconds and must be positive, but is {timeout!r}.")
    if trials is not None and (isinstance(trials, bool) or not isinstance(trials, int) or trials < 1):
        raise InvalidInput(f"trials must be a whole number of at least 1, but is {trials!r}.")
    if ranks.world_size() > 1:
        raise InvalidInput(
            "tune runs in one process, not in a torch.distributed group. Call it before, with world_size=..., and have "
            "several processes share a storage to be faster."
        )
    deadline = None if timeout is None else time.monotonic() + timeout
    workload = as_workload(model, data, loss, training_step, optimizer, precision)
    question = Question.checked(target, headroom, world_size, max_micro_batch, exact, False)
    with opened(workload, question, device, memory_limit, progress) as session:
        if session.spot.info.type == "simulated":
            raise InvalidInput(
                "how fast a step is cannot be predicted, so tune needs the device itself, and "
                f"{session.spot.info.name} is not here. `fit` plans for it."
            )
        from autobatch.tuning.record import Record  # Optuna takes a second to import

        space = space_of(Situation(session.step, session.spot.info.type), knobs)
        asked = _in_json(session, space, memory_limit)
        record = Record(space, storage, study_name or f"autobatch-{cache.key_of('tune', repr(asked))[:16]}", asked)
        return _Tuning(session, space, record, deadline, trials).run()


@dataclass
class _Tuning:
    session: Session
    space: Space
    record: Record
    deadline: float | None
    most: int | None
    needed_bytes: int | None = None
    """What the plain configuration takes, where it does not fit."""

    def run(self) -> TrainingPlan:
        while not self._done():
            with self.record.claimed() as claim:
                if claim is not None:
                    self._try(claim)
                    continue
            if not self.record.others_at_work():
                break
            time.sleep(WAIT)  # for what they find, or for what they leave
        return self._answer()

    def _done(self) -> bool:
        tried = self.record.tried()
        out_of_time = self.deadline is not None and time.monotonic() > self.deadline
        enough = self.most is not None and len(tried) >= self.most
        return bool(tried) and (out_of_time or enough or self._stagnates(tried))

    def _stagnates(self, tried: list[Tried]) -> bool:
        """Whether the latest configurations were no faster than those before; what each knob does alone is seen
        first."""
        alone = {next(iter(one.knobs.items())) for one in tried if len(one.knobs) == 1}
        if len(alone) < sum(len(values) - 1 for values in self.space.values.values()):
            return False
        since, best = 0, 0.0
        for one in tried:
            better = (one.samples_per_second or 0.0) > best * FASTER
            since, best = (0, one.samples_per_second or 0.0) if better else (since + 1, best)
        return since >= max(PATIENCE, len(self.space.values))

    def _try(self, claim: Claim) -> None:
        self.session.progress(ConfigurationStarted(claim.configuration, claim.number))
        best = fastest_of(self.record.tried())
        result = measure(self.session, claim.configuration, (best and best.samples_per_second) or 0.0)
        if not claim.configuration:
            self._look_at_plain(result)
        self.record.tell(claim, result.tried, result.plan)
        self.session.progress(ConfigurationEnded(result.tried, fastest_of(self.record.tried())))

    def _look_at_plain(self, result: Result) -> None:
        """Without any knob, a failure is the user's own."""
        if result.tried.result == "failed" and result.error is not None:
            raise result.error
        if isinstance(result.error, NothingFits):
            self.needed_bytes = result.error.needed_bytes

    def _answer(self) -> TrainingPlan:
        tried = self.record.tried()
        best = fastest_of(tried)
        if best is None:
            raise self._nothing_fits(tried)
        plain = next((one for one in tried if not one.knobs), None)
        chosen, throughput = best, Throughput(samples_per_second=best.samples_per_second or 0.0)
        if plain is not None and plain.result == "fits" and plain is not best:
            chosen, throughput = self._faster(best, plain)
        plan = self.record.plan_for(chosen)
        return plan.model_copy(
            update={
                "throughput": throughput,
                "tried": tuple(tried),
                "assumptions": (*plan.assumptions, *self.space.left_out),
            }
        )

    def _faster(self, best: Tried, plain: Tried) -> tuple[Tried, Throughput]:
        """The faster of the two, measured in turns."""
        ours: list[Trial] = []
        theirs: list[Trial] = []
        for runs, one in ((theirs, plain), (ours, best), (ours, best), (theirs, plain)):
            runs.append(time_again(self.session, one))
        plain_speed = median(run.samples_per_second for run in theirs)
        if paired_ratio(ours, theirs) < 1:
            return plain, Throughput(samples_per_second=plain_speed)
        speed = median(run.samples_per_second for run in ours)
        return best, Throughput(samples_per_second=speed, plain_samples_per_second=plain_speed or None)

    def _nothing_fits(self, tried: list[Tried]) -> Exception:
        others = "; ".join(f"{Configuration(one.knobs)} ({one.detail})" for one in tried if one.knobs)
        plain = next((one.detail for one in tried if not one.knobs), "nothing fits")
        return NothingFits(
            f"{plain} Other configurations did not help: {others or 'there are none'}.",
            needed_bytes=self.needed_bytes,
            budget_bytes=self.session.budget_bytes,
        )


def fastest_of(tried: list[Tried]) -> Tried | None:
    """The fastest of those that fit."""
    return max(
        (one for one in tried if one.result == "fits"), key=lambda one: one.samples_per_second or 0, default=None
    )


def _in_json(session: Session, space: Space, memory_limit: int | str | None) -> dict[str, Any]:
    """What the study is about, so that it is not continued with another question."""
    step, question = session.step, session.question
    model = step.model
    shapes = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in model.state_dict().items()]
    optimizer = step.optimizer if not isinstance(step.optimizer, Optimizer) else type(step.optimizer)
    return {
        "model": type(model).__qualname__,
        "parameters": hashlib.sha256("\n".join(shapes).encode()).hexdigest(),
        "optimizer": getattr(optimizer, "__qualname__", type(optimizer).__qualname__),
        "target": question.target,
        "world_size": question.world_size,
        "device": session.spot.info.name,
        "memory_limit": None if memory_limit is None else str(memory_limit),
        "headroom": question.headroom,
        "max_micro_batch": question.max_micro_batch,
        "precision": step.precision,
        "knobs": {name: list(values) for name, values in space.values.items()},
    }
