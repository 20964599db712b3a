"""`autobatch estimate` and the catalogue, each in a process of its own."""

import json
import subprocess
import sys
from functools import partial

import pytest
import warm
from pydantic import TypeAdapter

import autobatch
from autobatch import Estimate, Workload, cache
from autobatch.cli.estimate import _keep, _key
from autobatch.estimating import estimates
from autobatch.estimator import Question

FACTORY = """
import torch
from torch import nn

class Looks(nn.Linear):
    def forward(self, x):
        return super().forward(x[torch.arange(len(x), device=x.device) % 2 == 0])  # half of them, which is not even

def make():
    print("a print of the factory")
    return nn.Sequential(nn.Linear(256, 4096), nn.GELU(), nn.Linear(4096, 10))

def looks():
    return nn.Sequential(nn.Linear(8, 8), Looks(8, 8))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text(FACTORY)
    return tmp_path


COMMAND = "import sys; from autobatch.cli import app; sys.argv[0] = 'autobatch'; app()"


def command(folder, *arguments):
    return warm.run(COMMAND, *arguments, cwd=folder)


def command_without_torch(folder, *arguments):
    code = f"import sys; sys.modules['torch'] = None; {COMMAND}"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True)


def test_an_estimate_is_shown_and_drawn(folder):
    done = command(folder, "estimate", "train.py:make", "-n", "64", "--device", "rtx-4090", "--html", "step.html")
    assert done.returncode == 0, done.stderr
    assert "64 samples on NVIDIA GeForce RTX 4090" in " ".join(done.stdout.split())
    assert "a print of the factory" in done.stderr and "a print" not in done.stdout
    assert "saved activation" in done.stdout and "train.py" not in done.stderr
    assert "<html" in (folder / "step.html").read_text()


def test_json_is_all_there_is_on_stdout(folder):
    done = command(folder, "estimate", "train.py:make", "--device", "t4", "--json")
    found = Estimate.model_validate_json(done.stdout)
    assert found.batch_size == found.largest_micro_batch and found.device.name == "Tesla T4"


def test_several_cards_are_a_table_and_one_that_fits_is_enough(folder):
    size = "600000"
    done = command(folder, "estimate", "train.py:make", "-n", size, "--device", "t4,h100")
    rows = [line for line in done.stdout.splitlines() if "Tesla T4" in line or "H100" in line]
    assert done.returncode == 0 and [" no " in row for row in rows] == [True, False]
    assert command(folder, "estimate", "train.py:make", "-n", size, "--device", "t4").returncode == 1


def test_bad_usage_says_what_to_do(folder):
    for arguments, message in [
        (["estimate", "train.py:make"], "--device rtx-4090"),
        (["estimate", "train.py:make", "--device", "rtx-4009"], "rtx-4090"),
        (["estimate", "train.py:make", "--device", "t4", "-n", "0"], "batch_size must be"),
        (["estimate", "train.py:make", "--device", "t4", "--html", "no/such/place.html"], "no folder"),
        (["estimate", "train.py:make", "--device", "t4,h100", "--html", "step.html"], "one GPU"),
        (["devices", "--from-oom-message", "missing.txt"], "cannot be read"),
    ]:
        done = command(folder, *arguments)
        assert (done.returncode, message in done.stderr) == (2, True), (arguments, done.stderr)
        assert "autobatch: " in done.stderr and "Traceback" not in done.stderr


def test_what_cannot_be_traced_names_the_line_and_exits_with_3(folder):
    done = command(folder, "estimate", "train.py:looks", "--device", "t4")
    assert done.returncode == 3
    assert "depends on the values of tensors" in done.stderr and "train.py:7" in done.stderr


def test_a_probe_on_a_gpu_that_is_not_here_makes_a_predicted_plan(folder):
    done = command(folder, "probe", "train.py:make", "--target", "64", "--device", "24GiB", "-o", "plan.json", "--json")
    plan = autobatch.TrainingPlan.load(folder / "plan.json")
    assert plan.evidence == "predicted" and plan.device.type == "simulated"
    assert autobatch.TrainingPlan.model_validate_json(done.stdout) == plan


def test_one_trace_of_a_librarys_model_answers_other_questions_without_torch(folder):
    if _key("hf:gpt2", None, 8) is None:
        pytest.skip("transformers is not installed")
    four = Question.checked(4, ["rtx-3090"], None, 0.05, accumulation=False)
    first = estimates(Workload(_layer()), four, partial(_keep, "hf:gpt2", None))
    ask = ["estimate", "hf:gpt2", "--json"]
    again = command_without_torch(folder, *ask, "-n", "4", "--device", "rtx-3090")
    assert [Estimate.model_validate_json(again.stdout)] == first
    others = ["--device", "rtx-4090,24GiB", "--memory-limit", "20GiB", "--accumulation"]
    found = TypeAdapter(list[Estimate]).validate_json(command_without_torch(folder, *ask, *others).stdout)
    assert all(one.accumulation and one.batch_size > 4 and one.limit_bytes == 20 << 30 for one in found)
    assert command_without_torch(folder, *ask, "--device", "t4").returncode != 0  # other kernels: to be traced
    assert command_without_torch(folder, *ask, "--device", "rtx-3090", "--precision", "bf16").returncode != 0
    cache.save(_key("hf:gpt2", None, 8), b"damaged")
    assert command_without_torch(folder, *ask, "--device", "rtx-3090").returncode != 0


def _layer():
    from torch import nn

    return nn.Linear(4, 4)


def test_what_a_factorys_file_says_is_read_every_time():
    assert _key("train.py:make", None, 8) is None


def test_the_catalogue_is_listed_and_a_message_becomes_a_profile(folder):
    assert "rtx-4090" in command(folder, "devices", "--catalog").stdout
    assert any(gpu["name"] == "h200" for gpu in json.loads(command(folder, "devices", "--catalog", "--json").stdout))
    (folder / "message.txt").write_text(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 64.00 MiB. GPU 0 has a total capacity of 79.11 "
        "GiB of which 11.25 MiB is free. Including non-PyTorch memory, this process has 79.08 GiB memory in use. Of "
        "the allocated memory 77.90 GiB is allocated by PyTorch, and 512.00 MiB is reserved by PyTorch but unallocated."
    )
    done = command(folder, "devices", "--from-oom-message", "message.txt", "--gpu", "h100", "--output", "card.json")
    assert done.returncode == 0, done.stderr
    found = command(folder, "estimate", "train.py:make", "-n", "8", "--device", "card.json", "--json")
    assert Estimate.model_validate_json(found.stdout).context.likely == pytest.approx(0.68 * 2**30, rel=0.02)
