"""A drop-in for accelerate's `find_executable_batch_size` that holds the target. Accelerate is not imported."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar, overload

from autobatch import ranks
from autobatch.devices import oom
from autobatch.errors import InvalidInput, NothingFits

_log = logging.getLogger("autobatch")
_Result = TypeVar("_Result")


@overload
def find_executable_batch_size(
    function: Callable[..., _Result], *, target: int, starting_batch_size: int | None = None
) -> Callable[..., _Result]: ...


@overload
def find_executable_batch_size(
    function: None = None, *, target: int, starting_batch_size: int | None = None
) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]: ...


def find_executable_batch_size(
    function: Callable[..., Any] | None = None, *, target: int, starting_batch_size: int | None = None
) -> Callable[..., Any]:
    """Decorate `function(batch_size, accumulation_steps, ...)` so that it is called again with a smaller batch size
    when memory runs out, and `batch_size * accumulation_steps` over all ranks is the target every time.

    Each call begins with the largest size; sizes that do not divide a rank's share of the target are left out. The
    function begins anew each time: it has to make model, optimizer and loaders itself, or what it has trained so far is
    trained on. What it held is freed before the next call. Anything but running out of memory is raised as it is. On
    several ranks all have to run out together, as in accelerate's own: the others wait for one that alone did;
    `TrainingPlan.stepper` has the ranks agree.

    Args:
        function: what to decorate; without it, a decorator is returned.
        target: samples behind one optimizer step, over all ranks.
        starting_batch_size: the samples to begin with, at most. None: a rank's whole share.

    Returns:
        The decorated function, which is called without the first two arguments. It raises `InvalidInput` where the
        function does not take them before the caller's own, or the target cannot be shared equally by the ranks, and
        `NothingFits` where memory runs out with one sample.

    Raises:
        InvalidInput: target or starting_batch_size is below 1.
    """
    if target < 1:
        raise InvalidInput(f"target must be at least 1 sample, but is {target}.")
    if starting_batch_size is not None and starting_batch_size < 1:
        raise InvalidInput(f"starting_batch_size must be at least 1 sample, but is {starting_batch_size}.")
    if function is None:
        return functools.partial(find_executable_batch_size, target=target, starting_batch_size=starting_batch_size)

    @functools.wraps(function)
    def with_a_size_that_fits(*args: Any, **kwargs: Any) -> Any:
        share = _share(target)
        largest = share if starting_batch_size is None else starting_batch_size
        sizes = [size for size in range(min(share, largest), 0, -1) if share % size == 0]
        for size in sizes:
            _check_call(function, size, share // size, *args, **kwargs)
            outcome = oom.attempt(functools.partial(function, size, share // size, *args, **kwargs))
            if not isinstance(outcome, oom.Diagnosis):
                return outcome
            oom.release()
            _log.warning(
                "Memory ran out with micro-batches of %d sample%s. (%s)", size, "s" if size > 1 else "", outcome.message
            )
        raise _nothing_fits(outcome)

    return with_a_size_that_fits


def _check_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Whether the function takes the two numbers before the caller's own arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise InvalidInput(
            f"find_executable_batch_size calls {name}(batch_size, accumulation_steps, ...) with both numbers first, "
            f"but it cannot be called so here: {error}. Have it take the two, and call it without them."
        ) from error


def _share(target: int) -> int:
    """The samples of one rank."""
    # A launcher says how many ranks there are before they have met.
    world_size = max(ranks.world_size(), int(os.environ.get("WORLD_SIZE", "1")))
    share, rest = divmod(target, world_size)
    if rest or not share:
        raise InvalidInput(
            f"a target of {target} is not a multiple of {world_size} ranks, so no single size hits it exactly. "
            f"Targets that work: {', '.join(str(n * world_size) for n in (share, share + 1) if n)}."
        )
    return share


def _nothing_fits(ran_out: oom.Diagnosis) -> NothingFits:
    return NothingFits(
        f"nothing fits: memory ran out with micro-batches of 1 sample, the smallest there are ({ran_out.message}). Try "
        "bf16, activation checkpointing, smaller inputs, an optimizer with less state, or a smaller model.",
        needed_bytes=None,
        budget_bytes=None,
    )
