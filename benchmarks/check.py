"""What a memory check costs: `python -m benchmarks.check [--jobs N]`.

Five cases of the size of ResNet-50 and GPT-2 small, twice: traced for the first time, then with kept traces. Prints
wall seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = """
[tool.autobatch.check]
device = "rtx-4090"
cases = [
  { name = "resnet50", spec = "torchvision:resnet50", batch_size = 64 },
  { name = "resnet50-bf16", spec = "timm:resnet50", batch_size = 128, precision = "bf16" },
  { name = "vit", spec = "timm:vit_base_patch16_224", batch_size = 64, precision = "bf16" },
  { name = "gpt2", spec = "hf:gpt2", batch_size = 8 },
  { name = "gpt2-checkpointing", spec = "hf:gpt2", batch_size = 16, precision = "bf16", checkpointing = true },
]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=0)
    jobs = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pyproject.toml").write_text(CASES)
        environment = os.environ | {"AUTOBATCH_CACHE": str(folder / "cache")}
        for what, arguments in (("traced for the first time", ["--update"]), ("with kept traces", [])):
            start = time.perf_counter()
            command = [sys.executable, "-m", "autobatch", "check", "--jobs", str(jobs), *arguments]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            if done.returncode:
                sys.exit(f"{done.stdout}\n{done.stderr}")
            print(f"five cases {what}: {seconds:.1f} s")
        print(done.stdout)
        size = (folder / ".autobatch/baseline.json").stat().st_size
        print(f"baseline: {size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
