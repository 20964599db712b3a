"""Train a small GPT on the text of Python's own manual, with a batch that does not fit in memory at once.

python examples/char_gpt.py
autobatch probe examples/char_gpt.py:workload --target 256 --memory-limit 2GiB
"""

from __future__ import annotations

import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autobatch

TARGET = 128  # samples behind each optimizer step
MEMORY = 256 * 1024**2  # bytes for the training; the whole target at once would need more
STEPS = 20
CONTEXT = 64  # characters that the model sees
WIDTH, HEADS, LAYERS = 128, 4, 2

TEXT = "\n".join(topics[name] for name in sorted(topics))
ALPHABET = sorted(set(TEXT))
TOKENS = torch.tensor([ALPHABET.index(character) for character in TEXT])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, _ = x.shape
        qkv = self.qkv(self.norm_1(x)).view(samples, tokens, 3, HEADS, WIDTH // HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (samples, heads, tokens, width of a head)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(samples, tokens, WIDTH))
        return x + self.mlp(self.norm_2(x))


class CharGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(ALPHABET), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(ALPHABET)))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.blocks(self.tokens(tokens) + self.positions(places)))


def sample_batch(samples: int) -> tuple[Tensor, Tensor]:
    """Pieces of the text, and the same pieces one character later: (samples, CONTEXT) each."""
    starts = torch.randint(len(TOKENS) - CONTEXT, (samples, 1))
    pieces = TOKENS[starts + torch.arange(CONTEXT + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def loss_fn(logits: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def workload() -> autobatch.Workload:
    """What `autobatch probe` trains."""
    return autobatch.Workload(CharGPT(), data=sample_batch, loss=loss_fn)


def memory_held() -> int:
    """Bytes of memory that Python and torch take in this process before there is any model."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


@torch.no_grad()
def write(model: nn.Module, start: str, length: int) -> str:
    """Let the model go on from `start`."""
    tokens = torch.tensor([[ALPHABET.index(character) for character in start]])
    for _ in range(length):
        odds = F.softmax(model(tokens[:, -CONTEXT:])[:, -1] / 0.5, dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(odds, 1)], dim=1)
    return "".join(ALPHABET[token] for token in tokens[0].tolist())


def main() -> None:
    torch.manual_seed(0)
    model = CharGPT()
    limit = memory_held() + MEMORY
    plan = autobatch.fit(model, TARGET, data=sample_batch, loss=loss_fn, device="cpu", memory_limit=limit)
    print(plan)

    stepper = plan.stepper(model, torch.optim.AdamW(model.parameters(), lr=3e-3), loss=loss_fn)
    started = time.perf_counter()
    for step in range(1, STEPS + 1):
        loss = float(stepper.step(sample_batch(plan.target_batch_size)))
        if step == 1 or step % 10 == 0:
            print(f"step {step:3}: loss {loss:.3f}, {time.perf_counter() - started:.1f} s")
    print(f"It writes: {write(model, 'The ', 80)!r}")


if __name__ == "__main__":
    main()
