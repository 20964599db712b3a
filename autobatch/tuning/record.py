"""The record of a tuning, in an Optuna study: what was tried, what is being tried, and what to try next.

Processes that share a storage share the record. A configuration is claimed by adding a running trial that has it; that
is one write, and storages number trials in the order in which they are added. Of several claims of one configuration
the first counts, so that everybody can tell whose it is.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import DBAPIError

from autobatch.errors import InvalidInput
from autobatch.plan import TrainingPlan
from autobatch.tuned import Tried
from autobatch.tuning.configuration import Configuration
from autobatch.tuning.owner import is_gone, ourselves, signs_of_life
from autobatch.tuning.space import Space

TRIED, PLAN, OWNER, TOKEN, ALIVE, VOID = "tried", "plan", "owner", "token", "alive", "void"
"""User attributes of trials. A void one was given up, or came second: its configuration may be tried by another."""
ENDED = (UpdateFinishedTrialError, ValueError)
"""What Optuna raises where a trial has ended already."""
MISSES = 12
"""Proposals of the sampler that were tried already, after which any other configuration is taken."""
WAIT_FOR_LOCK = 60
"""Seconds that SQLite waits for other processes."""


@dataclass(frozen=True)
class Claim:
    """A configuration that this process is to try."""

    configuration: Configuration
    trial_id: int
    number: int


class Record:
    """One study.

    Args:
        space: what can be tried.
        storage: any storage of Optuna's, its URL, or None to keep the record in memory.
        name: the study's name.
        question: what is asked, as JSON: a study answers no other.
        seed: of the sampler; None for another one each time.

    Raises:
        InvalidInput: the study of that name is about something else.
    """

    def __init__(
        self,
        space: Space,
        storage: str | BaseStorage | None,
        name: str,
        question: dict[str, Any],
        seed: int | None = None,
    ) -> None:
        self.space = space
        self._distributions = {name: CategoricalDistribution(values) for name, values in space.values.items()}
        self._random = random.Random(seed)
        self._seed = seed
        with _quiet():
            self._storage = _opened(storage)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                direction="maximize",
                sampler=optuna.samplers.RandomSampler(),  # never asked: see `_propose`
                load_if_exists=True,
            )
        # Whoever comes first says what the study is about; at the same time, all say the same or find out.
        asked = self._study.user_attrs.get("question")
        if asked is None:
            self._study.set_user_attr("question", question)
            asked = self._study.user_attrs["question"]
        if asked != question:
            other = ", ".join(key for key in question if asked.get(key) != question[key])
            raise InvalidInput(
                f"the study {name!r} is about something else: it differs in {other}. Choose another study_name."
            )

    def tried(self) -> list[Tried]:
        """What has been tried to an end, in the order in which it was claimed."""
        return [Tried.model_validate_json(t.user_attrs[TRIED]) for t in self._valid() if t.state.is_finished()]

    def plan_for(self, tried: Tried) -> TrainingPlan:
        """The plan that was kept with it."""
        kept = next(t for t in self._valid() if t.user_attrs.get(TRIED) == tried.model_dump_json())
        return TrainingPlan.model_validate_json(kept.user_attrs[PLAN])

    def others_at_work(self) -> bool:
        """Whether other processes are trying something."""
        return any(not trial.state.is_finished() for trial in self._valid())

    @contextmanager
    def claimed(self) -> Iterator[Claim | None]:
        """A configuration for this process alone, or None where there is none left. It is free again if the block
        leaves without `tell`."""
        claim = self._claim()
        if claim is None:
            yield None
            return
        try:
            with signs_of_life(lambda: self._note(claim.trial_id, ALIVE, time.time())):
                yield claim
        finally:
            self._void(claim.number, claim.trial_id)

    def tell(self, claim: Claim, tried: Tried, plan: TrainingPlan | None) -> None:
        """Write down how it went. Infeasible configurations violate a constraint, and failed ones have no value."""
        with suppress(*ENDED):  # this process was taken for dead, and another one has tried it meanwhile
            if plan is not None:
                self._note(claim.trial_id, PLAN, plan.model_dump_json())
            if tried.result != "failed":
                trial = Trial(self._study, claim.trial_id)
                trial.set_constraint("memory", tried.excess if tried.result == "infeasible" else -1.0)
            self._note(claim.trial_id, TRIED, tried.model_dump_json())
            self._finish(claim.number, tried)

    def _finish(self, number: int, tried: Tried) -> None:
        if tried.result == "failed":
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, tried.samples_per_second or 0.0)

    def _claim(self) -> Claim | None:
        while True:
            self._bury_the_dead()
            configuration = self._propose()
            if configuration is None:
                return None
            token = uuid.uuid4().hex
            mine = {OWNER: ourselves(), TOKEN: token, ALIVE: time.time()}
            params = self.space.row(configuration)
            self._study.add_trial(
                create_trial(
                    state=TrialState.RUNNING, params=params, distributions=self._distributions, user_attrs=mine
                )
            )
            same = [trial for trial in self._valid() if self._configuration_of(trial) == configuration]
            own = next(trial for trial in same if trial.user_attrs[TOKEN] == token)
            if own.number == min(trial.number for trial in same):
                return Claim(configuration, own._trial_id, own.number)
            self._void(own.number, own._trial_id)

    def _propose(self) -> Configuration | None:
        taken = self._valid()
        seen = {self._configuration_of(trial) for trial in taken}
        broken = [found for found in map(self._configuration_of, taken_that_failed(taken)) if len(found) == 1]
        left = [
            configuration
            for configuration in self.space.configurations()
            if configuration not in seen
            and not any(item in configuration.items() for one in broken for item in one.items())
        ]
        if not left:
            return None
        if len(left[0]) < 2:  # first the plain one, then what each knob does alone
            return left[0]
        with _quiet():
            local = optuna.create_study(direction="maximize", sampler=self._sampler(len(taken)))
            local.add_trials(taken)
            for _ in range(MISSES):
                proposed = Configuration(local.ask(self._distributions).params)
                if proposed in left:
                    return proposed
        return self._random.choice(left)

    def _sampler(self, trials: int) -> optuna.samplers.BaseSampler:
        # Independent of the order of knobs, and it knows constraints and what others are trying.
        seed = None if self._seed is None else self._seed + trials
        return optuna.samplers.TPESampler(multivariate=True, n_startup_trials=1, constant_liar=True, seed=seed)

    def _bury_the_dead(self) -> None:
        for trial in self._valid():
            if trial.state is TrialState.RUNNING and is_gone(trial.user_attrs[OWNER], trial.user_attrs[ALIVE]):
                if TRIED in trial.user_attrs:  # it died with the last word on its lips
                    with suppress(*ENDED):
                        self._finish(trial.number, Tried.model_validate_json(trial.user_attrs[TRIED]))
                else:
                    self._void(trial.number, trial._trial_id)

    def _void(self, number: int, trial_id: int) -> None:
        """Give a claim up, unless it has come to an end."""
        with suppress(*ENDED):
            self._note(trial_id, VOID, True)
            self._study.tell(number, state=TrialState.FAIL)

    def _note(self, trial_id: int, key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(trial_id, key, value)

    def _valid(self) -> list[FrozenTrial]:
        return [
            t for t in self._study.get_trials(deepcopy=False) if OWNER in t.user_attrs and not t.user_attrs.get(VOID)
        ]

    def _configuration_of(self, trial: FrozenTrial) -> Configuration:
        return Configuration(trial.params)


def taken_that_failed(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Those whose knobs broke the model."""
    return [trial for trial in trials if trial.state is TrialState.FAIL]


def _opened(storage: str | BaseStorage | None) -> BaseStorage:
    """The storage, with its tables.

    Of processes that make a database's tables at the same time, one succeeds; the others find them there when they try
    again.
    """
    for pause in (0.2, 1.0, 5.0):
        try:
            return _open(storage)
        except DBAPIError:
            time.sleep(pause * (0.5 + random.random()))
    return _open(storage)


def _open(storage: str | BaseStorage | None) -> BaseStorage:
    if isinstance(storage, str) and storage.startswith("sqlite"):
        storage = RDBStorage(storage, engine_kwargs={"connect_args": {"timeout": WAIT_FOR_LOCK}})
    return optuna.storages.get_storage(storage)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells of each study and trial; what there is to tell is told by `progress`."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
