"""Runs cases side by side, each in a process of its own."""

from __future__ import annotations

import os
import pickle
import re
import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from autobatch.child import Child, die_with, pipe_from
from autobatch.errors import AutobatchError, InputsNotInferred, NothingFits, in_one_line
from autobatch.regression.cases import Case
from autobatch.regression.record import Record, Settings, record_of

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
"""Such as the colours of a message, which are none in a report."""
MODEL_FAILED = 3
"""The exit code where the user's own code fails."""


@dataclass(frozen=True)
class Failure:
    """Why a case has no record."""

    problem: str
    """One line."""
    exit_code: int
    details: str = ""
    """A traceback, or ""."""


def run_all(cases: Iterable[Case], root: Path, jobs: int, on_end: Callable[[Case, Record | Failure], None]) -> None:
    """Run every case, so many at a time.

    Args:
        cases: what to run.
        root: the folder to run in, which SPECs are relative to.
        jobs: how many at a time.
        on_end: called as each ends, in this thread.
    """
    running: list[Child] = []
    on_the_gpu = threading.Lock()  # measured cases would take memory from one another

    def run(case: Case) -> tuple[Case, Record | Failure]:
        with on_the_gpu if case.measured else nullcontext():
            child = Child(__name__)
            running.append(child)
            try:
                pickle.dump((case, root), child.writer)
                child.writer.flush()
                child.wait_for_an_answer()
                answer: Record | Failure = pickle.load(child.reader)
            except (EOFError, OSError, ValueError, pickle.UnpicklingError):
                status = child.close(failed=True)
                answer = Failure(f"the process that ran it died (status {status}).", MODEL_FAILED)
            finally:
                child.close()
            return case, answer

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in as_completed([pool.submit(run, case) for case in cases]):
                on_end(*done.result())
        except BaseException:  # Ctrl-C: what waits must not begin, and what runs must not be waited for
            pool.shutdown(wait=False, cancel_futures=True)
            for child in running:
                child.close()
            raise


def default_jobs() -> int:
    """As many as there are processors for this process."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return count or 1


def main(descriptor: int, parent: int) -> None:
    """The process of one case."""
    die_with(parent)
    reader, writer = pipe_from(descriptor)
    case, root = pickle.load(reader)
    answer: Record | Failure
    try:
        os.chdir(root)
        answer = run_here(case)
    except BaseException as error:  # noqa: BLE001  # the user's code may raise anything: the caller is told
        answer = _failure(error)
    with suppress(BrokenPipeError):
        pickle.dump(answer, writer)
        writer.flush()


def run_here(case: Case) -> Record:
    """Run a case in this process, which is for nothing else afterwards.

    Raises:
        AutobatchError, Exception: as `estimate` does.
    """
    import torch

    from autobatch.prediction import tracing

    torch.set_num_threads(1)  # nothing is computed, and there are others at work
    if not case.measured:
        tracing.claim_this_process()
    from autobatch.regression.measuring import step_on
    from autobatch.workload import Workload, specs
    from autobatch.workload.checkpointing import switch_checkpointing

    subject = specs.load(case.spec, shapes_only=not case.measured)
    workload = subject if isinstance(subject, Workload) else Workload(subject)
    if case.precision is not None:
        workload = replace(workload, precision=case.precision)
    if case.checkpointing is not None:
        switch_checkpointing(workload.model, case.checkpointing)
    settings = Settings(
        spec=case.spec,
        batch_size=case.batch_size,
        precision=workload.precision,
        checkpointing=case.checkpointing,
        accumulation=case.accumulation,
        device=case.device,
    )
    try:
        return record_of(step_on(case.device, workload, case.batch_size, case.accumulation), settings)
    except InputsNotInferred as error:
        if workload.data is not None:  # the inputs are the user's, so that what fails on them is the model
            error.exit_code = MODEL_FAILED
        raise


def _failure(error: BaseException) -> Failure:
    failure = _as_it_is(error)
    return replace(failure, problem=_UNPRINTABLE.sub("�", failure.problem))


def _as_it_is(error: BaseException) -> Failure:
    if isinstance(error, AutobatchError):
        code = MODEL_FAILED if isinstance(error, NothingFits) else error.exit_code
        return Failure(" ".join(str(error).split()), code, "".join(getattr(error, "__notes__", ())))
    return Failure(f"{in_one_line(error)}.", MODEL_FAILED, "".join(traceback.format_exception(error)))
