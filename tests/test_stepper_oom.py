"""Running out of memory in the middle of training: for real, on the CPU, under a real limit."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

PROGRAM = """
import copy, json, resource, sys
sys.path.insert(0, {tests!r})
import torch
from torch import nn
from plans import plan_of

torch.manual_seed(0)
WIDE = 4096

class Net(nn.Module):
    '''Whose activations are far larger than its weights.'''
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(8, WIDE), nn.BatchNorm1d(WIDE), nn.Linear(WIDE, 1)

    def forward(self, x):
        return self.outer(self.norm(self.inner(x)).relu())

def limit_to(more):
    '''This many bytes more than there are now.'''
    taken = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (taken + more, resource.RLIM_INFINITY))

def unlimited():
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def batch_of(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=generator), torch.randn(n, 1, generator=generator)

model = Net()
"""


def run(program: str) -> str:
    source = PROGRAM.format(tests=str(Path(__file__).parent)) + textwrap.dedent(program)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_goes_on_and_ends_where_it_would_have():
    out = run(
        """
        import logging
        logging.basicConfig(stream=sys.stdout, format="logged: %(message)s")
        model.norm.eval()  # which looks at no other samples, so that sizes do not matter
        twin = copy.deepcopy(model)
        def training(model):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            return plan_of(2048, 1024).stepper(model, optimizer, loss=nn.MSELoss(), clip_grad_norm=1.0)
        ours, theirs = training(model), training(twin)
        losses = []
        for i in range(6):
            if i == 3:
                limit_to(44 << 20)  # 1024 samples take 16 MiB in each of three tensors and more
            losses.append(float(ours.step(batch_of(2048, i))))
        unlimited()
        for i in range(6):
            expected = float(theirs.step(batch_of(2048, i)))
            assert abs(losses[i] - expected) <= 1e-5 * abs(expected), (i, losses[i], expected)
        for a, b in zip(model.parameters(), twin.parameters()):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), (a - b).abs().max()
        assert theirs.events == []
        event = ours.events[0]
        assert (event.step, event.from_size, event.to_size, event.rank) == (3, 1024, 819, 0), event
        assert "allocate" in event.message, event
        print(len(ours.events), ours.micro_batch_sizes)
        """
    )
    *logged, last = out.splitlines()
    assert len(logged) == int(last.split()[0]) >= 1
    assert logged[0].startswith("logged: Memory ran out in optimizer step 3 with micro-batches of 1024 samples.")


def test_everything_is_as_the_step_found_it_when_it_runs_again():
    out = run(
        """
        import random
        seen = []
        def step(model, batch):
            n = len(batch[0])
            seen.append((n, torch.rand(1).item(), random.random(), model.norm.running_mean.sum().item(),
                         model.norm.num_batches_tracked.item(), model.inner.weight.grad is None))
            loss = nn.functional.mse_loss(model(batch[0]), batch[1])
            if n == 100 and len(seen) == 3:  # in the middle of the step's second micro-batch
                limit_to(64 << 20)
                try:
                    torch.empty(256 << 20)
                finally:
                    unlimited()
            return loss
        stepper = plan_of(300, 100).stepper(
            model, torch.optim.SGD(model.parameters(), lr=0.1), training_step=step, reduction="mean")
        stepper.step(batch_of(300, 0))
        print(stepper.micro_batch_sizes)
        print(seen[0][1:] == seen[3][1:], seen[0][0], seen[3][0])
        print(int(model.norm.num_batches_tracked), [e.to_size for e in stepper.events])
        """
    )
    assert out.splitlines() == ["(75, 75, 75, 75)", "True 100 75", "1 [80]"]


def test_with_nothing_smaller_left_it_is_an_error_and_nothing_changes():
    out = run(
        """
        from autobatch import NothingFits
        model.norm.eval()  # it could not normalise a single sample
        before = copy.deepcopy(model.state_dict())
        def step(model, batch):
            loss = nn.functional.mse_loss(model(batch[0]), batch[1])
            torch.empty(1 << 50)
            return loss
        stepper = plan_of(12, 5).stepper(
            model, torch.optim.SGD(model.parameters(), lr=0.1), training_step=step, reduction="mean")
        try:
            stepper.step(batch_of(12, 0))
        except NothingFits as error:
            print(error)
        print([event.to_size for event in stepper.events])
        print(all(torch.equal(before[name], value) for name, value in model.state_dict().items()))
        print(all(p.grad is None for p in model.parameters()))
        """
    )
    message, *rest = out.splitlines()
    assert message.startswith("memory ran out in optimizer step 0 with micro-batches of 1 sample, the smallest that")
    assert rest == ["[3, 2, 1]", "True", "True"]


def test_without_recovery_it_is_raised_as_it_is():
    out = run(
        """
        def step(model, batch):
            return model(batch[0]).mean() + torch.empty(1 << 50).mean()
        stepper = plan_of(12, 5).stepper(
            model, torch.optim.SGD(model.parameters()), training_step=step, reduction="mean", recover=False)
        try:
            stepper.step(batch_of(12, 0))
        except RuntimeError as error:
            print(str(error).splitlines()[0])
        """
    )
    assert "DefaultCPUAllocator" in out


def test_micro_batches_shrink_only_to_what_the_batch_can_be_cut_into():
    """Five samples in micro-batches of at least two are 3 + 2; at most two is none."""
    out = run(
        """
        from autobatch import NothingFits
        def step(model, batch):
            loss = nn.functional.mse_loss(model(batch[0]), batch[1])
            torch.empty(1 << 50)
            return loss
        stepper = plan_of(5, 5, min_micro_batch_size=2).stepper(
            model, torch.optim.SGD(model.parameters(), lr=0.1), training_step=step, reduction="mean")
        try:
            stepper.step(batch_of(5, 0))
        except NothingFits as error:
            print(str(error)[:79])
        print([event.to_size for event in stepper.events], int(model.norm.num_batches_tracked))
        """
    )
    said, events = out.splitlines()
    assert said == "memory ran out in optimizer step 0 with micro-batches of 3 samples, the smalles"
    assert events == "[4] 0"
