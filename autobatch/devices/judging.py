"""What the outcome of a trial in a child process means: memory, a bug of the user's, or a crash."""

from __future__ import annotations

import math
import pickle
import signal

from autobatch.devices import oom
from autobatch.devices.oom import Diagnosis, Failure
from autobatch.devices.trial_server import Outcome
from autobatch.errors import AutobatchError, TrialCrashed, add_note
from autobatch.trial import Trial, Verdict
from autobatch.units import format_bytes


def judge(outcome: Outcome, sizes: tuple[int, ...], budget_bytes: int, limit_bytes: int) -> Trial:
    """The trial as what it is: a measured size, or one that ran out of memory.

    Raises:
        TrialCrashed: its process died of something else.
        Exception: what the user's code raised there, with that process's traceback and the size in a note.
    """
    if outcome.error_text and outcome.memory is None:
        _raise_user_error(outcome, sizes)
    verdict, detail, requested = Verdict.FITS, "", None
    if outcome.peak_bytes is None:
        failure = outcome.memory or _death_by_memory(outcome, limit_bytes)
        if failure is None:
            raise _crash(outcome, sizes)
        verdict, requested = Verdict.OUT_OF_MEMORY, failure.requested_bytes
        # The allocator's own words name a line of its source; what it wanted says more.
        detail = failure.message if requested is None else f"could not allocate {format_bytes(requested)}"
        detail += f" (in {outcome.phase})" if outcome.phase else ""
    elif outcome.peak_bytes > budget_bytes:
        verdict = Verdict.OVER_BUDGET
    if outcome.loss is not None and math.isnan(outcome.loss):
        detail = "the loss is not a number"
    return Trial(
        micro_batch_sizes=sizes,
        verdict=verdict,
        peak_bytes=outcome.peak_bytes,
        rest_bytes=outcome.rest_bytes,
        turn_bytes=outcome.turn_bytes,
        requested_bytes=requested,
        samples=outcome.samples,
        seconds=outcome.seconds,
        step_seconds=outcome.step_seconds,
        repeated_seconds=outcome.repeated_seconds,
        detail=detail,
    )


def worse(one: Trial, other: Trial) -> Trial:
    """The trial that took more, with the samples and the time of both."""
    worse = other if not other.fits or (other.peak_bytes or 0) > (one.peak_bytes or 0) else one
    return worse.model_copy(update={"samples": one.samples + other.samples, "seconds": one.seconds + other.seconds})


def _crash(outcome: Outcome, sizes: tuple[int, ...]) -> TrialCrashed:
    how = f"signal {signal.Signals(outcome.signal).name}" if outcome.signal else f"exit status {outcome.exit_status}"
    return TrialCrashed(
        f"a training step with micro-batches of {max(sizes)} samples ended its process with {how}. This is not a lack "
        f"of memory; look for it in the model's own code or its libraries.\n{outcome.output}".rstrip()
    )


def _death_by_memory(outcome: Outcome, limit_bytes: int) -> Diagnosis | None:
    """Whether a process that died without an answer died for memory.

    Libraries abort, or use a null pointer, when an allocation fails under the limit: their last words tell, or else how
    close to the limit the process was.
    """
    if outcome.signal == signal.SIGKILL:
        return Diagnosis(Failure.HOST, "the process was killed (SIGKILL), as the kernel does when memory runs out")
    last_words = oom.classify(RuntimeError(outcome.output), cpu_limited=True)
    if last_words and last_words.is_memory:
        return last_words
    for words in ("libgomp: thread creation failed", "cannot allocate memory"):  # OpenMP's threads; glibc's own data
        if words in outcome.output.lower():
            return Diagnosis(Failure.HOST, f"the process ended itself: {words}")
    if (
        outcome.signal in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
        and outcome.max_resident_bytes > 0.8 * limit_bytes
    ):
        return Diagnosis(Failure.HOST, f"the process died of {signal.Signals(outcome.signal).name} close to the limit")
    return None


def _raise_user_error(outcome: Outcome, sizes: tuple[int, ...]) -> None:
    """Raise what the user's code raised in the child, with the child's traceback and the size as a note."""
    where = outcome.phase or "the start"
    note = f"autobatch: raised in {where} of a trial with micro-batches of {max(sizes)} samples.\n{outcome.error_text}"
    if outcome.error is None:
        raise TrialCrashed(note)
    error: BaseException = pickle.loads(outcome.error)
    if isinstance(error, AutobatchError):  # about the workload; where it was raised says nothing more
        raise error
    if not isinstance(error, Exception):  # the caller's process is not the one to exit
        raise TrialCrashed(f"the model's own code ended the process with {type(error).__name__}({error}). {note}")
    add_note(error, note)
    raise error
