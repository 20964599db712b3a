"""Independent proof: what fits does train in a fresh process under the same limit, and clearly more does not."""

import subprocess
import sys
from functools import partial

import proof_models
import pytest
import torch

import autobatch

LIMITS = {"mlp": 1 << 30, "cnn": 1 << 30, "transformer": 3 << 29}
"""Bytes; so that the activations are large blocks (see proof_models.py)."""
STEPS = 10


def survives(kind, n):
    command = [sys.executable, proof_models.__file__, kind, n, STEPS, LIMITS[kind]]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "allocate memory" in done.stderr or done.returncode < 0, done.stderr
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer"])
def test_the_largest_micro_batch_trains_in_a_fresh_process_and_ten_per_cent_more_does_not(kind):
    plan = autobatch.fit(
        proof_models.MODELS[kind](),
        1_000_000,
        data=partial(proof_models.batch, kind),
        loss=torch.nn.functional.cross_entropy,
        device="cpu",
        memory_limit=LIMITS[kind],
        headroom=0,
        exact=True,
    )
    n = plan.max_micro_batch_size
    assert survives(kind, n)
    assert not survives(kind, n + max(1, n // 10))
