"""What an exception says about memory: a typed verdict, from its type and from the exact words of the libraries."""

from __future__ import annotations

import errno
import gc
import re
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


class Failure(Enum):
    """Why a step failed, where the reason is not the model's own code."""

    ALLOCATOR = "the device's memory ran out"
    LIBRARY = "a CUDA library could not allocate memory for itself"
    """cuBLAS, cuDNN, cuFFT and their like, whose handles and plans lie outside torch's allocator."""
    HOST = "the host's memory ran out"
    POISONED = "a kernel failed and left the device's context beyond use"


@dataclass(frozen=True)
class Diagnosis:
    """What went wrong, with nothing in it that keeps the failed step alive."""

    failure: Failure
    message: str
    """The first line of the error that decided."""
    requested_bytes: int | None = None
    """Bytes of the allocation that failed, where the error named them."""

    @property
    def is_memory(self) -> bool:
        return self.failure is not Failure.POISONED


# Every pattern begins where a message (or a line of one that quotes another) begins, and spells out what the library
# itself says: a model's own message about memory or CUDA must not match.
_START = r"^(?:[\w.]*(?:Error|Exception): )?"
_DRIVER = r"(?:(?:CUDA|HIP) (?:driver )?error:|Triton Error \[(?:CUDA|HIP)\]:(?: +Code: \d+, Mess+age:)?) "
_ALLOCATOR = (
    r"(?:CUDA|HIP|XPU|NPU) out of memory\. Tried to allocate",
    r"MPS backend out of memory",
    _DRIVER + r"(?:out of memory|hipErrorOutOfMemory)",
    r"CUDA error: CUDA_ERROR_OUT_OF_MEMORY",
    r".*\bUR_RESULT_ERROR_OUT_OF_(?:DEVICE_MEMORY|RESOURCES)\b",
)
_LIBRARY = (
    r".*\b(?:CUBLAS|HIPBLAS|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED\b",
    r".*\bCUSPARSE_STATUS_INSUFFICIENT_RESOURCES\b",
    # A handle that cannot be created is one without room. NOT_INITIALIZED from any other call is a bug.
    r".*\b(?:CUBLAS|CUSOLVER|CUSPARSE)_STATUS_NOT_INITIALIZED when calling "
    r"`(?:cublas(?:Lt)?|cusolver\w*|cusparse)Create\b",
    r"cuDNN error: CUDNN_STATUS_(?:ALLOC_FAILED|INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED)\b",
    # A plan's work area is taken from the driver, and cuFFT calls it an internal error when there is none left.
    r"cuFFT error: CUFFT_(?:ALLOC_FAILED|INTERNAL_ERROR)\b",
    r"MIOpen Error: .*(?:hipErrorOutOfMemory|out of memory)|miopenStatusAllocFailed\b",
    r"rocblas error: .*\brocblas_status_memory_error\b",
    r"Failed to CUDA [mc]alloc\b",  # NCCL, in the last lines of an error that is otherwise about a collective
    r"Cuda failure (?:\d+ )?'out of memory'",
    # Not "FIND (or GET) was unable to find an engine to execute this computation": cuDNN's plans may all have failed
    # for want of memory, but a GPU or a dtype that has no plan at all gives the same words, at every size.
)
_HOST = (
    r"(?:\[enforce fail at .*\]\s?\.?.*)?DefaultCPUAllocator: (?:can't allocate memory|not enough memory)",
    r"std::bad_alloc",
    r"cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED\b",
)
_POISONED = (
    _DRIVER + r"(?:"
    r"device-side assert triggered|an illegal memory access was encountered|misaligned address"
    r"|unspecified launch failure|an illegal instruction was encountered|uncorrectable (?:ECC|NVLink) error"
    r"|invalid program counter|operation not supported on global/shared address space|hardware stack error"
    r"|the launch timed out and was terminated|context is destroyed)",
    r".*\bUR_RESULT_ERROR_DEVICE_LOST\b",
)


def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(_START + "(?:" + "|".join(patterns) + ")", re.MULTILINE)


# A poisoned context comes first: after it, every call fails, allocations too.
_PATTERNS = (
    (Failure.POISONED, _any_of(_POISONED)),
    (Failure.ALLOCATOR, _any_of(_ALLOCATOR)),
    (Failure.LIBRARY, _any_of(_LIBRARY)),
    (Failure.HOST, _any_of(_HOST)),
)
# What oneDNN says when it cannot allocate on the CPU, and for unsupported shapes too: memory only under a known limit.
_ONEDNN = re.compile(r"^could not create a (?:memory|primitive)\b")
_REQUESTED = re.compile(r"tried to allocate (?P<number>\d+(?:\.\d+)?) (?P<unit>bytes|[KMGT]iB|[KMGT]B)", re.IGNORECASE)
_UNITS = {"b": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def classify(
    error: BaseException, *, cpu_limited: bool = False, outside: BaseException | None = None
) -> Diagnosis | None:
    """Tell a failure of memory, and a poisoned device, from a bug in the model's own code.

    An error raised from another (`raise ... from oom`), or while another was being handled, takes the verdict of the
    one beneath it: without the failed allocation it would not have been raised. A poisoned device anywhere in the chain
    decides.

    Args:
        error: what the step raised.
        cpu_limited: whether it ran on the CPU under a memory limit, where oneDNN reports a failed allocation in words
            that it also has for shapes it does not support.
        outside: an error that was being handled before the step began (`sys.exc_info()[1]`), and says nothing about it.

    Returns:
        The diagnosis, or None: the model's own bug.
    """
    found = [diagnosis for link in chain(error, outside) if (diagnosis := _classify_one(link, cpu_limited))]
    poisoned = [diagnosis for diagnosis in found if diagnosis.failure is Failure.POISONED]
    return next(iter(poisoned or found), None)


def attempt(call: Callable[[], _Result]) -> _Result | Diagnosis:
    """What the call returned, or why memory ran out; then nothing of what failed is held by its traceback.

    Raises:
        Exception: what the call raised, where it was anything else.
    """
    outside = sys.exc_info()[1]
    try:
        return call()
    except Exception as error:
        diagnosis = classify(error, cpu_limited=_is_limited(), outside=outside)
        if diagnosis is None or not diagnosis.is_memory:
            raise
        for link in chain(error, outside):
            traceback.clear_frames(link.__traceback__)
        return diagnosis


def release() -> None:
    """Give back to the devices what a failed attempt held, so that a smaller one has the room."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def requested_bytes(message: str) -> int | None:
    """The bytes of the allocation that failed ("Tried to allocate 2.00 GiB"), or None where the message has none."""
    match = _REQUESTED.search(message)
    if match is None:
        return None
    scale: int = 1024 ** _UNITS[match["unit"][0].lower()]
    return round(float(match["number"]) * scale)


def chain(error: BaseException, outside: BaseException | None = None) -> Iterator[BaseException]:
    """The error, then those beneath it as a traceback would show them, down to one that is none of the step's."""
    seen = {id(outside)}
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _classify_one(error: BaseException, cpu_limited: bool) -> Diagnosis | None:
    message = str(error)
    failure = _failure_of(error, message, cpu_limited)
    if failure is None:
        return None
    first_line = next(iter(message.splitlines()), "") or type(error).__name__
    return Diagnosis(failure, first_line, requested_bytes(message))


def _failure_of(error: BaseException, message: str, cpu_limited: bool) -> Failure | None:
    if isinstance(error, torch.OutOfMemoryError):
        return Failure.ALLOCATOR
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return Failure.HOST
    if not isinstance(error, RuntimeError):  # the libraries' errors are RuntimeErrors; a ValueError only quotes them
        return None
    # A process at its limit cannot map a thread's stack either.
    if cpu_limited and (_ONEDNN.match(message) or message == "can't start new thread"):
        return Failure.HOST
    return next((failure for failure, pattern in _PATTERNS if pattern.search(message)), None)


def _is_limited() -> bool:
    """Whether this process may only take so much of the host's memory."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS))
    return any(limit != resource.RLIM_INFINITY for limit in limits)
