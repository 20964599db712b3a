"""Packed sequences: the same as torch's own, and traced to the byte with the lengths of the batches."""

import pytest
import torch
from own_process import in_its_own_process
from torch import nn
from torch.nn.utils import rnn

from autobatch.prediction import packed
from autobatch.prediction.recurrent import CELLS, Network
from autobatch.prediction.trace import Category
from autobatch.prediction.tracing import traced
from autobatch.workload import Workload, resolve

WIDTH, HIDDEN, CLASSES, LONGEST = 12, 16, 5, 20


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("lengths", [[7, 5, 5, 2], [3, 3], [4], [6, 1]])
def test_packing_and_unpacking_are_torchs(lengths, batch_first):
    shape = (len(lengths), 7, 3) if batch_first else (7, len(lengths), 3)
    ours, theirs = (torch.arange(21.0 * len(lengths)).view(shape).requires_grad_() for _ in range(2))
    data, counts = packed.pack(ours, lengths, batch_first)
    wanted = rnn.pack_padded_sequence(theirs, torch.tensor(lengths), batch_first)
    assert torch.equal(data, wanted.data) and torch.equal(counts, wanted.batch_sizes)
    output, unpacked = packed._padded(data, counts, batch_first, -1.0, 9)
    wanted_output, wanted_lengths = rnn.pad_packed_sequence(wanted, batch_first, -1.0, 9)
    assert torch.equal(output, wanted_output) and output.stride() == wanted_output.stride()
    assert torch.equal(unpacked, wanted_lengths)
    (output**2).sum().backward(), (wanted_output**2).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_lengths_that_torch_refuses_are_refused():
    for lengths in ([2, 5], [5, 0]):
        with pytest.raises(RuntimeError, match="decreasing"):
            packed.pack(torch.ones(2, 7, 3), lengths, batch_first=True)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(100, WIDTH), nn.Linear(HIDDEN, CLASSES)
        self.rnn = nn.LSTM(WIDTH, HIDDEN, batch_first=True)

    def forward(self, tokens, lengths):
        words = rnn.pack_padded_sequence(self.embedding(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, _ = rnn.pad_packed_sequence(self.rnn(words)[0], batch_first=True)
        return self.head(output).mean(1)


def step_with(length_of):
    def data(n):
        lengths = torch.tensor([length_of(i) for i in range(n)])
        return torch.zeros(n, LONGEST, dtype=torch.long), lengths, torch.zeros(n, dtype=torch.long)

    def training_step(model, batch):
        tokens, lengths, labels = batch
        return nn.functional.cross_entropy(model(tokens, lengths), labels)

    return resolve(Workload(Classifier(), data=data, training_step=training_step))


def bytes_made(trace, operator):
    """Of each storage that this operator made in the measured step."""
    from_there = [event for event in trace.events[trace.steady_from :] if event >= 0]
    return [trace.sizes[i] for i in from_there if trace.sites[i].operator == operator]


@pytest.mark.parametrize("ragged", [True, False])
def test_a_classifier_of_padded_text_is_traced_with_its_lengths(ragged):
    def length_of(i):
        return LONGEST - (i % 7 if ragged else 0)

    n = 50
    rows = sum(length_of(i) for i in range(n))
    network = Network(next(cell for cell in CELLS if cell.name == "lstm"), WIDTH, HIDDEN)
    with traced(step_with(length_of)) as steps:
        trace = steps.of_sizes((n,))
        assert bool(steps.uneven) is ragged
    assert 4 * rows * WIDTH in bytes_made(trace, "aten.cat.default")  # what is packed
    reserve = 4 * network.reserve_elements(LONGEST, n)
    states = 4 * n * HIDDEN
    assert bytes_made(trace, "aten._cudnn_rnn.default") == [4 * rows * HIDDEN, states, states, reserve, 0]
    assert 4 * n * LONGEST * HIDDEN in bytes_made(trace, "aten.new_full.default")  # padded again
    assert 4 * n * LONGEST * WIDTH in bytes_made(trace, "aten.zeros.default")  # the gradient of what was packed
    saved = {i for i, site in enumerate(trace.sites) if site.category is Category.SAVED}
    assert {4 * rows * WIDTH, 4 * rows * HIDDEN, reserve} <= {trace.sizes[i] for i in saved}
    assert any("lengths" in warning and "_pack_padded_sequence" in warning for warning in steps.warnings)


def test_what_is_computed_from_lengths_is_known_and_other_values_are_not():
    in_its_own_process("""
        from autobatch.errors import NotTraceable
        from autobatch.prediction.values import Known

        def cut(model, batch):
            x, lengths = batch
            longest = int((lengths * 2).max())
            return model(x[:, :longest]).sum()

        def looks(model, batch):
            x, lengths = batch
            return model(x[:, : int(x.max())]).sum()

        data = lambda n: (torch.ones(n, 30, 4), torch.arange(n))
        def run(step):
            workload = Workload(nn.Linear(4, 4), data=data, training_step=step)
            return trace_steps(resolve(workload), ((9,), (9,)), MODE, Known.LENGTHS).trace

        assert 9 * 16 * 4 * 4 in run(cut).sizes  # 9 samples, up to 16 of 30 steps, 4 values of 4 bytes
        try:
            run(looks)
        except NotTraceable as error:
            assert error.needs_values
        else:
            raise AssertionError
    """)
