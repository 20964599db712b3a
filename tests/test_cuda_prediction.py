"""The prediction that a search on CUDA starts from, on the stand-in for a GPU's memory."""

from contextlib import contextmanager
from types import SimpleNamespace

from fake_cuda import CONTEXT, MIB, FakeMemory, a_device, a_step

from autobatch.errors import NotTraceable
from autobatch.trial import Verdict


def saying(reserved_bytes):
    """Predictions of so many reserved bytes for micro-batches of these sizes."""

    @contextmanager
    def predictions(step, conditions):
        assert conditions.gpu.capability == (9, 0)
        yield SimpleNamespace(reserved_bytes=reserved_bytes)

    return predictions


def refused(*_):
    raise NotTraceable("the step cannot be traced\nwith a traceback below")


def test_trials_carry_what_was_predicted_beside_what_was_measured():
    memory = FakeMemory()
    device, step = a_device(memory, predictions=saying(lambda sizes: sum(sizes) * 10 * MIB)), a_step(memory)
    with device.trials(step, device.limit_bytes) as run:
        assert device.predicted((2, 3)) == CONTEXT + 50 * MIB
        trial = run((2, 2))
    assert trial.predicted_bytes == CONTEXT + 40 * MIB != trial.peak_bytes
    assert device.predicted is None


def test_a_step_that_cannot_be_predicted_is_tried_all_the_same():
    memory = FakeMemory()

    @contextmanager
    def none(step, conditions):
        refused()
        yield

    device = a_device(memory, predictions=none)
    with device.trials(a_step(memory), device.limit_bytes) as run:
        trial = run((2, 2))
    assert trial.verdict is Verdict.FITS and trial.predicted_bytes is None
    assert "nothing was predicted" in device.warnings[-1] and "traceback" not in device.warnings[-1]


def test_a_size_that_cannot_be_predicted_is_tried_all_the_same():
    memory = FakeMemory()
    device = a_device(memory, predictions=saying(refused))
    with device.trials(a_step(memory), device.limit_bytes) as run:
        trial = run((2, 2))
    assert trial.verdict is Verdict.FITS and trial.predicted_bytes is None
