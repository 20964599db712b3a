"""Inputs guessed from a model's first layers, in the order of their registration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autobatch.workload.calls import forward_of
from autobatch.workload.tensors import RandomTensor

IMAGE_SIZES = (224, 32, 28, 64, 128, 256, 96, 84, 48, 299, 384, 512, 16)
SIGNAL_SIZES = (1024, 128, 256, 512, 64, 100, 1000, 32, 28, 187, 50, 16, 4096, 16000)
VOLUME_SIZES = ((16, 112, 112), (32, 32, 32), (16, 64, 64), (64, 64, 64), (8, 32, 32), (16, 16, 16), (16, 224, 224))
SEQUENCE_SIZES = (128, 64, 256, 512, 32, 100, 50, 16, 8, 197, 10)
MAX_LAYERS = 6
"""Layers looked at, at most."""

_CONVOLUTIONS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Guess:
    """Inputs that a model's forward may take."""

    parts: Any
    """A RandomTensor, a tuple of several arguments, or a mapping by name."""
    why: str
    """Where the guess is from, to follow "Inputs assumed: ...,"."""
    tokens: bool = False
    """The inputs are token ids."""


def guesses_from_layers(model: nn.Module) -> Iterator[Guess]:
    """Guesses from the first layers, likeliest first. Nothing is run."""
    layers = list(itertools.islice(_input_layers(model), MAX_LAYERS))
    required = forward_of(model).required or ("x",)
    guesses = [list(_layer_guesses(model, name, layer)) for name, layer in layers]
    if len(required) == 1:
        yield from itertools.chain.from_iterable(guesses)
    elif guesses:
        yield from _several(required, guesses)


def float_dtype(model: nn.Module) -> torch.dtype:
    """The floating point type that the model's parameters have."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence that the model's tables of position embeddings allow. Fake tensors cannot find this out: an
    index out of range has a valid shape."""
    tables = (
        layer.num_embeddings - (0 if layer.padding_idx is None else layer.padding_idx + 1)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Embedding) and ("pos" in name.lower() or "wpe" in name.lower())
    )
    return min(tables, default=None)


def _input_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Layers whose type says what they take. What is inside such a layer is not looked at."""
    known = (
        nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
        nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.Transformer, nn.LayerNorm, *_CONVOLUTIONS,
    )  # fmt: skip
    if isinstance(module, known):
        yield prefix or type(module).__name__, module
        return
    for name, child in module.named_children():
        yield from _input_layers(child, f"{prefix}.{name}" if prefix else name)


def _layer_guesses(model: nn.Module, name: str, layer: nn.Module) -> Iterator[Guess]:
    dtype = float_dtype(model)
    tokens = isinstance(layer, (nn.Embedding, nn.EmbeddingBag))
    for tensor, facts in _layer_inputs(model, layer):
        yield Guess(tensor.to(dtype), f"from the layer {name} ({type(layer).__name__} with {facts})", tokens)


def _layer_inputs(model: nn.Module, layer: nn.Module) -> Iterator[tuple[RandomTensor, str]]:
    if isinstance(layer, (nn.Linear, nn.Bilinear)):
        features = _number(layer, "in_features", "in1_features")
        yield RandomTensor((features,)), f"{features} features"
        for length in SEQUENCE_SIZES:
            yield RandomTensor((length, features)), f"{features} features"
    elif isinstance(layer, nn.LayerNorm):
        yield RandomTensor(tuple(layer.normalized_shape)), f"shape {tuple(layer.normalized_shape)}"
        yield RandomTensor((SEQUENCE_SIZES[0], *layer.normalized_shape)), f"shape {tuple(layer.normalized_shape)}"
    elif isinstance(layer, _CONVOLUTIONS):
        yield from _spatial_inputs(layer)
    elif isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        facts = f"{layer.num_embeddings} ids"
        longest = max_positions(model)
        for length in dict.fromkeys(min(length, longest or length) for length in SEQUENCE_SIZES):
            yield RandomTensor((length,), torch.long, high=layer.num_embeddings), facts
        yield RandomTensor((), torch.long, high=layer.num_embeddings), facts
    elif isinstance(layer, nn.RNNCellBase):
        yield RandomTensor((layer.input_size,)), f"{layer.input_size} features"
    else:
        features, batch_first = _sequence_facts(layer)
        facts = f"{features} features, batch_first={batch_first}"
        for length in SEQUENCE_SIZES:
            yield RandomTensor((length, features), batch_dim=0 if batch_first else 1), facts
        for length in SEQUENCE_SIZES:
            yield RandomTensor((length, features), batch_dim=1 if batch_first else 0), facts


def _spatial_inputs(layer: nn.Module) -> Iterator[tuple[RandomTensor, str]]:
    channels = _number(layer, "in_channels", "num_features")
    facts = f"{channels} channels"
    kind = type(layer).__name__
    if "3d" in kind:
        sizes: tuple[tuple[int, ...], ...] = VOLUME_SIZES
    elif "2d" in kind:
        sizes = tuple((size, size) for size in IMAGE_SIZES)
    else:
        sizes = tuple((size,) for size in SIGNAL_SIZES)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            yield RandomTensor((channels,)), facts
    for size in sizes:
        yield RandomTensor((channels, *size)), facts


def _number(layer: Any, *names: str) -> int:
    """The first of these attributes that the layer has."""
    return next(int(getattr(layer, name)) for name in names if hasattr(layer, name))


def _sequence_facts(layer: Any) -> tuple[int, bool]:
    if isinstance(layer, nn.RNNBase):
        return layer.input_size, layer.batch_first
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim, layer.batch_first
    if isinstance(layer, nn.Transformer):
        return layer.d_model, layer.batch_first
    return layer.self_attn.embed_dim, layer.self_attn.batch_first


def _several(required: tuple[str, ...], guesses: list[list[Guess]]) -> Iterator[Guess]:
    """Guesses for several required arguments: each from a layer of its own, all alike, or known by its name."""
    table = guesses[0][0]
    if required[1:] == ("offsets",):
        ids = replace(table.parts, flat=True)
        yield Guess((ids, RandomTensor((), torch.long, step=ids.shape[0])), table.why, table.tokens)
    open_names = [name for name in required if _by_name(name, table) is None]
    for variant in range(max(map(len, guesses))):
        choices = [layer[min(variant, len(layer) - 1)] for layer in guesses]
        orders = [tuple(choices[: len(open_names)]), (choices[0],) * len(open_names)]
        orders += list(itertools.permutations(choices, len(open_names)))
        for order in dict.fromkeys(order for order in orders if len(order) == len(open_names)):
            yield _joined(required, open_names, order, choices[0])


def _joined(required: tuple[str, ...], open_names: list[str], order: tuple[Guess, ...], first: Guess) -> Guess:
    chosen = dict(zip(open_names, order, strict=True))
    base = order[0] if order else first
    parts = tuple(chosen[name].parts if name in chosen else _by_name(name, base) for name in required)
    why = "; ".join(dict.fromkeys(guess.why for guess in order)) or first.why
    return Guess(parts, why, tokens=any(guess.tokens for guess in order))


def _by_name(name: str, base: Guess) -> RandomTensor | None:
    """What an argument with a telling name takes, next to an input like `base`."""
    length = base.parts.shape[:1]
    if "mask" in name:
        return RandomTensor(length, torch.bool, constant=1)
    if "length" in name or name.endswith("_len"):
        return RandomTensor((), torch.long, constant=length[0] if length else 1)
    if name in ("t", "timestep", "timesteps", "time", "sigma"):
        return RandomTensor((), torch.long, high=1000)
    return None
