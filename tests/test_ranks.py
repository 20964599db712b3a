"""What ranks agree on, in real gloo processes on this machine."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

PREAMBLE = """
import sys; sys.path.insert(0, {tests!r})
import torch.distributed as dist
from test_fit import *
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{folder}/store", rank=rank, world_size=2)
"""


def two_ranks(folder: Path, program: str) -> list[str]:
    """Run a program on two ranks and give what each printed."""
    source = PREAMBLE.format(tests=str(Path(__file__).parent), folder=folder) + textwrap.dedent(program)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", source, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    try:
        return [rank.communicate(timeout=150)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def test_a_rank_with_less_memory_decides_for_all(tmp_path):
    first, second = two_ranks(
        tmp_path,
        """
        plan = fit_wide(target=101, memory_limit="600MiB" if rank else "900MiB")
        print(plan.world_size, plan.rank, plan.max_micro_batch_size, sum(plan.micro_batch_sizes), plan.verified)
        """,
    )
    assert first.split()[:2] == ["2", "0"]
    assert second.split()[:2] == ["2", "1"]
    assert first.split()[2] == second.split()[2]
    assert int(first.split()[3]) + int(second.split()[3]) == 101
    assert first.split()[4] == second.split()[4] == "True"


def test_a_rank_that_fails_ends_all_with_its_reason(tmp_path):
    first, second = two_ranks(
        tmp_path,
        """
        def step(model, batch):
            if rank == 1:
                raise LookupError("on this rank only")
            return model(batch[0]).mean()
        try:
            fit_wide(target=8, loss=None, training_step=step)
        except Exception as error:
            print(type(error).__name__, error)
        """,
    )
    assert first.strip() == "RankFailed rank 1 failed: LookupError: on this rank only"
    assert second.strip() == "LookupError on this rank only"


def test_with_world_size_given_one_rank_may_ask_alone(tmp_path):
    first, second = two_ranks(
        tmp_path,
        """
        if rank == 0:
            print(fit_wide(target=10, world_size=5).micro_batch_sizes)
        """,
    )
    assert first.strip() == "(2,)"
    assert second == ""


def test_unequal_ranks_have_unequal_parts_that_add_up(tmp_path):
    first, second = two_ranks(
        tmp_path,
        """
        import json, time
        def step(model, batch):
            if rank == 1:
                time.sleep(0.002 * len(batch[0]))  # a slower device
            return model(batch[0]).square().mean()
        plan = fit_wide(
            target=301, loss=None, training_step=step, per_rank=True, memory_limit="900MiB" if rank else "600MiB")
        plans = [plan.for_rank(r) for r in range(2)]
        assert plans[rank].micro_batch_sizes == plan.micro_batch_sizes
        print(json.dumps({
            "parts": [share.samples for share in plan.rank_shares],
            "largest": [share.max_micro_batch_size for share in plan.rank_shares],
            "micro-batches": [p.micro_batch_sizes for p in plans],
            "verified": plan.verified,
        }))
        """,
    )
    assert first == second
    said = json.loads(first)
    assert said["verified"]
    assert said["largest"][0] < said["largest"][1]
    assert said["parts"][0] > said["parts"][1]
    assert [sum(sizes) for sizes in said["micro-batches"]] == said["parts"]
    assert sum(said["parts"]) == 301


def test_a_rank_that_never_comes_is_named(tmp_path):
    first, _ = two_ranks(
        tmp_path,
        """
        import os, time
        if rank == 1:
            dist.new_group(backend="gloo")
            os._exit(0)
        started = time.monotonic()
        try:
            fit_wide(target=8)
        except Exception as error:
            print(type(error).__name__, str(error)[:20], time.monotonic() - started < 60)
        """,
    )
    assert first.strip() == "RankFailed rank 1 is missing: t True"
