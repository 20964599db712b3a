"""Steps traced on the stand-in device. Each test runs in a process of its own, as the device cannot be unmade."""

import pytest
from own_process import in_its_own_process


def test_a_step_is_accounted_for_to_the_byte():
    in_its_own_process("""
        model = nn.Sequential(nn.Linear(64, 1000, bias=False), nn.Dropout(0.5), nn.Linear(1000, 8, bias=False))
        data = lambda n: (torch.ones(n, 64), torch.ones(n))
        trace = traced(model, 16, 16, loss=lambda out, target: out.sum(), data=data)
        weights = 4 * (64 * 1000 + 1000 * 8)
        end = bytes_of(trace, trace.alive_at(len(trace.events)))
        assert end[Category.PARAMETER] == weights
        assert end[Category.OPTIMIZER_STATE] == 2 * weights
        assert end.keys() <= {Category.PARAMETER, Category.OPTIMIZER_STATE, Category.INPUT, Category.TEMPORARY}
        peak = bytes_of(trace, peak_of(trace))
        assert peak[Category.GRADIENT] == weights
        assert peak[Category.TEMPORARY] >= weights  # the multi-tensor optimizer's own copy
        masks = [i for i, s in enumerate(trace.sites) if s.operator == "aten.native_dropout.default"]
        assert sorted({trace.sizes[i] for i in masks}) == [16 * 1000, 16 * 1000 * 4]  # booleans, and the output
    """)


def test_one_trace_gives_every_size_with_and_without_accumulation():
    in_its_own_process("""
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
        model(torch.zeros(2, 3, 12, 12))
        data = lambda n: (torch.zeros(n, 3, 12, 12), torch.zeros(n, dtype=torch.long))
        step = resolve(Workload(model, data=data, loss=nn.functional.cross_entropy, precision="fp16"))
        even = AffineSteps.of(trace_steps(step, STEPS, MODE))

        def happenings(trace):
            made = [(trace.sites[i].place, trace.sizes[i]) for i in range(len(trace.sizes))]
            return [(event >= 0, *made[event if event >= 0 else ~event]) for event in trace.events]

        for sizes in ((7,), (7, 7), (6, 7)):
            known, traced = even.of_sizes(sizes), trace_steps(step, ((max(sizes),), sizes), MODE).trace
            assert abs(len(known.events) - len(traced.events)) <= 1  # where a step ends: its loss is let go
            assert all(a == b for a, b in zip(happenings(known), happenings(traced)))
            assert len(traced.events) > 200
    """)


def test_every_storage_says_where_it_is_from():
    in_its_own_process("""
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(6, 50), nn.Linear(50, 1)
            def forward(self, x):
                return self.second(self.first(x).relu().exp())

        trace = traced(Net(), 4, 4)
        def sites(operator):
            return {(s.module, s.phase, s.category) for s in trace.sites if s.operator == operator}
        assert sites("aten.addmm.default") == {
            ("first", Phase.FORWARD, Category.TEMPORARY),  # relu keeps its result instead
            ("second", Phase.FORWARD, Category.SAVED),
        }
        assert {s.phase for s in trace.sites if s.operator == "aten.mse_loss.default"} == {Phase.LOSS}
        assert sites("aten.exp.default") == {("", Phase.FORWARD, Category.SAVED)}
        gradients = {s.module for s in trace.sites if s.category is Category.GRADIENT}
        assert gradients == {"first", "second"}
        assert all(s.phase is Phase.BACKWARD for s in trace.sites if s.category is Category.GRADIENT)
        lines = {s.operator: s.line for s in trace.sites}
        assert lines["aten.exp.default"].startswith("<string>:")
        # The gradient of exp, in the backward pass of the same line.
        assert lines["aten.mul.Tensor"] == lines["aten.exp.default"]
        assert {s.line for s in trace.sites if s.phase in (Phase.SETUP, Phase.OPTIMIZER)} == {""}
    """)


def test_tied_weights_are_one_and_frozen_ones_have_no_gradient():
    in_its_own_process("""
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding, self.norm = nn.Embedding(100, 16), nn.BatchNorm1d(16)
                self.middle = nn.Linear(16, 16).requires_grad_(False)
                self.head = nn.Linear(16, 100, bias=False)
                self.head.weight = self.embedding.weight
            def forward(self, tokens):
                return self.head(self.norm(self.middle(self.embedding(tokens))))

        data = lambda n: (torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long))
        trace = traced(Tied(), 4, 4, data=data, loss=nn.functional.cross_entropy)
        end = bytes_of(trace, trace.alive_at(len(trace.events)))
        assert end[Category.PARAMETER] == 4 * (100 * 16 + 2 * 16 + 16 * 16 + 16)
        assert end[Category.BUFFER] == 4 * 2 * 16 + 8
        assert end[Category.OPTIMIZER_STATE] == 2 * 4 * (100 * 16 + 2 * 16)
    """)


def test_code_written_for_cuda_runs():
    in_its_own_process("""
        class Hard(nn.Linear):
            def forward(self, x):
                scale = torch.tensor([1.0, 2.0], device=x.device) if x.device.type != "cpu" else torch.ones(2)
                if x.device.type != "cpu":
                    scale = scale + torch.ones(2).cuda() + torch.zeros(2, device="cuda")
                    scale = scale + torch.tensor(1.0).to(x.device)
                return super().forward(x) * scale

        trace = traced(Hard(4, 2), 3, 3)
        assert any(s.operator == "aten.zeros.default" for s in trace.sites)
    """)


def test_an_optimizer_in_mid_training_keeps_its_state_and_the_callers_objects_are_untouched():
    in_its_own_process("""
        model = nn.Linear(32, 32)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model(torch.ones(1, 32)).sum().backward()
        optimizer.step()
        before = [p.clone() for p in model.parameters()], [p.grad.clone() for p in model.parameters()]
        momentum = [s["momentum_buffer"] for s in optimizer.state.values()]
        trace = traced(model, 2, 2, optimizer=optimizer)
        assert bytes_of(trace, trace.alive_at(len(trace.events)))[Category.OPTIMIZER_STATE] == 4 * (32 * 32 + 32)
        assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters()))
        assert all(torch.equal(a, p.grad) for a, p in zip(before[1], model.parameters()))
        assert [s["momentum_buffer"] for s in optimizer.state.values()] == momentum
        assert optimizer.param_groups[0]["params"] == list(model.parameters())
        assert optimizer.param_groups[0]["foreach"] is None
    """)


def test_the_trace_is_the_same_in_every_process():
    code = """
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        data = lambda n: (torch.ones(n, 5, 16), torch.ones(n, 5, 16))
        trace = traced(model, 3, 3, data=data, loss=nn.functional.mse_loss)
        import hashlib
        print(len(trace.events), hashlib.sha256(repr(trace).encode()).hexdigest())
    """
    first = in_its_own_process(code, PYTHONHASHSEED="1", OMP_NUM_THREADS="1")
    assert int(first.split()[0]) > 500
    assert in_its_own_process(code, PYTHONHASHSEED="2", OMP_NUM_THREADS="2") == first


def test_backward_is_attributed_to_the_module_that_ran_forward():
    in_its_own_process("""
        class Exp(nn.Module):
            def forward(self, x): return x.exp()
        class Sin(nn.Module):
            def forward(self, x): return x.sin()

        model = nn.Sequential(nn.Linear(8, 8), Sin(), nn.Tanh(), Exp())
        trace = traced(model, 4, 4, data=lambda n: torch.ones(n, 8), training_step=lambda m, b: m(b).sum())
        backward = {s.operator: s.module for s in trace.sites if s.phase is Phase.BACKWARD}
        assert backward["aten.cos.default"] == "1"
        assert backward["aten.tanh_backward.default"] == "2"
        assert backward["aten.mm.default"] == "0"
    """)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_steps_grow_evenly_and_save_less(reentrant):
    in_its_own_process(f"""
        from torch.utils.checkpoint import checkpoint

        class Net(nn.Module):
            def __init__(self, checkpointed):
                super().__init__()
                layers = (nn.TransformerEncoderLayer(32, 4, 256, batch_first=True) for _ in range(4))
                self.layers, self.checkpointed = nn.ModuleList(layers), checkpointed
            def forward(self, x):
                for layer in self.layers:
                    x = checkpoint(layer, x, use_reentrant={reentrant}) if self.checkpointed else layer(x)
                return x

        def peak(checkpointed):
            data = lambda n: torch.ones(n, 16, 32).requires_grad_()
            workload = Workload(Net(checkpointed), data=data, training_step=lambda m, b: m(b).sum(), precision="bf16")
            trace = AffineSteps.of(trace_steps(resolve(workload), STEPS, MODE)).of_sizes((500,))
            return max(trace.allocated_bytes())

        assert peak(True) < 0.6 * peak(False)
    """)


def test_gradients_of_one_tensor_add_up_in_place_where_nobody_else_holds_them():
    in_its_own_process("""
        class Three(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.heads = nn.Linear(64, 64), nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
            def forward(self, x):
                h = self.first(x).exp()
                return sum(head(h).exp().sum() for head in self.heads)

        trace = traced(Three(), 4, data=lambda n: torch.ones(n, 64), training_step=lambda m, b: m(b))
        whole = [s for i, s in enumerate(trace.sites) if s.phase is Phase.BACKWARD and trace.sizes[i] == 4 * 64 * 4]
        assert not [s for s in whole if s.operator == "aten.add.Tensor"]
    """)


def test_autocast_is_cudas_and_so_is_what_torch_says_of_it():
    in_its_own_process("""
        class Hard(nn.Linear):
            def forward(self, x):
                with torch.autocast("cuda", torch.bfloat16):
                    assert torch.is_autocast_enabled() and torch.get_autocast_gpu_dtype() is torch.bfloat16
                    y = super().forward(x)
                assert y.dtype is torch.bfloat16 and not torch.is_autocast_enabled()
                assert y.is_cuda and torch.cuda.is_available() and torch.cuda.get_device_capability() == (8, 0)
                return y * y.new_tensor([2.0])

        step = lambda model, batch: model(batch).sum()
        trace = traced(Hard(64, 64), 3, data=lambda n: torch.ones(n, 64), training_step=step)
        assert 2 * 64 * 64 in [trace.sizes[i] for i, s in enumerate(trace.sites) if s.category is Category.CAST_COPY]
        assert not torch.cuda.is_available()
    """)


def test_optimizers_keep_their_own_rules_about_multi_tensor_kernels():
    in_its_own_process("""
        def copies(optimizer):
            trace = traced(nn.Linear(64, 64), 3, optimizer=optimizer)
            return sum(s.operator.startswith("aten._foreach") for s in trace.sites)

        assert copies(torch.optim.AdamW) > 0
        assert copies(lambda p: torch.optim.AdamW(p, foreach=False)) == 0
        assert copies(torch.optim.Adafactor) == 0  # a loop on CUDA too
    """)


def test_low_rank_adapters_have_gradients_and_state_and_the_frozen_weights_have_none():
    in_its_own_process("""
        class LoRA(nn.Module):
            def __init__(self, base, rank):
                super().__init__()
                self.base = base.requires_grad_(False)
                self.down = nn.Linear(base.in_features, rank, bias=False)
                self.up = nn.Linear(rank, base.out_features, bias=False)
            def forward(self, x):
                return self.base(x) + self.up(self.down(x))

        adapted = (LoRA(nn.Linear(64, 64), 4) for _ in range(3))
        model = nn.Sequential(nn.Embedding(50, 64).requires_grad_(False), *adapted)
        data = lambda n: torch.zeros(n, 9, dtype=torch.long)
        trace = traced(model, 5, data=data, training_step=lambda model, tokens: model(tokens).square().mean())
        frozen, trained = 4 * (50 * 64 + 3 * (64 * 64 + 64)), 4 * 3 * 2 * 64 * 4
        end = bytes_of(trace, trace.alive_at(len(trace.events)))
        assert end[Category.PARAMETER] == frozen + trained
        assert end[Category.OPTIMIZER_STATE] == 2 * trained
        gradients = [i for i in range(len(trace.sites)) if trace.sites[i].category is Category.GRADIENT]
        assert sum(trace.sizes[i] for i in gradients) == 2 * trained  # in two steps
        assert {trace.sites[i].module.rpartition(".")[2] for i in gradients} == {"down", "up"}
        kept = [i for i, s in enumerate(trace.sites) if s.category is Category.SAVED and s.module.endswith("base")]
        assert not kept
    """)


def test_products_of_groups_are_traced_in_any_type():
    in_its_own_process("""
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4, 32, 64))
            def forward(self, x):
                ends = torch.arange(1, 5, dtype=torch.int32, device=x.device) * (len(x) // 4)
                return torch._grouped_mm(x, self.weight, ends)

        data = lambda n: (torch.ones(n, 32), torch.ones(n))
        for trace in (
            traced(Experts(), 16, 16, loss=lambda out, target: out.square().sum(), data=data),
            traced(Experts().bfloat16(), 16, 16, loss=lambda out, target: out.square().sum(),
                   data=lambda n: (torch.ones(n, 32, dtype=torch.bfloat16), torch.ones(n))),
        ):
            size = trace.sizes[0] // (4 * 32 * 64)
            made = [(i, s) for i, s in enumerate(trace.sites) if s.operator == "aten._grouped_mm.default"]
            assert {trace.sizes[i] for i, s in made if s.phase is Phase.FORWARD} == {16 * 64 * size}
            assert {trace.sizes[i] for i, s in made if s.phase is Phase.BACKWARD} == {4 * 32 * 64 * size}
    """)
