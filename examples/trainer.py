"""Train a tiny Llama with transformers' Trainer, with a batch that does not fit in memory at once.

pip install "torch-autobatch[huggingface,accelerate]"
python examples/trainer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from autobatch.export import fit_trainer

TARGET = 128  # samples behind each optimizer step
MEMORY = 96 * 1024**2  # bytes for the training; the whole target at once would need more
STEPS = 6
LONGEST = 64  # characters in a sample

TEXT = "\n".join(topics[name] for name in sorted(topics))
ALPHABET = sorted(set(TEXT))
LINES = [line[:LONGEST] for line in TEXT.splitlines() if len(line) > 8]


def collate(lines: list[str]) -> dict[str, Tensor]:
    """Tokens and labels, (samples, longest) each. Lines are filled up on the right, with labels that do not count."""
    longest = max(map(len, lines))
    tokens = torch.zeros(len(lines), longest, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for row, line in enumerate(lines):
        tokens[row, : len(line)] = labels[row, : len(line)] = torch.tensor([ALPHABET.index(char) for char in line])
    return {"input_ids": tokens, "attention_mask": (labels != -100).long(), "labels": labels}


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def memory_held() -> int:
    """Bytes of memory that Python, torch and transformers take in this process before there is any model."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def main() -> None:
    torch.manual_seed(0)
    limit = memory_held() + MEMORY
    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {"learning_rate": 3e-3, "max_steps": STEPS, "logging_steps": 1}
        trainer = Trainer(
            model=make_model(),
            args=TrainingArguments(folder, use_cpu=True, report_to=[], save_strategy="no", **arguments),
            train_dataset=LINES,
            data_collator=collate,
        )
        print(fit_trainer(trainer, TARGET, device="cpu", memory_limit=limit))
        trainer.train()


if __name__ == "__main__":
    main()
