"""What whole fits push through the model on imagined CPUs: `python -m benchmarks.fits [DEVICES]`.

Beside the search these run the plan's own sizes, thoroughly where they are near the limit. As on real CPUs, the
optimizer hides what small micro-batches take, peaks are up to 2.2 times as steep as what is in use, jump by up to 4 %
from one size to the next, and grow by up to 8 % in a thorough trial. The seed is fixed.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from dataclasses import dataclass
from statistics import mean, quantiles

from torch import nn, optim

from autobatch.probing import Attempts, Question, probe
from autobatch.trial import Trial, Verdict
from autobatch.workload.step import TrainingStep

MIB = 2**20
HEADROOM = 0.05
STEP = TrainingStep(nn.Linear(1, 1), lambda n: n, lambda model, batch: batch, optim.AdamW)


@dataclass(frozen=True)
class Cpu:
    """An imagined CPU under a limit, and a training step on it. Bytes."""

    limit: float
    fixed: float
    hidden: float
    """The optimizer's peak, below which no step's peak goes."""
    slope: float
    """Of the peak, per sample."""
    turn_slope: float
    noise: float
    growth: float
    seed: float

    @classmethod
    def drawn(cls, draw: random.Random, answer: float) -> Cpu:
        """One whose largest micro-batch has about `answer` samples."""
        limit = 2 ** draw.uniform(9.6, 14) * MIB
        room = limit * (1 - HEADROOM)
        fixed = draw.choice([0.1, 0.3, 0.5, 0.7]) * limit
        slope = (room - fixed) / answer
        return cls(
            limit=limit,
            fixed=fixed,
            hidden=fixed + draw.uniform(0, 0.3) * (room - fixed),
            slope=slope,
            turn_slope=slope / draw.uniform(1, 2.2),
            noise=draw.choice([0, 0.02, 0.04]),
            growth=draw.choice([0, 0, 0.03, 0.08]),
            seed=draw.random(),
        )

    @property
    def budget(self) -> int:
        return int(self.limit * (1 - HEADROOM))

    @property
    def settled(self) -> int:
        return int(self.limit * 6 / 7)

    def run(self, sizes: tuple[int, ...], thorough: bool = False, timing: object = None) -> Trial:
        """One trial, as `CpuDevice` runs it."""
        n = max(sizes)
        jump = 1 + random.Random(f"{self.seed} {n}").uniform(-self.noise, self.noise) / 2
        peak = max(self.hidden, self.fixed + self.slope * n) * jump
        samples = 2 * n if len(sizes) == 1 else 1 + sum(sizes)
        if thorough and self.settled < peak <= self.budget:
            samples += 2 * n if self.growth else n
            peak *= 1 + self.growth
        if peak > self.limit:
            return Trial(micro_batch_sizes=sizes, verdict=Verdict.OUT_OF_MEMORY, samples=samples)
        return Trial(
            micro_batch_sizes=sizes,
            verdict=Verdict.FITS if peak <= self.budget else Verdict.OVER_BUDGET,
            peak_bytes=int(peak),
            rest_bytes=int(self.fixed),
            turn_bytes=int(self.fixed + self.turn_slope * n),
            samples=samples,
        )


def fitted(draw: random.Random) -> tuple[int, list[Trial], float]:
    """A fit on a drawn device: the plan's micro-batches, the trials, and samples pushed over the target."""
    answer = 2 ** draw.uniform(3, 11)
    cpu, target = Cpu.drawn(draw, answer), max(2, int(answer * 2 ** draw.uniform(-1.5, 5)))
    jump = min(int(cpu.limit * 0.08), 256 * MIB)
    attempts = Attempts(cpu.run, cpu.budget, lambda event: None, cpu.settled, jump)
    question = Question.checked(target, HEADROOM, 1, None, exact=False, per_rank=False)
    found = probe(attempts, STEP, question)
    pushed = sum(trial.samples for trial in attempts.trials) / target
    return len(found.sizes) if found else 0, attempts.trials, pushed


def main() -> None:
    draw = random.Random(0)
    rows = defaultdict(list)
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 2000):
        steps, trials, pushed = fitted(draw)
        row = "6 or more" if steps > 5 else "4 or 5" if steps > 3 else str(steps)
        rows[row].append((pushed, len(trials), sum(t.verdict is Verdict.OUT_OF_MEMORY for t in trials)))
    print(f"{'micro-batches':14}  fits | samples / target: mean   p50   p95  above 3 | trials  max |  OOMs")
    for name in sorted(rows):
        pushed, trials, failures = zip(*rows[name], strict=True)
        middle = quantiles(pushed, n=20)
        print(
            f"{name:14} {len(pushed):5,} | {mean(pushed):22.2f} {middle[9]:5.2f} {middle[-1]:5.2f}"
            f" {mean(p > 3 for p in pushed):8.0%} | {mean(trials):6.2f} {max(trials):4} | {mean(failures):5.2f}"
        )


if __name__ == "__main__":
    main()
