"""Small models as they were, and what people do to them: regressions of memory, and refactorings that are none."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autobatch import Workload

WIDTH, HEADS, LENGTH, WORDS = 64, 4, 128, 1000


@dataclass(frozen=True)
class Options:
    """What a regression or a refactoring changes."""

    keep_activations: bool = False
    checkpointing: bool = False
    softmax_in_fp32: bool = False
    mask_per_head: bool = False
    logits_in_fp32: bool = False
    tied: bool = True
    copy_inputs: bool = False
    hidden: int = 4 * WIDTH
    refactored: frozenset[str] = field(default_factory=frozenset)


class Attention(nn.Module):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        if "fields in another order" in options.refactored:
            self.out = nn.Linear(WIDTH, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        if "fields in another order" not in options.refactored:
            self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).tril().bool(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        options = self.options
        if "split for chunk" in options.refactored:
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).split(WIDTH, dim=-1))
        else:
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = self._scores(q, k) if "a helper method" in options.refactored else q @ k.mT / HEADS**0.5
        hidden = ~self.mask
        if options.mask_per_head:
            hidden = hidden.expand_as(scores).contiguous()
        scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.float().softmax(-1).to(q.dtype) if options.softmax_in_fp32 else soft_max(scores)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def _scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.mT / HEADS**0.5


class SoftMaxInItsOwnType(torch.autograd.Function):
    """As kernels of one's own do it: autocast would take softmax to fp32."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor:
        weights = torch.ops.aten._softmax(scores, -1, False)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (weights,) = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data(gradient, weights, -1, weights.dtype)


def soft_max(scores: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", enabled=False):
        return SoftMaxInItsOwnType.apply(scores)


class Mlp(nn.Module):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.up, self.act, self.down = nn.Linear(WIDTH, options.hidden), nn.ReLU(), nn.Linear(options.hidden, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "a function for a module" in self.options.refactored:
            return self.down(F.relu(self.up(x)))
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        name = "self_attention" if "another name" in options.refactored else "attention"
        setattr(self, name, Attention(options))
        self.mlp = Mlp(options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attention = getattr(self, "attention", None) or self.self_attention
        if "torch.add" in self.options.refactored:
            x = torch.add(x, attention(self.norm1(x)))
            return torch.add(x, self.mlp(self.norm2(x)))
        x = x + attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        blocks = [Block(options) for _ in range(3)]
        self.blocks = nn.Sequential(*blocks) if "a sequence" in options.refactored else nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if options.tied:
            self.head.weight = self.words.weight
        self.kept: list[torch.Tensor] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        if self.options.copy_inputs:
            self.seen = x.detach().clone()
        if "a sequence" in self.options.refactored:
            return self.head(self.blocks(x))
        for number, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self.options.checkpointing else block(x)
            if self.options.keep_activations and number == 1:
                self.kept.append(x)
        if "a name for a step" in self.options.refactored:
            features = x
            del x
            logits = self.head(features)
            return logits
        return self.head(x)


def tokens(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(WORDS, (n, LENGTH)), torch.randint(WORDS, (n, LENGTH))


def decoder(
    step: Callable[..., torch.Tensor] | None = None, optimizer: Any = torch.optim.AdamW, **options: Any
) -> Workload:
    chosen = Options(**options)

    def training_step(model: nn.Module, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        logits = model(inputs)
        if chosen.logits_in_fp32:
            logits = logits.float()
        return cross_entropy(logits, targets)

    return Workload(Decoder(chosen), tokens, training_step=step or training_step, optimizer=optimizer, precision="bf16")


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, **options: Any) -> torch.Tensor:
    """In the logits' own type, as fused kernels do it."""
    with torch.autocast("cuda", enabled=False):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **options)


def plain_step(model: nn.Module, batch: Any) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def step_with_a_pass_before(retain_graph: bool) -> Callable[..., torch.Tensor]:
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        before = cross_entropy(model(batch[0][: len(batch[0]) // 2]), batch[1][: len(batch[0]) // 2])
        before.backward(retain_graph=retain_graph)
        return plain_step(model, batch) + 0 * before.detach()

    return step


def step_that_logs(keep: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    metrics: list[torch.Tensor] = []

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        logits = model(batch[0])
        metrics.append(keep(cross_entropy(logits, batch[1], label_smoothing=0.1)))
        return cross_entropy(logits, batch[1])

    return step


def step_in_a_function(model: nn.Module, batch: Any) -> torch.Tensor:
    inputs, targets = batch

    def of(logits: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, targets)

    return of(model(inputs))


class Detector(nn.Module):
    """A head that is trained on the features of a frozen backbone."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(inplace), nn.AvgPool2d(4))
        self.backbone.requires_grad_(False)
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images)).mean((2, 3))


def detector(inplace: bool) -> Workload:
    def images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(n, 3, 64, 64), torch.randint(4, (n,))

    return Workload(Detector(inplace), images, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.AdamW)


def stack(*more: nn.Module) -> Workload:
    """Numbered layers, of which those after the third have other numbers where there are more."""
    widths = [3, 32, 32, 32, 32]
    layers: list[nn.Module] = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
    layers[3:3] = more
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    return Workload(
        model,
        lambda n: (torch.randn(n, 3, 32, 32), torch.randint(4, (n,))),
        nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW,
    )


@dataclass(frozen=True)
class Planted:
    """A change of a model, and what a check has to say about it."""

    before: Callable[[], Workload]
    after: Callable[[], Workload]
    module: str = ""
    """Whose the largest new bytes are, or those of a module in it; * stands for any number."""
    how: str = ""
    code: str = ""
    """What stands in the line that made them, or "" where no line did."""


def _decoder(**options: Any) -> Callable[[], Workload]:
    return lambda: decoder(**options)


BASE = _decoder()
RECOMPUTING = _decoder(checkpointing=True)


def cnn() -> Workload:
    return detector(inplace=False)


REGRESSIONS = {
    "an activation kept in a list": Planted(
        BASE, _decoder(keep_activations=True), "blocks.*", "left by the step before", "x + self.mlp"
    ),
    "checkpointing dropped": Planted(RECOMPUTING, BASE, "blocks.*.attention", "lives longer", "aten._softmax("),
    "softmax in fp32": Planted(
        BASE, _decoder(softmax_in_fp32=True), "blocks.*.attention", "larger", "scores.float().softmax(-1)"
    ),
    "an attention mask for each head": Planted(
        BASE, _decoder(mask_per_head=True), "blocks.*.attention", "more of them", "hidden.expand_as(scores)"
    ),
    "retain_graph": Planted(
        _decoder(step=step_with_a_pass_before(retain_graph=False)),
        _decoder(step=step_with_a_pass_before(retain_graph=True)),
        "blocks.*.attention",
        "lives longer",
        "aten._softmax(",
    ),
    "logits upcast for the loss": Planted(BASE, _decoder(logits_in_fp32=True), "", "larger", "F.cross_entropy("),
    "a loss kept with its graph": Planted(
        _decoder(step=step_that_logs(torch.Tensor.detach)),
        _decoder(step=step_that_logs(lambda loss: loss)),
        "",
        "left by the step before",
        "F.cross_entropy(",
    ),
    "Adam for SGD": Planted(
        _decoder(optimizer=lambda p: torch.optim.SGD(p, 0.1), hidden=64 * WIDTH),
        _decoder(optimizer=lambda p: torch.optim.Adam(p, 0.1), hidden=64 * WIDTH),
        "blocks.*.mlp.up",
        "new",
        "",
    ),
    "a head that is no longer tied": Planted(BASE, _decoder(tied=False), "head", "new", ""),
    "a ReLU no longer in place": Planted(lambda: detector(True), lambda: detector(False), "backbone.*", "new", ""),
    "a detached copy of the inputs": Planted(BASE, _decoder(copy_inputs=True), "", "new", "detach().clone()"),
    "a mask for each head in a module of another name": Planted(
        BASE,
        _decoder(mask_per_head=True, refactored=frozenset({"another name"})),
        "blocks.*.self_attention",
        "new",
        "hidden.expand_as(scores)",
    ),
    "an activation among numbered layers": Planted(lambda: stack(), lambda: stack(nn.GELU()), "3", "new", ""),
    "a wider hidden layer": Planted(BASE, _decoder(hidden=6 * WIDTH), "blocks.*.mlp", "larger", ""),
}

REFACTORINGS = {
    name: Planted(BASE, _decoder(refactored=frozenset({name})))
    for name in (
        "another name",
        "a helper method",
        "a function for a module",
        "split for chunk",
        "torch.add",
        "a sequence",
        "fields in another order",
        "a name for a step",
    )
} | {
    "the loss in a function of its own": Planted(BASE, _decoder(step=step_in_a_function)),
    "a loss kept as a number on the device": Planted(
        _decoder(step=step_that_logs(lambda loss: torch.zeros(()))), _decoder(step=step_that_logs(torch.Tensor.detach))
    ),
    "the optimizer by a function": Planted(
        BASE, _decoder(optimizer=lambda parameters: torch.optim.AdamW(list(parameters), lr=1e-4))
    ),
    "several at once": Planted(
        BASE,
        _decoder(refactored=frozenset({"another name", "a helper method", "split for chunk", "torch.add"})),
    ),
}
