"""Train a small CNN on scikit-learn's handwritten digits, with a batch that does not fit in memory at once.

pip install "torch-autobatch[examples]"
python examples/digits.py
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch

TARGET = 512  # samples behind each optimizer step
MEMORY = 256 * 1024**2  # bytes for the training; the whole target at once would need more
EPOCHS = 10


def memory_held() -> int:
    """Bytes of memory that Python and torch take in this process before there is any model."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def load_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, images and labels to test with."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) for x in split[:2])
    train_y, test_y = (torch.tensor(y) for y in split[2:])
    return train_x, train_y, test_x, test_y


def make_model(channels: int = 32) -> nn.Module:
    """A CNN for images of 1 × 8 × 8. It has GroupNorm, as BatchNorm would see each micro-batch for itself."""
    layers: list[nn.Module] = [nn.Upsample(scale_factor=2), nn.Conv2d(1, channels, 3, padding=1)]
    for _ in range(3):
        layers += [nn.GroupNorm(8, channels), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(channels * 16, 10))


def main() -> None:
    memory_limit = memory_held() + MEMORY  # measured before scikit-learn is loaded, which the trials do not need
    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = load_images()
    train = TensorDataset(train_x, train_y)

    model = make_model()
    plan = autobatch.fit(model, TARGET, data=train, loss=F.cross_entropy, device="cpu", memory_limit=memory_limit)
    print(plan)

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loader = DataLoader(train, batch_size=plan.target_batch_size, shuffle=True)
    started = time.perf_counter()
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for batch in loader:  # The last batch of an epoch is smaller; the plan splits that one exactly, too.
            for (x, y), weight in plan.split(batch):
                loss = F.cross_entropy(model(x), y) * weight
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
        print(f"epoch {epoch:2}: test accuracy {accuracy:.1%}, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
