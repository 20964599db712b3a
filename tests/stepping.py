"""A model, batches and losses for tests of optimizer steps."""

import torch
from torch import nn
from torch.nn import functional as F


class Tagger(nn.Module):
    """Scores for every token of padded texts."""

    def __init__(self, classes=7):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.scores = nn.Linear(6, classes)

    def forward(self, tokens):
        return self.scores(self.embedding(tokens).tanh().cumsum(1))


def texts(n, length=5, seed=0):
    """Tokens, and labels of which each text has another number."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (n, length), generator=generator)
    labels = torch.randint(7, (n, length), generator=generator)
    filled = torch.randint(1, length + 1, (n, 1), generator=generator)
    return {"tokens": tokens, "labels": labels.masked_fill(torch.arange(length) >= filled, -100)}


def micro_texts(samples, size, seed=0):
    whole = texts(samples, seed=seed)
    return whole, [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, samples, size)]


def token_mean(model, batch):
    return F.cross_entropy(model(batch["tokens"]).transpose(1, 2), batch["labels"])


def token_sum(model, batch):
    return F.cross_entropy(model(batch["tokens"]).transpose(1, 2), batch["labels"], reduction="sum")


def shifted_mean(model, batch):
    return F.cross_entropy(model(batch["tokens"])[:, :-1].transpose(1, 2), batch["labels"][:, 1:])


def sample_mean(model, batch):
    return model(batch["tokens"]).square().mean()


def padding_mean(model, batch):
    """A mean over tokens that are no padding, which is 0."""
    real = batch["tokens"] != 0
    return (model(batch["tokens"]).square().mean(-1) * real).sum() / real.sum()


STEPS = [token_mean, token_sum, shifted_mean, sample_mean, padding_mean]


def gradients_of(model, step, batch):
    model.zero_grad()
    step(model, batch).backward()
    return [p.grad.clone() for p in model.parameters()]


class Kept(torch.optim.SGD):
    """Remembers the gradients that it was stepped with."""

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def distance(ours, theirs):
    ours, theirs = (torch.cat([t.detach().flatten() for t in tensors]) for tensors in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())
