"""Train a small CNN with Lightning, with a batch that does not fit in memory at once.

pip install "torch-autobatch[lightning]"
python examples/lightning_module.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autobatch.export import AccumulateToTarget

TARGET = 256  # samples behind each optimizer step
MEMORY = 96 * 1024**2  # bytes for the training; the whole target at once would need more
STEPS = 8
CLASSES = 4


def stripes(samples: int) -> TensorDataset:
    """Images of 1 × 16 × 16 with stripes in one of four directions, under noise, and which direction it is."""
    directions = torch.randint(CLASSES, (samples,))
    angles = directions * torch.pi / CLASSES
    places = torch.arange(16.0)
    along = places * torch.cos(angles)[:, None, None] + places[:, None] * torch.sin(angles)[:, None, None]
    return TensorDataset((torch.sin(along) + 0.5 * torch.randn_like(along))[:, None], directions)


class StripesClassifier(LightningModule):  # type: ignore[misc]
    def __init__(self, batch_size: int = 1, channels: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, padding=1), nn.GELU()]
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.GELU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))
        self.dataset = stripes(STEPS * TARGET)

    def training_step(self, batch: Any, index: int) -> Tensor:
        images, directions = batch
        loss = F.cross_entropy(self.net(images), directions)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=self.hparams["batch_size"], shuffle=True)


def memory_held() -> int:
    """Bytes of memory that Python, torch and Lightning take in this process before there is any model."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def main() -> None:
    torch.manual_seed(0)
    find = AccumulateToTarget(TARGET, memory_limit=memory_held() + MEMORY)
    module = StripesClassifier()
    trainer = Trainer(
        callbacks=[find],
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module)
    print(find.plan)
    images, directions = stripes(512).tensors
    with torch.no_grad():
        accuracy = (module.net(images).argmax(1) == directions).float().mean().item()
    print(f"{trainer.global_step} optimizer steps: accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
