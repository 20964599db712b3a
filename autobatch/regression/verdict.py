"""Whether a case still takes what it took."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from autobatch.regression.reason import Change, changes
from autobatch.regression.record import Record
from autobatch.regression.tolerance import DEFAULT, Tolerance
from autobatch.units import format_bytes


class Verdict(str, Enum):
    """How a case went."""

    SAME = "ok"
    BETTER = "better"
    WORSE = "worse"
    OVER_LIMIT = "over limit"
    NOT_COMPARED = "no baseline"
    UPDATED = "updated"
    """What it takes now is the baseline from now on."""
    FAILED = "failed"
    """It was not run to its end."""


@dataclass(frozen=True)
class Outcome:
    """One case, compared."""

    name: str
    verdict: Verdict
    now: Record | None = None
    then: Record | None = None
    tolerance: Tolerance | None = None
    limit: int | None = None
    why: tuple[Change, ...] = ()
    """What changed, where the peak is not the same."""
    warnings: tuple[str, ...] = ()
    """What makes the comparison less than fair."""
    problem: str = ""
    """Why it failed, in one line."""
    details: str = ""
    """The traceback, where the user's own code failed."""
    exit_code: int = 0

    @property
    def change(self) -> int | None:
        """Bytes of the peak more than before."""
        return self.now.peak_bytes - self.then.peak_bytes if self.now and self.then else None


def failed(name: str, problem: str, exit_code: int, details: str = "", then: Record | None = None) -> Outcome:
    """The outcome of a case that could not be run."""
    return Outcome(name, Verdict.FAILED, then=then, problem=problem, details=details, exit_code=exit_code)


def judged(
    name: str,
    now: Record,
    then: Record | None,
    tolerance: Tolerance = DEFAULT,
    limit: int | None = None,
) -> Outcome:
    """Compare what a case takes with what it took.

    Exit codes: 1 it got worse, or is over its limit; 2 there is nothing to compare it with, neither baseline nor limit.
    """
    verdict = Verdict.NOT_COMPARED
    if then is not None:
        allowed = tolerance.allowed(then.peak_bytes)
        difference = now.peak_bytes - then.peak_bytes
        verdict = Verdict.WORSE if difference > allowed else Verdict.BETTER if difference < -allowed else Verdict.SAME
        if now.growth_bytes > then.growth_bytes:  # however little: after enough steps it is more than any tolerance
            verdict = Verdict.WORSE
    if limit is not None and now.device_total_bytes > limit:
        verdict = Verdict.OVER_LIMIT
    return Outcome(
        name,
        verdict,
        now,
        then,
        tolerance,
        limit,
        why=tuple(changes(then, now)) if then else (),
        warnings=tuple(_differences(then, now)) if then else (),
        exit_code=_exit_code(verdict, limit),
    )


def updated(outcome: Outcome) -> Outcome:
    """The outcome where what a case takes now becomes the baseline: no worse than that, but a limit is a limit."""
    if outcome.verdict in (Verdict.FAILED, Verdict.OVER_LIMIT):
        return outcome
    verdict = Verdict.SAME if outcome.change == 0 else Verdict.UPDATED
    return replace(outcome, verdict=verdict, warnings=(), exit_code=0)


def _exit_code(verdict: Verdict, limit: int | None) -> int:
    if verdict in (Verdict.WORSE, Verdict.OVER_LIMIT):
        return 1
    return 2 if verdict is Verdict.NOT_COMPARED and limit is None else 0


def exit_code(codes: list[int]) -> int:
    """That of several cases: what got worse matters most, then what failed."""
    return next((code for code in (1, 3, 2) if code in codes), max(codes, default=0))


def _differences(then: Record, now: Record) -> list[str]:
    """What else is not as it was, so that a change may not be the code's."""
    before = {**then.versions, "evidence": then.evidence, **then.settings.model_dump()}
    after = {**now.versions, "evidence": now.evidence, **now.settings.model_dump()}
    told = [
        f"{name} {_said(before.get(name))} then, {_said(after[name])} now"
        for name in after
        if before.get(name) != after[name]
    ]
    return [f"{'; '.join(told)}: what is compared is not alike but for the code."] if told else []


def _said(value: object) -> str:
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def limit_in_words(outcome: Outcome) -> str:
    """By how much a case is over its limit."""
    assert outcome.now is not None
    assert outcome.limit is not None
    over = outcome.now.device_total_bytes - outcome.limit
    return (
        f"takes {format_bytes(outcome.now.device_total_bytes)} on the device, context included: "
        f"{format_bytes(over)} over its limit of {format_bytes(outcome.limit)}"
    )
