"""How much memory a traced step needs on some GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

from autobatch.prediction.allocator import AllocatorSettings
from autobatch.prediction.kernels import Gpu
from autobatch.prediction.replay import replay, smallest_capacity
from autobatch.prediction.trace import Phase, Trace
from autobatch.prediction.traced import TracedStep
from autobatch.prediction.workspaces import with_workspaces


@dataclass(frozen=True)
class Conditions:
    """What decides how a GPU runs a step, apart from how much memory it has."""

    gpu: Gpu = field(default_factory=Gpu)
    settings: AllocatorSettings = field(default_factory=AllocatorSettings)

    @classmethod
    def of(cls, capability: tuple[int, int], torch: str, multiprocessors: int) -> Conditions:
        """Those of a GPU with a version of torch such as "2.11.0+cu130", and the allocator as this environment sets
        it."""
        major, minor = torch.split(".")[:2]
        return cls(Gpu(capability, (int(major), int(minor)), multiprocessors), AllocatorSettings.from_environment())


@dataclass(frozen=True)
class Need:
    """Bytes of the caching allocator, without context and libraries."""

    capacity_bytes: int
    """The smallest capacity that works."""
    allocated_bytes: int
    """The peak in live tensors."""
    reserved_bytes: int
    """The peak that the allocator holds where there is enough of everything."""
    rest_bytes: int
    """Held before the last batch: weights, optimizer state, and gradients where there is an earlier micro-batch."""
    turn_bytes: int
    """Held at the turn from forward to backward of the last micro-batch."""


@dataclass(frozen=True)
class Predictor:
    """Answers for one traced step under some conditions."""

    steps: TracedStep
    conditions: Conditions = field(default_factory=Conditions)
    _needs: dict[tuple[int, ...], Need] = field(default_factory=dict)

    def trace(self, sizes: tuple[int, ...]) -> Trace:
        """A warm-up step, and one with micro-batches of these samples, as they run under the conditions."""
        return with_workspaces(self.steps.of_sizes(sizes), self.conditions.gpu)

    def fits(self, sizes: tuple[int, ...], capacity_bytes: int) -> bool:
        """Whether a step with these micro-batches runs where the driver can give so much."""
        return replay(self.trace(sizes), capacity_bytes, self.conditions.settings).fits

    def reserved_bytes(self, sizes: tuple[int, ...]) -> int:
        """What the allocator takes where there is enough of everything."""
        return replay(self.trace(sizes), settings=self.conditions.settings).peak_reserved_bytes

    def need(self, sizes: tuple[int, ...]) -> Need:
        """What a step with these micro-batches needs."""
        if sizes not in self._needs:
            self._needs[sizes] = self._replayed(sizes)
        return self._needs[sizes]

    def _replayed(self, sizes: tuple[int, ...]) -> Need:
        trace = self.trace(sizes)
        unbounded = replay(trace, settings=self.conditions.settings)
        rest, turn = _rest_and_turn(trace)
        return Need(
            capacity_bytes=smallest_capacity(trace, self.conditions.settings),
            allocated_bytes=unbounded.peak_allocated_bytes,
            reserved_bytes=unbounded.peak_reserved_bytes,
            rest_bytes=rest,
            turn_bytes=turn,
        )


def _rest_and_turn(trace: Trace) -> tuple[int, int]:
    rest = turn = 0
    before: Phase | None = None
    held = 0
    for event, alive in zip(trace.events, trace.allocated_bytes(), strict=True):
        if event >= 0:
            phase = trace.sites[event].phase
            if phase is not before and phase is Phase.BATCH:
                rest = held
            if phase is not before and phase is Phase.BACKWARD:
                turn = held
            before = phase
        held = alive
    return rest, turn
