"""Inputs and labels of Hugging Face models, from their config and the arguments of their forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.workload.calls import forward_of
from autobatch.workload.layers import Guess, float_dtype, max_positions
from autobatch.workload.tensors import RandomTensor

MAX_TOKENS = 512
DEFAULT_IMAGE_SIZE = 224
AUDIO_SAMPLES = 16_000
"""One second at the usual rate."""
VIDEO_FRAMES = 16


def is_huggingface(model: nn.Module) -> bool:
    """Whether this is a transformers model, or an adapter around one."""
    return hasattr(getattr(model, "config", None), "model_type")


def guesses_from_config(model: nn.Module) -> Iterator[Guess]:
    """All the inputs that the forward takes, then text, images and audio each alone; no labels yet."""
    config: Any = model.config
    names = forward_of(model).names
    text, image, audio = _text(model, config, names), _image(config, names), _audio(config, names)
    decoder = _decoder(config, names) if getattr(config, "is_encoder_decoder", False) else {}
    sources = [parts for parts in (text, image, audio) if parts]
    why = f"from the configuration of {type(model).__name__}"
    for chosen in ([sources] if len(sources) > 1 else []) + [[parts] for parts in sources]:
        parts = {name: part for source in (*chosen, decoder) for name, part in source.items()}
        if len(chosen) > 1 and "return_loss" in names:
            parts["return_loss"] = True
        dtype = float_dtype(model)
        parts = {name: part.to(dtype) if isinstance(part, RandomTensor) else part for name, part in parts.items()}
        yield Guess(parts, why, tokens=(bool(text) and text.items() <= parts.items()) or bool(decoder))
        if "pixel_values" in parts:  # video models take several images
            channels, *size = parts["pixel_values"].shape
            frames = getattr(config, "num_frames", VIDEO_FRAMES)
            yield Guess({**parts, "pixel_values": RandomTensor((frames, channels, *size), dtype)}, why)


def labelled(model: nn.Module, guess: Guess, output: Any) -> Iterator[Guess]:
    """The guess with labels that fit the model's outputs, likeliest first.

    Args:
        output: what the model returned (on fake tensors) for two samples of `guess`, or None where that is not known.
    """
    names = forward_of(model).names
    parts = {name: part for name, part in guess.parts.items() if not name.startswith("decoder_")}
    if "start_positions" in names and isinstance(_field(output, "start_logits"), Tensor):
        position = RandomTensor((), torch.long, high=_field(output, "start_logits").shape[-1])
        yield replace(guess, parts={**parts, "start_positions": position, "end_positions": position})
    if "labels" not in names:
        return
    scores = _field(output, "logits")
    scores = _field(output, "prediction_logits") if scores is None else scores
    if not isinstance(scores, Tensor):
        if output is None and type(model).__name__.endswith("Classification") and hasattr(model.config, "num_labels"):
            config: Any = model.config
            yield replace(guess, parts={**parts, "labels": RandomTensor((), torch.long, high=config.num_labels)})
        return
    for labels in _labels(model, parts, tuple(scores.shape)):
        extra = {}
        if "next_sentence_label" in names:
            extra["next_sentence_label"] = RandomTensor((), torch.long, high=2)
        yield replace(guess, parts={**parts, "labels": labels, **extra})


def _labels(model: nn.Module, parts: dict[str, Any], scores: tuple[int, ...]) -> Iterator[RandomTensor]:
    inner, classes = scores[1:-1], scores[-1]
    if "CTC" in type(model).__name__:  # a transcript must be shorter than the audio, repeated letters counted twice
        yield RandomTensor((max(1, inner[0] // 4),), torch.long, high=classes)
        return
    if len(scores) == 4 and "pixel_values" in parts:  # (n, classes, height, width)
        yield RandomTensor(parts["pixel_values"].shape[-2:], torch.long, high=scores[1])
    if classes == 1:
        yield RandomTensor(inner, float_dtype(model))
        yield RandomTensor(scores[1:], float_dtype(model))
    yield RandomTensor(inner, torch.long, high=classes)
    if "input_ids" in parts:
        yield RandomTensor(parts["input_ids"].shape, torch.long, high=classes)
    yield RandomTensor(scores[1:], float_dtype(model))


def _text(model: nn.Module, config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    config = _sub(config, "text_config", "vocab_size")
    if "input_ids" not in names or not getattr(config, "vocab_size", None):
        return {}
    longest = _longest(config, "max_position_embeddings", "n_positions", "max_source_positions")
    longest = min(longest, max_positions(model) or longest)
    end = getattr(config, "eos_token_id", None)
    end = end if isinstance(end, int) and 0 <= end < config.vocab_size else None
    shape = (4, min(longest, 128)) if "MultipleChoice" in type(model).__name__ else (longest,)
    parts: dict[str, Any] = {"input_ids": RandomTensor(shape, torch.long, high=config.vocab_size, last=end)}
    if "attention_mask" in names:
        parts["attention_mask"] = RandomTensor(shape, torch.long, constant=1)
    return parts


def _image(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if "pixel_values" not in names:
        return {}
    config = _sub(config, "vision_config", "image_size")
    size = getattr(config, "image_size", None) or DEFAULT_IMAGE_SIZE
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {"pixel_values": RandomTensor((getattr(config, "num_channels", 3), height, width))}


def _audio(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if "input_features" in names:
        config = _sub(config, "audio_config", "num_mel_bins")
        bins: Any = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 80)
        frames = getattr(config, "max_source_positions", None)
        if "attention_mask" in names and not getattr(config, "is_encoder_decoder", False) and frames is None:
            return {"input_features": RandomTensor((MAX_TOKENS, bins))}
        return {"input_features": RandomTensor((bins, 2 * (frames or 1500)))}  # Whisper halves the frames
    return {"input_values": RandomTensor((AUDIO_SAMPLES,))} if "input_values" in names else {}


def _decoder(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    config = _sub(config, "decoder", "vocab_size")
    if "decoder_input_ids" not in names or not getattr(config, "vocab_size", None):
        return {}
    longest = _longest(config, "max_target_positions", "max_position_embeddings", "n_positions")
    return {"decoder_input_ids": RandomTensor((longest,), torch.long, high=config.vocab_size)}


def _longest(config: Any, *names: str) -> int:
    """Tokens in a sequence: as many as the configuration allows, but not more than MAX_TOKENS."""
    limits = (getattr(config, name, None) for name in names)
    return min([MAX_TOKENS, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])


def _sub(config: Any, name: str, fact: str) -> Any:
    """The part of a configuration that has `fact`: a sub-configuration where there is one."""
    part = getattr(config, name, None)
    return part if hasattr(part, fact) else config


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
