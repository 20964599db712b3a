"""What the ranks that train together tell each other in an optimizer step: counts, failures, gradients."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from autobatch import ranks
from autobatch.devices import oom
from autobatch.errors import InvalidInput
from autobatch.training.buckets import all_reduce, broadcast

Result = TypeVar("Result")


class Stranded(Exception):
    """This rank failed where it cannot come to the end of the passes, and others wait for it there."""


class Sync(Protocol):
    """How the ranks of a step keep together. All methods but `passing` and `drop_gradients` are collectives."""

    world_size: int
    inner: nn.Module
    """The model out of its wrapper, if it has one."""
    rank: int
    alone: bool
    """Whether `inner` runs on one rank without the others."""
    equal_passes: bool
    """Whether every rank has to run as many micro-batches as any other."""

    @property
    def apart(self) -> bool:
        """Whether no rank waits for another within the passes."""
        ...

    @property
    def recovers(self) -> bool:
        """Whether all ranks come to the end of a step's passes where one runs out of memory."""
        ...

    def meet(self, numbers: Sequence[float], failure: str | None = None) -> list[list[float]]:
        """Every rank's numbers (three at most), by rank.

        Raises:
            RankFailed: another rank failed, or is missing.
        """
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value."""
        ...

    def passing(self, last: bool) -> AbstractContextManager[object]:
        """Where a micro-batch goes forward and backward."""
        ...

    def attempt(self, run: Callable[[], Result], catch_up: Callable[[], Result]) -> Result | oom.Diagnosis:
        """Run all passes of a step; where memory runs out, leave no other rank waiting. Only where it `recovers`.

        Args:
            run: the passes, giving the loss.
            catch_up: undoes what there is of them, and runs as many on next to nothing.

        Raises:
            Stranded: others are left waiting.
        """
        ...

    def drop_gradients(self) -> None:
        """Hold none beside those that parameters show. No collective."""
        ...

    def gradients(self) -> None:
        """Have every rank's gradients be the mean over all ranks, where the backward passes have not done that."""
        ...

    def statistics(self, share: float) -> None:
        """Have every rank's buffers be those of the whole batch, of which this rank had that share."""
        ...

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all ranks."""
        ...


class Alone:
    """One process."""

    world_size = 1
    rank = 0
    alone = True
    apart = True
    recovers = True
    equal_passes = False

    def __init__(self, model: nn.Module) -> None:
        self.inner = model

    def meet(self, numbers: Sequence[float], failure: str | None = None) -> list[list[float]]:
        return [list(numbers)]

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def passing(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def attempt(self, run: Callable[[], Result], catch_up: Callable[[], Result]) -> Result | oom.Diagnosis:
        return oom.attempt(run)

    def drop_gradients(self) -> None: ...

    def gradients(self) -> None: ...

    def statistics(self, share: float) -> None: ...

    def mean(self, value: Tensor) -> Tensor:
        return value


class Ranks:
    """Ranks that tell each other things beside the gradients."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._talk = ranks.talk_of(group)
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def drop_gradients(self) -> None: ...

    def meet(self, numbers: Sequence[float], failure: str | None = None) -> list[list[float]]:
        return self._talk.meet(numbers, failure)

    def gather(self, value: Any) -> list[Any]:
        return self._talk.gather(value)

    def attempt(self, run: Callable[[], Result], catch_up: Callable[[], Result]) -> Result | oom.Diagnosis:
        return oom.attempt(run)

    def mean(self, value: Tensor) -> Tensor:
        value = value / self.world_size
        dist.all_reduce(value, group=self._group)
        return value


class DataParallel(Ranks):
    """DistributedDataParallel. To be able to run a step again on all ranks after one ran out of memory, no rank may
    wait for another within a backward pass: gradients are accumulated apart and averaged after the last one."""

    alone = True

    def __init__(self, model: DistributedDataParallel, recovers: bool) -> None:
        super().__init__(model.process_group)
        self._model = model
        self.inner = model.module
        self.equal_passes = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        # Ranks meet within the passes of some models, and sparse gradients have no buckets.
        sparse = any(getattr(module, "sparse", False) is True for module in model.modules())
        self._wanted = recovers and not (self.equal_passes or sparse)
        names = model.parameters_to_ignore
        self._parameters = [p for n, p in self.inner.named_parameters() if n not in names and p.requires_grad]

    @property
    def apart(self) -> bool:
        """See `Sync`. Hooks, in which ranks meet, may be registered later."""
        return self._wanted and not self._model._comm_hooks

    @property
    def recovers(self) -> bool:
        return self.apart

    @contextmanager
    def passing(self, last: bool) -> Iterator[None]:
        if last and not self.apart:
            yield
            return
        if self.apart:
            # Buffers are spread in `statistics`: no rank may wait for another in a forward pass.
            self._model.require_forward_param_sync = False
        with self._model.no_sync():
            yield

    def gradients(self) -> None:
        if self.apart:
            self._fill_in()
            all_reduce([p.grad for p in self._parameters if p.grad is not None], self._group, self.world_size)

    def _fill_in(self) -> None:
        """Where a parameter was used on some ranks only, the others have gradients of zero."""
        have = [p.grad is not None for p in self._parameters]
        if not any(row[0] for row in self.meet([float(not all(have))])):
            return
        on_any = [any(column) for column in zip(*self.gather(have), strict=True)]
        for parameter, needed in zip(self._parameters, on_any, strict=True):
            if needed and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def statistics(self, share: float) -> None:
        if not self._model.broadcast_buffers:
            return
        ignored = self._model.parameters_to_ignore
        shared = {id(buffer): buffer for name, buffer in self.inner.named_buffers() if name not in ignored}
        means = average_statistics(self.inner, share, self._group, shared)
        broadcast([buffer for key, buffer in shared.items() if key not in means], self._group)


def average_statistics(model: nn.Module, share: float, group: dist.ProcessGroup, among: Container[int]) -> set[int]:
    """Have running statistics be the means over all ranks, of which this one had that share of the samples.

    Args:
        among: the ids of the buffers that may be changed.

    Returns:
        The ids of those that were.
    """
    means: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, _NormBase) and module.training:
            found = (module.running_mean, module.running_var)
            means += [tensor for tensor in found if tensor is not None and id(tensor) in among]
    if means:
        torch._foreach_mul_(means, share)
    all_reduce(means, group, 1)
    return {id(tensor) for tensor in means}


def sync_of(model: nn.Module, world_size: int, recover: bool) -> Sync:
    """How the ranks that share a plan keep together, by what the model is wrapped in.

    Raises:
        InvalidInput: the model is not wrapped for as many ranks as the plan has.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    from autobatch.training.sharded import FullySharded

    model = getattr(model, "_orig_mod", model)
    found: Sync
    if isinstance(model, DistributedDataParallel):
        if model.static_graph:
            raise InvalidInput(
                "DistributedDataParallel with static_graph=True cannot accumulate gradients before they were "
                "synchronised once. Leave static_graph out; find_unused_parameters=True does for other graphs."
            )
        found = DataParallel(model, recover)
    elif isinstance(model, FSDPModule):
        found = FullySharded(model, _mesh_group(model), recover)
    elif isinstance(model, (FullyShardedDataParallel, nn.DataParallel)):
        raise InvalidInput(
            f"gradients cannot be accumulated exactly in {type(model).__name__}. Use DistributedDataParallel, or "
            "torch.distributed.fsdp.fully_shard."
        )
    else:
        found = Alone(model)
    if found.world_size != world_size:
        raise InvalidInput(
            f"the plan shares its target over {world_size} ranks, but the model is trained by {found.world_size}. "
            + (
                "Wrap it in DistributedDataParallel or fully_shard on every rank, and use plan.for_rank(rank)."
                if isinstance(found, Alone)
                else "Make the plan with the ranks that train: fit(..., world_size=...)."
            )
        )
    return found


def _mesh_group(model: Any) -> dist.ProcessGroup:
    """The group over whose ranks a sharded model's batches are spread."""
    from torch.distributed.tensor import DTensor

    mesh = next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    if mesh.ndim > 1:
        raise InvalidInput(
            f"the model is sharded over a mesh of {mesh.ndim} dimensions; accumulation works with one of data-parallel "
            "ranks."
        )
    lying = next(
        (p.device.type for p in model.parameters() if isinstance(p, DTensor) and p.device.type != mesh.device_type),
        None,
    )
    if lying:
        raise InvalidInput(
            f"the model is sharded over devices of type {mesh.device_type}, but has parameters on {lying}. A step runs "
            "where its parameters are, so they have to stay there: shard it without CPUOffloadPolicy."
        )
    group: dist.ProcessGroup = mesh.get_group()
    return group
