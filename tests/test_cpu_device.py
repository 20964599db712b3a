"""The CPU device: real steps in a child process under a real limit."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from autobatch.devices import process_memory
from autobatch.devices.cpu import CpuDevice
from autobatch.devices.timing import Timing, timed
from autobatch.errors import TrialCrashed, WorkloadNotPortable
from autobatch.trial import Verdict
from autobatch.workload.step import TrainingStep

pytestmark = pytest.mark.usefixtures("new_interpreters")

MIB = 1 << 20
LIMIT = 900 * MIB


def step_of(model=None, on_forward=lambda n: None, width=2**16) -> TrainingStep:
    """A step that holds `width` float32 activations per sample, four times over."""
    model = model or nn.Sequential(nn.Linear(4, 1))

    def compute_loss(model, batch):
        on_forward(len(batch))
        wide = (model(batch) * torch.ones(1, width)).exp().exp().exp()
        return wide.mean()

    return TrainingStep(model, lambda n: torch.zeros(n, 4), compute_loss, torch.optim.AdamW)


def run(step, *all_sizes, limit=LIMIT, budget=None):
    with CpuDevice(limit).trials(step, budget or int(limit * 0.95)) as run_trial:
        return [run_trial(sizes) for sizes in all_sizes]


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True)
def _no_child_is_left():
    before = {p.pid for p in children()}
    yield
    assert {p.pid for p in children()} <= before


def test_verdicts_follow_the_real_memory():
    fits, over, out, fits_again = run(step_of(), (8, 8), (400, 400), (3000, 3000), (8, 8), budget=550 * MIB)
    assert (fits.verdict, over.verdict) == (Verdict.FITS, Verdict.OVER_BUDGET)
    assert over.peak_bytes > 550 * MIB
    assert over.turn_bytes <= over.peak_bytes <= LIMIT
    assert (out.verdict, out.peak_bytes) == (Verdict.OUT_OF_MEMORY, None)
    assert out.requested_bytes == 3000 * 2**16 * 4
    assert "in forward" in out.detail
    # Nothing of the failure is left for the next trial.
    assert fits_again.verdict is Verdict.FITS
    assert abs(fits_again.peak_bytes - fits.peak_bytes) < 16 * MIB


def test_the_peak_holds_what_the_step_holds():
    small, large = run(step_of(), (16, 16), (116, 116))
    per_sample = (large.peak_bytes - small.peak_bytes) / 100
    kept = 3 * 2**16 * 4  # each exp keeps its result for the backward pass
    assert kept * 0.9 < per_sample < kept * 4  # backward has temporaries, and the heap gaps


def test_two_micro_batches_hold_the_gradients_of_the_first():
    model = nn.Linear(4, 8 * MIB, bias=False)  # 128 MiB of weights

    def compute_loss(model, batch):
        return (model.weight[:1] * batch.sum()).sum()

    step = TrainingStep(model, lambda n: torch.zeros(n, 4), compute_loss, lambda p: torch.optim.SGD(p, 0.1))
    two, one = run(step, (1, 1), (1,), limit=1500 * MIB)
    assert two.turn_bytes - one.turn_bytes > 100 * MIB


def test_what_is_held_at_rest_does_not_grow_with_the_batch():
    """Nor with the inputs of the earlier micro-batch, which are still held; but its gradients are part of it."""
    model = nn.Linear(4, 8 * MIB, bias=False)  # 128 MiB of weights

    def compute_loss(model, batch):
        return (model.weight[:1] * batch.mean()).sum()

    step = TrainingStep(model, lambda n: torch.zeros(n, 2 * MIB), compute_loss, lambda p: torch.optim.SGD(p, 0.1))
    small, large, whole = run(step, (1, 1), (30, 30), (30,), limit=2000 * MIB)
    assert abs(small.rest_bytes - large.rest_bytes) < 8 * MIB
    assert abs(large.rest_bytes - whole.rest_bytes - 128 * MIB) < 8 * MIB
    assert large.turn_bytes - large.rest_bytes > 30 * 8 * MIB
    assert large.rest_bytes < large.turn_bytes <= large.peak_bytes


def test_large_blocks_come_from_the_heap_as_they_do_after_some_steps():
    def look(n):
        block = torch.empty(16 * MIB, dtype=torch.uint8)
        maps = Path("/proc/self/maps").read_text().splitlines()
        heap = [line.split()[0].split("-") for line in maps if line.endswith("[heap]")]
        assert any(int(start, 16) < block.data_ptr() < int(end, 16) for start, end in heap)

    (trial,) = run(step_of(on_forward=look), (1, 1))
    assert trial.verdict is Verdict.FITS


def test_bytes_in_use_leave_out_what_is_free_in_the_heap(monkeypatch):
    code = """
from autobatch.devices import process_memory as memory
blocks = [bytearray(100_000) for _ in range(1000)]
full = memory.in_use_bytes()
del blocks[::2]
assert 40e6 < full - memory.in_use_bytes() < 60e6
assert memory.data_bytes() >= full
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setattr(process_memory, "_LIBC", object())  # an older glibc, or musl
    assert process_memory.in_use_bytes() is None


def test_only_thorough_trials_near_the_limit_go_on():
    with CpuDevice(LIMIT).trials(step_of(), int(LIMIT * 0.95)) as run_trial:
        low, near = (run_trial((n, n), thorough=True) for n in (50, 430))
        quick = run_trial((430, 430))
    assert near.peak_bytes > LIMIT * 6 / 7  # else this tells nothing
    assert low.samples == 1 + 2 * 50
    assert near.samples in (1 + 430 * 3, 1 + 430 * 4)
    assert quick.samples == 1 + 2 * 430


def test_a_limit_below_the_interpreter_itself_is_out_of_memory():
    (trial,) = run(step_of(), (8, 8), limit=20 * MIB)
    assert trial.verdict is Verdict.OUT_OF_MEMORY


def test_a_bug_in_the_model_is_raised_as_it_is_with_its_size():
    def buggy(n):
        if n == 8:
            raise ZeroDivisionError("the model's own bug")

    with pytest.raises(ZeroDivisionError, match="the model's own bug") as caught:
        run(step_of(on_forward=buggy), (8, 8))
    note = "\n".join(caught.value.__notes__)
    assert "micro-batches of 8 samples" in note
    assert "in buggy" in note


def test_an_exception_that_cannot_travel_is_still_told():
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    def buggy(n):
        raise Odd("first", "second")

    with pytest.raises(TrialCrashed, match=r"(?s)micro-batches of 8.*Odd"):
        run(step_of(on_forward=buggy), (8, 8))


@pytest.mark.parametrize(
    ("death", "words"),
    [
        (lambda n: os._exit(7), "exit status 7"),
        (lambda n: os.kill(os.getpid(), signal.SIGSEGV), "signal SIGSEGV"),
    ],
)
def test_a_crash_that_is_not_memory_is_an_error(death, words):
    def crash(n):
        print("last words", flush=True)
        death(n)

    with pytest.raises(TrialCrashed, match=rf"(?s){words}.*last words"):
        run(step_of(on_forward=crash), (8, 8))


def test_a_stray_kill_of_the_trial_is_tried_again(tmp_path):
    def killed_once(n):
        if not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    (trial,) = run(step_of(on_forward=killed_once), (8, 8))
    assert (tmp_path / "killed").exists()
    assert trial.verdict is Verdict.FITS


def test_a_trial_that_is_killed_every_time_is_out_of_memory():
    (trial,) = run(step_of(on_forward=lambda n: os.kill(os.getpid(), signal.SIGKILL)), (8, 8))
    assert trial.verdict is Verdict.OUT_OF_MEMORY
    assert "killed" in trial.detail


def test_killing_the_whole_server_costs_one_more_try(tmp_path):
    def kill_the_server_once(n):
        if not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)

    first, second = run(step_of(on_forward=kill_the_server_once), (8, 8), (9, 9))
    assert (first.verdict, second.verdict) == (Verdict.FITS, Verdict.FITS)


def test_the_kernels_own_kill_is_out_of_memory_and_the_caller_survives():
    memory = Path("/sys/fs/cgroup/memory")
    v1 = memory.is_dir()
    group = (memory if v1 else Path("/sys/fs/cgroup")) / f"autobatch-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(700 * MIB))
    except OSError as error:
        pytest.skip(f"needs the right to make a cgroup: {error}")
    try:
        # The limit given is far above what the cgroup allows, so the kernel has to kill.
        program = textwrap.dedent(
            f"""
            import os
            open({str(group / "cgroup.procs")!r}, "w").write(str(os.getpid()))
            from test_cpu_device import *
            print(run(step_of(), (600, 600), limit=8000 * MIB)[0])
            """
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
        assert "OUT_OF_MEMORY" in done.stdout, done
        assert "killed" in done.stdout
    finally:
        group.rmdir()


def test_a_model_of_a_scripts_main_with_lambdas_and_prints(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch
            from autobatch.devices.cpu import CpuDevice
            from autobatch.workload.step import TrainingStep

            SCALE = 3.0

            class Mine(torch.nn.Linear):
                def forward(self, x):
                    print("noise")
                    return super().forward(x) * SCALE

            if __name__ == "__main__":
                step = TrainingStep(Mine(2, 1), lambda n: torch.ones(n, 2), lambda m, b: m(b).sum(), torch.optim.SGD)
                with CpuDevice().trials(step, 1 << 40) as run:
                    print(run((4, 4)).verdict.value)
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "fits\n"


def test_what_cannot_be_rebuilt_in_the_child_is_a_clear_error():
    class Unrebuildable:
        def __reduce__(self):
            return (int, ("not a number",))

    model = nn.Linear(4, 1)
    model.odd = Unrebuildable()
    with pytest.raises(WorkloadNotPortable, match=r"(?s)could not be rebuilt.*not a number"):
        run(step_of(model), (8, 8))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_child_outlives_ctrl_c_or_a_kill(tmp_path, sent):
    program = textwrap.dedent(
        f"""
        import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_cpu_device import *
        def report(n):
            open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{os.getppid()}} .")
            time.sleep(60)
        run(step_of(on_forward=report), (8, 8))
        """
    )
    caller = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith(".")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()[:2]]
    caller.send_signal(sent)
    _, errors = caller.communicate(timeout=30)
    assert caller.returncode != 0
    if sent is signal.SIGINT:
        assert "KeyboardInterrupt" in errors
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_operators_that_the_caller_defined_are_there_for_modules_that_need_them(tmp_path, monkeypatch):
    """As torchvision needs torchvision::nms, which its build may not bring along."""
    (tmp_path / "needs_operator.py").write_text(
        "import torch\n"
        "torch.library.register_fake('autobatch_test::op', lambda x: x)\n"
        "class Model(torch.nn.Linear): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    library = torch.library.Library("autobatch_test", "DEF")
    library.define("op(Tensor x) -> Tensor")
    from needs_operator import Model

    (trial,) = run(step_of(Model(4, 1)), (8, 8))
    assert trial.verdict is Verdict.FITS


def test_hooks_on_parameters_that_are_not_sent_are_warned_of():
    step = step_of()
    device = CpuDevice(LIMIT)
    step.model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with device.trials(step, LIMIT):
        assert any("hooks on parameters (0.weight)" in warning for warning in device.warnings)


def test_a_whole_step_is_timed_without_the_making_of_batches():
    step = step_of(width=2**14)

    def make_batch(n):
        time.sleep(0.2)
        return torch.zeros(n, 4)

    slow_to_make = replace(step, make_batch=make_batch)
    with CpuDevice(LIMIT).trials(slow_to_make, LIMIT) as run_trial:
        trial = run_trial((16,) * 8, timing=Timing(steps=3))
    assert trial.fits and len(trial.repeated_seconds) == 3
    assert trial.samples == 16 * 4 + 3 * 16 * 8
    assert trial.step_seconds == sorted(trial.repeated_seconds)[1]
    assert 0 < trial.step_seconds < 8 * 0.2  # the batches alone take that


def test_a_step_that_runs_out_while_it_is_timed_does_not_fit():
    with CpuDevice(LIMIT).trials(step_of(), LIMIT) as run_trial:
        trial = run_trial((3000, 3000), timing=Timing())
    assert trial.verdict is Verdict.OUT_OF_MEMORY


def test_timing_ends_with_its_time_but_not_before_the_least_of_steps():
    def step():
        time.sleep(0.02)
        return 0.02

    assert len(timed(step, Timing(steps=100, seconds=0.0, least=3))) == 3
    assert len(timed(step, Timing(steps=4, seconds=60.0))) == 4
