"""The examples do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ACCUMULATES = re.compile(r"Training plan: .*(×|\+).* = \d+ samples")


def printed_by(code: str) -> str:
    """What an example prints in a process of its own, as its memory limit starts from what its process holds."""
    folder = Path(__file__).parents[1] / "examples"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_digits_needs_accumulation_and_learns() -> None:
    printed = printed_by("import digits; digits.EPOCHS = 3; digits.main()")
    assert ACCUMULATES.search(printed)
    assert float(re.findall(r"test accuracy ([\d.]+)%", printed)[-1]) > 85


def test_char_gpt_needs_accumulation_and_learns() -> None:
    printed = printed_by("import char_gpt; char_gpt.STEPS = 10; char_gpt.main()")
    assert ACCUMULATES.search(printed)
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", printed))
    assert last < first - 0.5


def test_ranks_share_a_target_that_they_do_not_divide_and_learn() -> None:
    program = Path(__file__).parents[1] / "examples" / "ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "501 samples per optimizer step on rank 0; 1001 over 2 ranks" in done.stdout
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+) over 1001 samples", done.stdout)]
    assert len(losses) == 3
    assert losses[-1] < 0.5


# transformers imports torchvision, which has no operators for a CPU build of torch but those that the tests make.
TORCHVISION = "import sys; sys.path.append('../tests'); import conftest; "


def test_the_trainer_accumulates_and_learns() -> None:
    printed = printed_by(TORCHVISION + "import trainer; trainer.main()")
    assert ACCUMULATES.search(printed)
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.3


def test_the_lightning_module_accumulates_and_learns() -> None:
    printed = printed_by(TORCHVISION + "import lightning_module; lightning_module.main()")
    assert ACCUMULATES.search(printed)
    steps, accuracy = re.findall(r"(\d+) optimizer steps: accuracy ([\d.]+)%", printed)[0]
    assert steps == "8"
    assert float(accuracy) > 70
