"""Plans for tests, without trials."""

from typing import Any

from autobatch.plan import TrainingPlan
from autobatch.sizes import micro_batches_of_ranks
from autobatch.trial import DeviceInfo


def plan_of(target: int, largest: int, *, ranks: int = 1, rank: int = 0, **fields: Any) -> TrainingPlan:
    """A plan whose micro-batches have at most `largest` samples."""
    smallest = fields.get("min_micro_batch_size", 1)
    return TrainingPlan(
        target_batch_size=target,
        world_size=ranks,
        rank=rank,
        micro_batch_sizes=micro_batches_of_ranks(target, ranks, largest, smallest)[rank],
        max_micro_batch_size=largest,
        peak_bytes=1,
        limit_bytes=100,
        budget_bytes=95,
        headroom=0.05,
        verified=False,
        device=DeviceInfo(type="cpu", name="cpu", total_bytes=100),
        **fields,
    )
