"""What `stepper.step` costs beside the same loop written by hand, as a ratio of times measured in turns in one run.

    python -m benchmarks.stepper [--rounds 200]

A small transformer, eight micro-batches, AdamW and clipping. The loop by hand knows how its loss adds up, and neither
notes what it would take to run a step again, nor counts anything.

In every round each is run twice, in the order A B B A, on the same model and optimizer (two would lie elsewhere in
memory, which may cost more than what is measured); a round gives one ratio. The time is that of the process on the CPU
(one thread, no garbage collection), which others on the machine do not take from it. Printed are the median of the
ratios and the interval that has it with 95 % confidence, by order statistics. Where caches are shared with others, a
step's time alone varies by more than is measured. So the same is done with a model that computes hardly anything, where
the difference is what the stepper adds, and given as a share of the real model's step.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from autobatch.plan import TrainingPlan
from autobatch.trial import DeviceInfo

TARGET, MICRO, LENGTH, VOCABULARY, WIDTH = 32, 4, 64, 512, 128


class Model(nn.Module):
    """Two layers over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.scores = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.scores(self.layers(self.embedding(tokens)))


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A mean over tokens."""
    return nn.functional.cross_entropy(model(batch[0]).transpose(1, 2), batch[1])


def hardly_any_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A mean over tokens of one parameter: what is left is what a step costs beside the model."""
    return model.scores.bias[batch[1]].mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="times that each is measured twice")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hand, ours = _times(device, loss_of, rounds)
    step = statistics.median(hand)
    low, middle, high = _median([b / a for a, b in zip(hand, ours, strict=True)])
    print(f"by hand: {step * 1e3:.1f} ms a step on {device}, {TARGET // MICRO} micro-batches")
    print(f"stepper.step / by hand: {middle:.4f} (95 %: {low:.4f} to {high:.4f}; {rounds} rounds)")
    hand, ours = _times(device, hardly_any_loss, rounds)
    low, middle, high = (1 + more / step for more in _median([b - a for a, b in zip(hand, ours, strict=True)]))
    print(f"by what it adds where the model does nothing: {middle:.4f} (95 %: {low:.4f} to {high:.4f})")


def _times(device: str, loss_of: Callable[..., torch.Tensor], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a step by hand, and of the stepper's, for each round."""
    model = Model().to(device)
    tokens = torch.randint(VOCABULARY, (TARGET, LENGTH + 1), device=device)
    batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    optimizer = torch.optim.AdamW(model.parameters())
    stepper = _plan(device).stepper(model, optimizer, training_step=loss_of, clip_grad_norm=1.0)

    def by_hand() -> float:
        total = torch.zeros((), device=device)
        for x, y in zip(batch[0].split(MICRO), batch[1].split(MICRO), strict=True):
            loss = loss_of(model, (x, y)) * (MICRO / TARGET)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    def by_stepper() -> float:
        return float(stepper.step(batch))

    for _ in range(3):  # the optimizer's state, and what the loss is
        by_hand(), by_stepper()
    clock = time.perf_counter if device == "cuda" else time.process_time
    hand, ours = [], []
    gc.disable()
    for i in range(rounds):
        first, second = (by_hand, by_stepper) if i % 2 else (by_stepper, by_hand)
        took = {by_hand: 0.0, by_stepper: 0.0}
        for step in (first, second, second, first):
            took[step] += _seconds(step, clock) / 2
        gc.collect()
        hand.append(took[by_hand])
        ours.append(took[by_stepper])
    return hand, ours


def _seconds(step: Callable[[], float], clock: Callable[[], float]) -> float:
    started = clock()
    step()
    return clock() - started


def _median(values: list[float]) -> tuple[float, float, float]:
    """The median, between the bounds that have it with 95 % confidence, whatever the distribution."""
    ordered, half = sorted(values), 0.98 * math.sqrt(len(values))
    last = len(ordered) - 1
    low, high = max(0, math.floor(last / 2 - half)), min(last, math.ceil(last / 2 + half))
    return ordered[low], statistics.median(ordered), ordered[high]


def _plan(device: str) -> TrainingPlan:
    return TrainingPlan(
        target_batch_size=TARGET,
        micro_batch_sizes=(MICRO,) * (TARGET // MICRO),
        max_micro_batch_size=MICRO,
        peak_bytes=1,
        limit_bytes=2,
        budget_bytes=2,
        headroom=0.0,
        verified=False,
        batch_dims={"0": 0, "1": 0},
        device=DeviceInfo(type=device, name=device, total_bytes=2),
    )


if __name__ == "__main__":
    main()
