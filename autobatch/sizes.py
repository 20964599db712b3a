"""The arithmetic of plans, in samples: a target shared by ranks, and each share cut into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autobatch.errors import InvalidInput


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """`total` as `parts` integers that differ by at most one, larger ones first.

    >>> split_evenly(256, 7)
    (37, 37, 37, 37, 36, 36, 36)
    """
    quotient, larger = divmod(total, parts)
    return (quotient + 1,) * larger + (quotient,) * (parts - larger)


def micro_batches(samples: int, largest: int, smallest: int = 1) -> tuple[int, ...]:
    """The fewest micro-batches of at most `largest` samples that hold `samples`, as equal as possible.

    Raises:
        InvalidInput: every such split needs a micro-batch of fewer than `smallest` samples.
    """
    if samples < 1:
        raise InvalidInput(
            "there are no samples to split into micro-batches: this batch is empty, as a rank's share is where a "
            "loader's last batch has fewer samples than there are ranks. Give every rank at least one sample, or leave "
            "that batch out with drop_last=True."
        )
    sizes = split_evenly(samples, math.ceil(samples / largest))
    if sizes[-1] < smallest:
        raise InvalidInput(
            f"{samples} samples cannot be split into micro-batches of {smallest} to {largest}, and the model does not "
            f"run on fewer than {smallest}. Use a multiple of {smallest}; a loader's last batch can be left out with "
            "drop_last=True."
        )
    return sizes


def micro_batches_of_ranks(target: int, world_size: int, largest: int, smallest: int = 1) -> list[tuple[int, ...]]:
    """Every rank's micro-batches: all ranks take the same number of steps, where their shares can be cut so.

    Raises:
        InvalidInput: some share can only be cut with a micro-batch of fewer than `smallest` samples.
    """
    shares = split_evenly(target, world_size)
    steps = len(micro_batches(shares[0], largest, smallest))
    return [in_steps(share, steps, largest, smallest) for share in shares]


def in_steps(share: int, steps: int, largest: int, smallest: int) -> tuple[int, ...]:
    """A rank's share in that many micro-batches, or in as few as fit where it cannot be."""
    if steps * smallest <= share <= steps * largest:
        return split_evenly(share, steps)
    return micro_batches(share, largest, smallest)


def share_out(target: int, speeds: Sequence[float], smallest: int = 1) -> tuple[int, ...]:
    """`target` as one integer for each rank, in proportion to its speed, by largest remainders; never below `smallest`.

    >>> share_out(100, [3.0, 1.0])
    (75, 25)

    Raises:
        InvalidInput: the target is too small for that many ranks.
    """
    spare = target - smallest * len(speeds)
    if spare < 0:
        raise InvalidInput(
            f"a target of {target} samples cannot be shared by {len(speeds)} ranks that need at least {smallest} each. "
            f"Choose a target of at least {smallest * len(speeds)}."
        )
    # A rank whose part would be below the smallest gets that, and the others share the rest.
    parts = {i: target * speed / sum(speeds) for i, speed in enumerate(speeds)}
    low = {i for i, part in parts.items() if part < smallest}
    if low:
        others = [i for i in parts if i not in low]
        rest = share_out(target - smallest * len(low), [speeds[i] for i in others], smallest)
        shares = dict.fromkeys(low, smallest) | dict(zip(others, rest, strict=True))
    else:
        shares = {i: int(part) for i, part in parts.items()}
        by_remainder = sorted(parts, key=lambda i: shares[i] - parts[i])
        for i in by_remainder[: target - sum(shares.values())]:
            shares[i] += 1
    return tuple(shares[i] for i in range(len(speeds)))
