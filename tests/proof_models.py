"""Three small models for test_proof.py, and a process that does nothing but train one of them under a limit.

Most of their activations are larger than 32 MiB at the sizes in question (the transformer's are 20 and 80 MiB). Smaller
blocks come from glibc's heap, and then the same steps peak up to a tenth apart from one process to the next, so that
nobody could say where the edge is.
"""

import resource
import sys

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """`x + block(x)`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Transformer(nn.Module):
    """An encoder of one layer, a quarter as wide as its 256 tokens, and a classifier of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        layer = nn.TransformerEncoderLayer(64, 1, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def mlp() -> nn.Module:
    block = Residual(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU())
    return nn.Sequential(block, nn.AdaptiveAvgPool2d((1, 64)), nn.Flatten(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    block = Residual(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def batch(kind: str, n: int) -> tuple[Tensor, Tensor]:
    """(inputs, classes) of n samples."""
    inputs = {
        "mlp": lambda: torch.randn(n, 64, 64),
        "cnn": lambda: torch.randn(n, 3, 64, 64),
        "transformer": lambda: torch.randint(0, 100, (n, 256)),
    }
    return inputs[kind](), torch.randint(0, 10, (n,))


MODELS = {"mlp": mlp, "cnn": cnn, "transformer": Transformer}


def train(kind: str, n: int, steps: int, limit_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    model = MODELS[kind]()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        for _ in range(2):
            inputs, classes = batch(kind, n)
            (nn.functional.cross_entropy(model(inputs), classes) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    train(sys.argv[1], *map(int, sys.argv[2:]))
