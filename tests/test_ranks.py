"""What ranks agree on, in real gloo processes on this machine."""

import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import warm

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
    with ThreadPoolExecutor() as together:
        return list(together.map(lambda rank: warm.run(source, str(rank)).stdout, range(2)))


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
