"""Small reference workloads, always the same, by which devices can be compared: an MLP, a CNN and a transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch.precision import Precision
from autobatch.workload.workload import Workload

_CLASSES = 100
_VOCABULARY = 1024
_TOKENS = 128


@dataclass(frozen=True)
class Reference:
    """A reference workload, not yet built."""

    name: str
    description: str
    """The model and the shape of one sample."""
    build: Callable[[Precision], Workload]


def _mlp(precision: Precision) -> Workload:
    width = 1024
    hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(width, _CLASSES))
    return Workload(model, data=_vectors, loss=F.cross_entropy, precision=precision)


def _vectors(samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 1024), torch.randint(_CLASSES, (samples,))


class _Residual(nn.Module):
    """Two convolutions around which the input is added; `stride` halves the image."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.skip = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def _cnn(precision: Precision) -> Workload:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        _Residual(32, 32, stride=1),
        _Residual(32, 64, stride=2),
        _Residual(64, 128, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, _CLASSES),
    )
    return Workload(model, data=_images, loss=F.cross_entropy, precision=precision)


def _images(samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 3, 96, 96), torch.randint(_CLASSES, (samples,))


class _Decoder(nn.Module):
    """A decoder-only transformer over tokens: pre-norm, learned positions, causal attention."""

    def __init__(self, width: int = 256, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, width)
        self.positions = nn.Parameter(torch.zeros(_TOKENS, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, _VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(_TOKENS), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        # (samples, tokens, vocabulary) → (samples, vocabulary, tokens), as cross_entropy takes it
        return self.head(self.blocks(x, mask=self.mask, is_causal=True)).transpose(1, 2)


def _transformer(precision: Precision) -> Workload:
    return Workload(_Decoder(), data=_token_ids, loss=F.cross_entropy, precision=precision)


def _token_ids(samples: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(_VOCABULARY, (samples, _TOKENS + 1))
    return tokens[:, :-1], tokens[:, 1:]


REFERENCES = (
    Reference("mlp", "4 linear layers 1024 wide; vectors of 1024", _mlp),
    Reference("cnn", "3 residual blocks of up to 128 channels; images of 3 × 96 × 96", _cnn),
    Reference("transformer", "decoder of 2 layers 256 wide; 128 tokens of 1024 kinds", _transformer),
)
