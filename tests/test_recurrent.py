"""Recurrent layers on the stand-in device: as cuDNN runs them, with the shapes that the CPU's have."""

import textwrap

import pytest
import warm

from autobatch.prediction.recurrent import CELLS, Network

PRELUDE = """
import copy
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from autobatch.prediction import recurrent, stand_in

MODE = stand_in.make()
FAKES = stand_in.Fakes(MODE)

def faked(module):
    twin = copy.deepcopy(module)
    twin._parameters = {name: FAKES.of(p) for name, p in twin._parameters.items()}
    twin._init_flat_weights()
    return twin

def called(module, data, batch_sizes=None):
    if batch_sizes is None:
        output, states = module(data)
        return output, *(states if isinstance(states, tuple) else (states,))
    # As `forward` does it, which would look at the values of the batch sizes.
    count = module.num_layers * (2 if module.bidirectional else 1)
    zeros = torch.zeros(count, 4, module.hidden_size, dtype=data.dtype, device=data.device)
    run = getattr(torch._VF, module.mode.lower())
    states = (zeros, zeros) if module.mode == "LSTM" else zeros
    rest = (module._flat_weights, module.bias, module.num_layers, 0.0, module.training, module.bidirectional)
    return run(data, batch_sizes, states, *rest)

def trained(module, data, batch_sizes=None):
    data, saved = data.detach().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        results = called(module, data, batch_sizes)
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), data)}
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    sum(result.float().sum() for result in results).backward()
    return results, data.grad, sum(size for address, size in held.items() if address not in own)

def layout(tensor):
    return tensor.shape, tensor.stride()

PACKED = nn.utils.rnn.pack_sequence([torch.randn(n, 12) for n in (7, 5, 5, 2)])
"""


def in_its_own_process(code):
    done = warm.run(PRELUDE + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


def test_results_and_gradients_are_laid_out_as_on_the_cpu():
    in_its_own_process("""
        for KIND in ("LSTM", "GRU", "RNN"):
            variants = [{}, dict(bias=False), dict(num_layers=2, bidirectional=True, batch_first=True, dropout=0.1)]
            variants += [dict(proj_size=4, num_layers=2), dict(proj_size=4, bias=False)] if KIND == "LSTM" else []
            for variant in variants:
                module = getattr(nn, KIND)(12, 16, **variant)
                twin = faked(module)
                inputs = [(torch.randn(4, 7, 12), None)]
                inputs += [] if "proj_size" in variant else [PACKED[:2]]
                for data, batch_sizes in inputs:
                    wanted, wanted_grad, _ = trained(module, data, batch_sizes)
                    with MODE:
                        results, grad, _ = trained(twin, FAKES.of(data), batch_sizes)
                    assert [layout(r) for r in results] == [layout(r) for r in wanted], (variant, batch_sizes)
                    assert layout(grad) == layout(wanted_grad)
                    for a, b in zip(twin.parameters(), module.parameters(), strict=True):
                        assert layout(a.grad) == layout(b.grad) and a.grad.dtype == b.grad.dtype
    """)


def test_what_is_held_for_the_backward_pass_is_what_cudnn_keeps():
    in_its_own_process("""
        for KIND, KEPT in (("LSTM", 5), ("GRU", 6), ("RNN", 1)):
            states = 2 if KIND == "LSTM" else 1
            for batch_first in (False, True):
                module = faked(getattr(nn, KIND)(12, 16, num_layers=2, bidirectional=True, batch_first=batch_first))
                with MODE:
                    data = FAKES.of(torch.randn(*((4, 7) if batch_first else (7, 4)), 12))
                    _, _, held = trained(module, data)
                output, zeros = 4 * 7 * 32, states * 4 * 4 * 16
                reserve = 4 * 7 * 2 * (2 * KEPT * 16 + 16)
                assert held == 4 * (output + zeros + reserve)
            module = faked(getattr(nn, KIND)(12, 16))
            with MODE:
                _, _, held = trained(module, FAKES.of(PACKED.data), PACKED.batch_sizes)
            assert held == 4 * (19 * 16 + 4 * 16 + 7 * 4 * KEPT * 16)  # the reserve is not packed
    """)


def test_autocast_runs_in_fp16_with_all_weights_copied_to_one_buffer():
    in_its_own_process("""
        for KIND, DTYPE in (("LSTM", torch.bfloat16), ("GRU", torch.float16), ("RNN", torch.float16)):
            module = faked(getattr(nn, KIND)(12, 16))
            with MODE, torch.autocast(stand_in.NAME, dtype=DTYPE):
                results, grad, held = trained(module, FAKES.of(torch.randn(7, 4, 12)))
            assert {r.dtype for r in results} == {torch.float16} and grad.dtype == torch.float32
            assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
            cell = next(cell for cell in recurrent.CELLS if module.mode.lower() == cell.name)
            network = recurrent.Network(cell, 12, 16)
            states = 2 if KIND == "LSTM" else 1
            elements = 7 * 4 * (12 + 16) + states * 4 * 16 + network.weight_elements() + network.reserve_elements(7, 4)
            assert held == 2 * elements  # the input's copy and the output, the states, the weights, the reserve
    """)


def test_gradients_of_weights_share_one_buffer_unless_there_are_no_biases():
    in_its_own_process("""
        for bias, storages in ((True, 1), (False, 4)):
            module = faked(nn.GRU(12, 16, num_layers=2, bias=bias))
            with MODE:
                trained(module, FAKES.of(torch.randn(7, 4, 12)))
            assert len({p.grad.untyped_storage()._cdata for p in module.parameters()}) == storages
    """)


def test_computed_weights_are_put_together_at_every_call_and_kept():
    in_its_own_process("""
        plain = faked(nn.LSTM(12, 16))
        computed = faked(nn.LSTM(12, 16))
        with MODE:
            data = FAKES.of(torch.randn(7, 4, 12))
            computed._flat_weights = [weight * 1 for weight in computed._flat_weights]
            held = [trained(module, data)[2] for module in (plain, computed)]
        weights = sum(p.numel() for p in plain.parameters())
        made = weights  # by the multiplications, which are saved too
        assert held[1] - held[0] == 4 * (weights + made)
    """)


def test_evaluation_keeps_no_reserve():
    in_its_own_process("""
        module = faked(nn.LSTM(12, 16)).eval()
        sizes = []
        class Reserves(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                if func is recurrent.RUN:
                    sizes.append(result[3].numel())
                return result
        with MODE, Reserves():
            for train in (False, True):
                module.train(train)(FAKES.of(torch.randn(7, 4, 12)))
        assert sizes == [0, 4 * 7 * 4 * 5 * 16]
    """)


def test_without_cudnn_the_time_steps_are_run():
    in_its_own_process("""
        module, operators = faked(nn.LSTM(12, 16)), []
        class Seen(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                operators.append(func)
                return func(*args, **(kwargs or {}))
        with MODE, Seen():
            data = FAKES.of(torch.randn(7, 4, 12))
            module(data)
            assert recurrent.RUN in operators
            operators.clear()
            with torch.backends.cudnn.flags(enabled=False):
                output, _ = module(data)
        assert recurrent.RUN not in operators and len(operators) > 7
        assert output.shape == (7, 4, 16)
    """)


@pytest.mark.parametrize(
    ("name", "reserve", "workspace"), [("lstm", 736_000_000, 17_730_560), ("gru", 864_000_000, 13_169_920)]
)
def test_a_published_query_of_cudnn_is_reproduced(name, reserve, workspace):
    network = Network(next(cell for cell in CELLS if cell.name == name), 123, 320, layers=4)
    assert network.reserve_elements(steps=250, samples=100) * 4 == reserve
    assert network.workspace_elements(samples=100) * 4 == workspace


def test_workspaces_are_hidden_from_a_trace():
    in_its_own_process("""
        from autobatch.prediction.rules import Call, Gpu, temporaries_of

        seen = {}
        class Rules(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                call = Call(str(func), args, kwargs or {}, ())
                if func in (recurrent.RUN, recurrent.RUN_BACKWARD):
                    seen[func] = [size for _, size in temporaries_of(call, Gpu())]
                return result
        module = faked(nn.LSTM(12, 16, batch_first=True))
        with MODE, Rules():
            output, _ = module(FAKES.of(torch.randn(4, 7, 12)).requires_grad_())
            output.relu().sum().backward()
        workspace = 4 * (64 * 28 + 11 * 16 * 4)
        copied = 4 * 4 * 7 * 12
        assert seen[recurrent.RUN] == [workspace, copied]
        assert seen[recurrent.RUN_BACKWARD][:2] == [workspace, copied]
        assert seen[recurrent.RUN_BACKWARD][-1] == 2 * 4 * 4 * 16  # the states' gradients, which nobody gave
    """)
