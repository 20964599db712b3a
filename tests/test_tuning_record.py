"""The record of a tuning: claims of several processes, their deaths, and what is proposed."""

import time

import optuna
import pytest

from autobatch.tuned import Tried
from autobatch.tuning import owner
from autobatch.tuning import record as records
from autobatch.tuning.knobs import PLAIN
from autobatch.tuning.record import Record
from autobatch.tuning.space import Space

SPACE = Space({"checkpointing": (PLAIN, "on"), "optimizer": (PLAIN, "foreach", "fused")}, ())


@pytest.fixture
def storage() -> optuna.storages.BaseStorage:
    return optuna.storages.InMemoryStorage()


def record_in(storage: optuna.storages.BaseStorage, space: Space = SPACE) -> Record:
    return Record(space, storage, "study", {"target": 8}, seed=0)


def fitted(claim, speed: float = 10.0) -> Tried:
    return Tried(knobs=dict(claim.configuration), result="fits", samples_per_second=speed)


def test_everything_is_proposed_once_the_plain_one_first_and_then_what_each_knob_does(storage) -> None:
    record, order = record_in(storage), []
    while True:
        with record.claimed() as claim:
            if claim is None:
                break
            order.append(str(claim.configuration))
            record.tell(claim, fitted(claim), None)
    assert order[:4] == ["plain", "checkpointing=on", "optimizer=foreach", "optimizer=fused"]
    assert sorted(order[4:]) == ["checkpointing=on, optimizer=foreach", "checkpointing=on, optimizer=fused"]
    assert len(record.tried()) == 6


def test_two_processes_never_have_the_same_claim(storage) -> None:
    one, other = record_in(storage), record_in(storage)
    with one.claimed() as first, other.claimed() as second:
        assert first.configuration != second.configuration
    with other.claimed() as again:  # neither was told, so both are free
        assert not again.configuration


def test_of_claims_made_at_once_the_first_counts(storage, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = record_in(storage), record_in(storage)
    propose, claims = one._propose, []

    def slowly():
        proposed = propose()
        if not claims:  # another process comes in between
            claims.append(other._claim())
        return proposed

    monkeypatch.setattr(one, "_propose", slowly)
    claims.append(one._claim())
    assert str(claims[0].configuration) == "plain"
    assert str(claims[1].configuration) == "checkpointing=on"


def test_the_claim_of_a_process_that_is_gone_is_free_again(storage, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = dict(owner.ourselves(), started="never")
    monkeypatch.setattr(records, "ourselves", lambda: dead)
    assert not record_in(storage)._claim().configuration
    monkeypatch.undo()
    assert not record_in(storage)._claim().configuration


def test_a_result_that_was_written_before_its_process_died_is_kept(storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "ourselves", lambda: dict(owner.ourselves(), started="never"))
    dying = record_in(storage)
    claim = dying._claim()
    monkeypatch.setattr(dying, "_finish", lambda *_: None)
    dying.tell(claim, fitted(claim, 42.0), None)
    monkeypatch.undo()
    record = record_in(storage)
    assert str(record._claim().configuration) == "checkpointing=on"
    assert [one.samples_per_second for one in record.tried()] == [42.0]


def test_owners_elsewhere_are_gone_after_a_long_silence() -> None:
    elsewhere = {"machine": "another", "pid": 1, "started": "1"}
    assert not owner.is_gone(elsewhere, time.time() - owner.LEASE / 2)
    assert owner.is_gone(elsewhere, time.time() - owner.LEASE * 2)
    assert not owner.is_gone(owner.ourselves(), 0.0)  # known to be alive


def test_a_value_that_breaks_the_model_alone_is_not_tried_with_others(storage) -> None:
    record, seen = record_in(storage), []
    while True:
        with record.claimed() as claim:
            if claim is None:
                break
            seen.append(str(claim.configuration))
            broken = claim.configuration.get("optimizer") == "fused"
            failed = Tried(knobs=dict(claim.configuration), result="failed", detail="breaks")
            record.tell(claim, failed if broken else fitted(claim), None)
    assert "optimizer=fused" in seen and "checkpointing=on, optimizer=fused" not in seen
    assert "checkpointing=on, optimizer=foreach" in seen


def test_what_does_not_fit_is_told_as_a_violated_constraint(storage) -> None:
    record = record_in(storage)
    with record.claimed() as claim:
        record.tell(claim, Tried(knobs={}, result="infeasible", excess=0.3), None)
    (trial,) = optuna.load_study(study_name="study", storage=storage).trials
    assert trial.constraints == {"memory": 0.3}
    assert trial.state is optuna.trial.TrialState.COMPLETE
