"""A plan for frameworks that take one micro-batch size, which was tried as such."""

from __future__ import annotations

import warnings
from typing import TypedDict

from autobatch import ranks
from autobatch.fitting import fit
from autobatch.plan import TrainingPlan
from autobatch.progress import OnProgress
from autobatch.workload import Workload


class FitOptions(TypedDict, total=False):
    """The arguments of `autobatch.fit` that a framework's own objects do not say."""

    device: object
    memory_limit: int | str | None
    headroom: float
    max_micro_batch: int | None
    exact: bool
    progress: OnProgress | None


def fit_one_size(workload: Workload, target: int, world_size: int | None, options: FitOptions) -> TrainingPlan:
    """The plan of `fit` with its `uniform()` size, which is tried too where it was not.

    Args:
        world_size: as for `fit`. None: the ranks of torch.distributed answer together.

    Raises: as `fit`.
        InvalidInput: also where no single size hits the target.
    """
    while True:
        plan = fit(workload, target, world_size=world_size, **options).uniform()
        # Ranks go on together, also those that have tried the size.
        verified = plan.verified if world_size else all(ranks.gather(plan.verified))
        if verified or plan.evidence == "predicted":
            _warn_of_small(plan)
            return plan
        options = {**options, "max_micro_batch": plan.micro_batch_size}


def _warn_of_small(plan: TrainingPlan) -> None:
    """Say so where the target has no divisor near what fits."""
    size, most = plan.micro_batch_size, plan.max_micro_batch_size
    if 2 * size > most:
        return
    share = plan.target_batch_size // plan.world_size
    near = -(-share // most) * most * plan.world_size
    warnings.warn(
        f"micro-batches have {size} of the {most} samples that fit, as {share} has no larger divisor up to that. A "
        f"target of {near} would have {most}.",
        stacklevel=4,
    )
