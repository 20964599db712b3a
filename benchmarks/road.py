"""What the road costs beside the steps it runs: `python -m benchmarks.road`.

For small real models under a limit: seconds that `fit` spends outside its trials (start of the child process included),
trials, failures, and samples pushed through the model against the samples of one optimizer step. Then the start-up of
the package and of the command line, against Python's own in the same run.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import autobatch

REPEATS = 5


def mlp() -> nn.Module:
    layers = [layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.GELU())]
    return nn.Sequential(nn.Linear(256, 1024), *layers, nn.Linear(1024, 10))


def cnn() -> nn.Module:
    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    return nn.Sequential(
        block(3, 16), block(16, 32), nn.MaxPool2d(2), block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(128, 1000)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(tokens)))


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 64, 64)


CASES: list[tuple[str, Callable[[], nn.Module], int, dict[str, object]]] = [
    ("MLP, all fits", mlp, 256, {}),
    ("MLP, 768 MiB", mlp, 8192, {"memory_limit": "768MiB"}),
    ("CNN, all fits", cnn, 32, {"data": images}),
    ("CNN, 768 MiB", cnn, 256, {"data": images, "memory_limit": "768MiB"}),
    ("transformer, 1 GiB", Transformer, 256, {"memory_limit": "1GiB"}),
]


def main() -> None:
    autobatch.fit(nn.Linear(2, 1), 2, device="cpu")  # imports, once
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'case':20} {'plan':>16} {'trials':>6} {'failed':>6} {'outside steps':>13} {'samples / one step':>18}")
    for name, make, target, arguments in CASES:
        model = make()
        began = time.perf_counter()
        plan = autobatch.fit(model, target, device="cpu", **arguments)  # type: ignore[arg-type]
        outside = time.perf_counter() - began - sum(trial.seconds for trial in plan.trials)
        samples = sum(trial.samples for trial in plan.trials) / target
        failed = sum(not trial.fits for trial in plan.trials)
        sizes = f"{plan.accumulation_steps} x {plan.micro_batch_size}"
        print(f"{name:20} {sizes:>16} {len(plan.trials):>6} {failed:>6} {outside:>11.1f} s {samples:>18.2f}")
    python = seconds_of("-c", "pass")
    print(f"\n{'start-up':28} {'seconds':>8} {'/ python':>9}")
    for label, command in {
        "python -c pass": ["-c", "pass"],
        "python -c 'import autobatch'": ["-c", "import autobatch"],
        "autobatch --help": ["-m", "autobatch", "--help"],
        "python -c 'import torch'": ["-c", "import torch"],
    }.items():
        taken = seconds_of(*command)
        print(f"{label:28} {taken:>8.2f} {taken / python:>9.1f}")


def seconds_of(*arguments: str) -> float:
    """The median wall time of a Python process, in seconds."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
