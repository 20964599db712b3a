"""What a search costs on imagined devices of many kinds: `python -m benchmarks.search [DEVICES_PER_FAMILY]`.

Every device has 5 % of head-room: a trial between budget and limit is over budget, above the limit it is out of memory
(OOM). What a second sample costs can only be seen by running two, so OOMs above two samples stand beside all of them.
The rules beside the search are replicas of what common tools do, not those tools. The seed is fixed, so the table is
the same on every machine.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import mean, quantiles

from autobatch.search import MicroBatchSearch

GIB = 2**30
MIB = 2**20
Bytes = Callable[[int], float]


@dataclass
class Device:
    """A device and a training step on it: peak bytes of a step with n samples, and what they may be."""

    peak: Bytes
    budget: float
    cap: int
    turn: Bytes | None = None
    prior: Bytes | None = None
    rest: float | None = None
    jumps: float = 0.0
    """How far the peaks of neighbouring sizes jump, as a share of the budget, where the device says so."""
    tried: list[int] = field(default_factory=list)
    out_of_memory: list[int] = field(default_factory=list)
    """The sizes that were."""

    def run(self, n: int) -> float | None:
        """The peak of one trial, or None if it is out of memory."""
        self.tried.append(n)
        peak = self.peak(n)
        if peak <= self.budget / 0.95:
            return peak
        self.out_of_memory.append(n)
        return None

    def fits(self, n: int) -> bool:
        """Whether a trial, counted, stays within the budget."""
        peak = self.run(n)
        return peak is not None and peak <= self.budget

    def largest(self) -> int:
        """The true answer, found without counting; where memory is noisy, up to the noise."""
        low, high = 0, self.cap + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle) <= self.budget else (low, middle)
        return low


Rule = Callable[[Device], int | None]


def autobatch_default(device: Device, exact: bool = False) -> int | None:
    rest = None if device.rest is None else int(device.rest)
    search = MicroBatchSearch(
        int(device.budget), device.cap, prior=device.prior, exact=exact, jump_bytes=device.jumps * device.budget
    )
    while (n := search.propose()) is not None:
        peak = device.run(n)
        turn = None if peak is None or device.turn is None else int(device.turn(n))
        fits = peak is not None and peak <= device.budget
        peak_bytes = None if peak is None else int(peak)
        search.observe(n, fits=fits, peak_bytes=peak_bytes, turn_bytes=turn, rest_bytes=rest)
    return search.best


def autobatch_exact(device: Device) -> int | None:
    return autobatch_default(device, exact=True)


def double_then_bisect(device: Device) -> int | None:
    """From 2, double until it fails, then bisect to the last sample: the rule of common trainers."""
    low, n = 0, min(2, device.cap)
    while device.fits(n):
        low = n
        if n == device.cap:
            return n
        n = min(2 * n, device.cap)
    high = n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if device.fits(middle) else (low, middle)
    return low or None


def shrink_by_a_tenth(device: Device) -> int | None:
    """From 1024, nine tenths of it after every failure: the rule of common decorators."""
    n = min(1024, device.cap)
    while n > 0 and not device.fits(n):
        n = int(n * 0.9)
    return n or None


# Families of devices


def _affine(draw: random.Random) -> tuple[float, float, float, int]:
    """(fixed bytes, bytes per sample, budget, cap), with answers at 1, cap-1, cap, cap+1 and anywhere."""
    budget = draw.uniform(1, 80) * GIB
    cap = int(2 ** draw.uniform(0, 12))
    answer = draw.choice([1, cap - 1, cap, cap + 1, *(int(cap * 2 ** draw.uniform(-8, 2)) for _ in range(6))])
    fixed = draw.choice([0.0, 0.05, 0.3, 0.5, 0.7, draw.random()]) * budget
    return fixed, (budget - fixed) / (max(answer, 1) + draw.uniform(0.01, 0.9)), budget, cap


def affine(draw: random.Random) -> Device:
    fixed, slope, budget, cap = _affine(draw)

    def peak(n: int) -> float:
        return fixed + slope * n

    return Device(peak, budget, cap, turn=peak, rest=fixed)


def noisy(noise: float) -> Callable[[random.Random], Device]:
    def family(draw: random.Random) -> Device:
        device, seed = affine(draw), draw.random()
        smooth = device.peak
        device.peak = lambda n: smooth(n) * (1 + random.Random(f"{seed} {n}").uniform(-noise, noise))
        device.turn = device.peak
        return device

    return family


def stepped(draw: random.Random) -> Device:
    device, step = affine(draw), draw.choice([2, 20, 200]) * MIB
    smooth = device.peak
    device.peak = device.turn = lambda n: math.ceil(smooth(n) / step) * step
    return device


def too_small(draw: random.Random) -> Device:
    device = affine(draw)
    device.budget = device.peak(1) * draw.uniform(0.1, 0.99)
    return device


def optimizer_bound(turn_known: bool) -> Callable[[random.Random], Device]:
    """The optimizer's temporaries, flat in n, are the peak until the activations outgrow them."""

    def family(draw: random.Random) -> Device:
        device, share = affine(draw), draw.uniform(0, 0.8)
        turn = device.peak
        flat = turn(0) + share * (device.budget - turn(0))
        device.peak = lambda n: max(flat, turn(n))
        device.turn = turn if turn_known else None
        return device

    return family


def like_a_cpu(draw: random.Random) -> Device:
    """Optimizer-bound at small sizes, malloc's noise of up to 2 %, and a peak a tenth steeper than the turn."""
    device = optimizer_bound(turn_known=True)(draw)
    flat, turn, seed = device.peak(0), device.turn, draw.random()
    assert turn is not None

    def peak(n: int) -> float:
        noise = random.Random(f"{seed} {n}").uniform(0, 0.02)
        return max(flat, 1.1 * turn(n) - 0.1 * turn(0)) * (1 + noise)

    device.peak, device.jumps, device.rest = peak, 0.08, turn(0)
    return device


def forward_bound(draw: random.Random) -> Device:
    """The forward pass makes something of a fixed size, such as copies of weights in another precision."""
    device = affine(draw)
    assert device.rest is not None
    device.rest *= draw.random()
    return device


def with_prior(low: float, high: float) -> Callable[[random.Random], Device]:
    """Affine, with a prior that says between `low` and `high` times the truth."""

    def family(draw: random.Random) -> Device:
        device, factor = affine(draw), draw.uniform(low, high)
        device.prior = lambda n: factor * device.peak(n)
        return device

    return family


FAMILIES: dict[str, Callable[[random.Random], Device]] = {
    "affine": affine,
    "noise of 0.5 %": noisy(0.005),
    "noise of 3 %": noisy(0.03),
    "stepped": stepped,
    "nothing fits": too_small,
    "forward-bound": forward_bound,
    "optimizer-bound": optimizer_bound(turn_known=True),
    "  turn not known": optimizer_bound(turn_known=False),
    "like a CPU": like_a_cpu,
    "prior right": with_prior(1, 1),
    "prior within 5 %": with_prior(0.95, 1.05),
    "prior 10x low": with_prior(0.1, 0.1),
    "prior 10x high": with_prior(10, 10),
}
RULES: dict[str, Rule] = {
    "autobatch": autobatch_default,
    "autobatch, exact": autobatch_exact,
    "replica: double, then bisect": double_then_bisect,
    "replica: x0.9 from 1024": shrink_by_a_tenth,
}


def row(family: Callable[[random.Random], Device], rule: Rule, count: int) -> Iterator[str]:
    """The cells of one line of the table."""
    draw = random.Random(0)
    trials, out_of_memory, above_two, ratios, pushed = [], [], [], [], []
    for _ in range(count):
        device = family(draw)
        best = rule(device)
        trials.append(len(device.tried))
        out_of_memory.append(len(device.out_of_memory))
        above_two.append(sum(n > 2 for n in device.out_of_memory))
        if best:
            ratios.append(best / max(1, device.largest()))
            pushed.append(sum(device.tried) / best)
    yield f"{count:8,}"
    yield f"{mean(trials):6.2f} {quantiles(trials, n=20)[-1]:5.0f} {max(trials):5}"
    yield f"{mean(out_of_memory):6.3f} {mean(above_two):6.3f}"
    yield f"{mean(ratios):7.3f} {min(ratios):6.3f}" if ratios else f"{'-':>7} {'-':>6}"
    yield f"{mean(pushed):7.2f}" if pushed else f"{'-':>7}"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    print("pushed: samples of all micro-batch sizes tried, over those of the answer; answer: over the true largest")
    for name, rule in RULES.items():
        print(f"\n{name}")
        print(f"{'':18}  devices | trials   p95   max |   OOMs    n>2 | answer  worst |  pushed")
        for family, make in FAMILIES.items():
            print(f"{family:18} " + " | ".join(row(make, rule, count)))


if __name__ == "__main__":
    main()
