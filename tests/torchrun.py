"""Runs pieces of tests on several ranks: real gloo processes, started by torchrun."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

PREAMBLE = """
import datetime, os, sys
sys.path.insert(0, {tests!r})
import torch
import torch.distributed as dist
{imports}
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds={timeout}))
rank, ranks = dist.get_rank(), dist.get_world_size()
"""

LAST = """
import os
out.close()
dist.destroy_process_group()
os._exit(0)  # gloo's threads are sometimes not joined where the interpreter ends, which then aborts
"""


def torchrun(
    folder: Path, count: int, imports: str = "", timeout: float = 1800, **programs: str
) -> dict[str, list[str]]:
    """Run programs one after another on `count` ranks, which wait for one another so many seconds.

    Returns:
        What each of them wrote to the file `out`, by its name and by rank.
    """
    source = PREAMBLE.format(tests=str(Path(__file__).parent), imports=textwrap.dedent(imports), timeout=timeout)
    for name, program in programs.items():
        source += f"\nout = open(f'{folder}/{name}{{rank}}', 'w', buffering=1)\n" + textwrap.dedent(program)
    script = folder / "program.py"
    script.write_text(source + LAST)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        str(script),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return {name: [(folder / f"{name}{rank}").read_text().strip() for rank in range(count)] for name in programs}
