"""Memory checks on a GPU that is there: the peaks are those of a real step."""

import pytest
import torch
from fake_cuda import CONTEXT, PER_SAMPLE, FakeMemory, Hungry, a_device

from autobatch import NothingFits, Workload
from autobatch.regression import measuring
from autobatch.regression.measuring import step_on
from autobatch.regression.record import Settings, record_of

SETTINGS = Settings(spec="train.py:make", batch_size=4, precision="fp32", device="cuda")


class Portable(FakeMemory):
    def __reduce__(self):
        return Portable, (1 << 60,)  # a trace knows no limit


@pytest.fixture(params=[Portable, FakeMemory])
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeMemory:
    """The GPU that is there: one whose memory is not. Steps on the first can also be traced."""
    memory = request.param()
    monkeypatch.setattr(measuring, "get_device", lambda name: a_device(memory))
    return memory


def hungry(memory: FakeMemory, **options) -> Workload:
    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(n, 3), torch.randn(n, 1)

    return Workload(Hungry(memory, **options), batch, torch.nn.functional.mse_loss)


def test_the_peaks_are_those_of_a_real_step(gpu: FakeMemory) -> None:
    estimate = step_on("cuda", hungry(gpu), 4)

    assert estimate.evidence == "measured"
    assert estimate.peak == 4 * PER_SAMPLE
    assert estimate.device_total.low == estimate.device_total.high >= CONTEXT + 4 * PER_SAMPLE
    record = record_of(estimate, SETTINGS)
    assert (record.evidence, record.peak_bytes) == ("measured", 4 * PER_SAMPLE)
    if isinstance(gpu, Portable):
        assert record.peak_phase
        assert estimate.by_module.bytes > 0
    else:
        assert not record.peak_phase
        assert "where the bytes are from is not known" in estimate.warnings[-1]


def test_a_step_that_runs_out_is_an_error_with_the_numbers(gpu: FakeMemory) -> None:
    with pytest.raises(NothingFits, match="a step of 400 samples ran out of memory in the"):
        step_on("cuda", hungry(gpu), 400)
