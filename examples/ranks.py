"""Train on several processes that share one batch, each with the memory that it has.

torchrun --nproc-per-node 2 examples/ranks.py
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import autobatch

TARGET = 1001  # samples behind each optimizer step, over all processes: no multiple of them
STEPS = 60


def sample_batch(samples: int) -> tuple[Tensor, Tensor]:
    """Points (samples, 2) on three arms of a spiral, and which arm each is on."""
    arms, along = torch.randint(3, (samples,)), torch.rand(samples)
    angles = 4 * along + 2 * math.pi / 3 * arms + 0.1 * torch.randn(samples)
    return torch.stack([along * angles.cos(), along * angles.sin()], dim=1), arms


def main() -> None:
    dist.init_process_group("gloo")  # "nccl" where each process has a GPU
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 3))

    # Every process tries its own device, and all end with the same answer.
    plan = autobatch.fit(
        model, TARGET, data=sample_batch, loss=F.cross_entropy, device="cpu", max_micro_batch=200, memory_limit="2GiB"
    )
    if rank == 0:
        print(plan)

    wrapped = DistributedDataParallel(model)
    stepper = plan.stepper(wrapped, torch.optim.AdamW(model.parameters(), lr=3e-3), loss=F.cross_entropy)
    torch.manual_seed(1 + rank)  # other samples on each process
    for step in range(1, STEPS + 1):
        result = stepper.step(sample_batch(sum(plan.micro_batch_sizes)))
        if rank == 0 and step % 20 == 0:
            print(f"step {step:3}: loss {float(result):.3f} over {TARGET} samples")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
