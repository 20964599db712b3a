"""Knobs: each keeps the gradients, says where it cannot be used, and is undone to the bit."""

import copy
import json
import signal
from dataclasses import replace

import pytest
import timm
import torch
from plans import plan_of
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from autobatch import InvalidInput, TrainingPlan, Workload
from autobatch.tuning.configuration import Configuration
from autobatch.tuning.knobs import KNOBS, PLAIN, Situation
from autobatch.workload import resolve
from autobatch.workload.blocks import repeated_blocks
from autobatch.workload.runner import StepRunner
from autobatch.workload.step import TrainingStep


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return x + scale * self.drop(self.down(self.up(self.norm(x)).tanh().exp()))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.conv(x)).relu()


def convolutions() -> nn.Module:
    stages = [nn.Sequential(Residual(), Residual()) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*self.project(x).chunk(3, -1)).mean((1, 2)).square()


def blocks_workload(**parts) -> Workload:
    return Workload(Blocks(), lambda n: (torch.ones(n, 16), torch.zeros(n, 3)), F.mse_loss, **parts)


def convolutions_workload(**parts) -> Workload:
    return Workload(convolutions(), lambda n: (torch.rand(n, 3, 8, 8), torch.zeros(n, 3)), F.mse_loss, **parts)


def attention_workload() -> Workload:
    return Workload(Attention(), lambda n: (torch.ones(n, 4, 8), torch.zeros(n)), F.mse_loss)


def gradients_of(step) -> list[torch.Tensor]:
    """Of the loss of four samples, and what the step leaves in buffers."""
    torch.manual_seed(1)
    step.model.train()
    step.compute_loss(step.model, step.make_batch(4)).backward()
    found = [parameter.grad.clone() for parameter in step.model.parameters()]
    step.model.zero_grad()
    return found + [buffer.clone() for buffer in step.model.buffers()]


def saved_bytes(step) -> int:
    """What a forward pass keeps for its backward pass."""
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step.compute_loss(step.model, step.make_batch(8))
    return kept


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list:
    """All that knobs could leave behind: values, strides, attributes, methods, hooks, and the optimizer's settings."""
    told = [(name, t.stride(), t.detach().clone().numpy().tobytes()) for name, t in model.state_dict().items()]
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if not k.startswith("_") and not isinstance(v, nn.Module)}
        tables = {k: list(v) for k, v in vars(module).items() if k.endswith("_hooks")}
        told.append((name, own, tables, module.forward.__func__, "forward" in vars(module)))
    if optimizer is not None:
        told.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
        told += [
            (k, v.dtype, v.tolist()) if torch.is_tensor(v) else v
            for s in optimizer.state.values()
            for k, v in s.items()
        ]
        told.append(set(vars(optimizer)))
    return told


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("make", "knobs"),
    [
        (blocks_workload, {"checkpointing": "on"}),
        (convolutions_workload, {"checkpointing": "on"}),
        (convolutions_workload, {"channels_last": "on"}),
        (convolutions_workload, {"channels_last": "on", "checkpointing": "on"}),
        (attention_workload, {"attention": "math"}),
    ],
)
def test_gradients_and_running_statistics_are_those_of_the_plain_model(make, knobs) -> None:
    workload = make()
    torch.manual_seed(0)
    data = workload.data(4)
    step = resolve(Workload(workload.model, data, workload.loss))
    before = copy.deepcopy(workload.model.state_dict())
    plain = gradients_of(step)
    workload.model.load_state_dict(before)
    with Configuration(knobs).applied(step) as configured:
        changed = gradients_of(configured)
    for ours, theirs in zip(changed, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("instance", [False, True])
def test_an_optimizer_takes_the_same_steps_by_every_implementation(implementation: str, instance: bool) -> None:
    def trained(configuration: Configuration) -> tuple[list, dict]:
        torch.manual_seed(0)
        workload = blocks_workload()
        optimizer = torch.optim.AdamW(workload.model.parameters(), lr=0.01) if instance else None
        step = resolve(Workload(workload.model, workload.data, workload.loss, optimizer=optimizer))
        if instance:
            StepRunner(step).run((2,))
        with configuration.applied(step) as configured:
            runner = StepRunner(configured)
            for _ in range(3):
                runner.run((2, 1))
            return [p.detach().clone() for p in workload.model.parameters()], runner.optimizer.param_groups[0].copy()

    plain, _ = trained(Configuration({}))
    ours, group = trained(Configuration({"optimizer": implementation}))
    assert (group["foreach"], group["fused"]) == (implementation == "foreach", implementation == "fused")
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("make", [blocks_workload, convolutions_workload])
def test_checkpointing_keeps_less_for_the_backward_pass(make) -> None:
    step = resolve(make())
    plain = saved_bytes(step)
    with Configuration({"checkpointing": "on"}).applied(step):
        assert saved_bytes(step) < 0.7 * plain
    assert saved_bytes(step) == plain


def test_convolutions_run_on_channels_last_and_channels_first_again_afterwards() -> None:
    step = resolve(convolutions_workload())
    seen: list[torch.Tensor] = []
    step.model[0].register_forward_hook(lambda module, args, output: seen.extend([*args, output]))
    with Configuration({"channels_last": "on"}).applied(step):
        step.compute_loss(step.model, step.make_batch(2))
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)
    seen.clear()
    step.compute_loss(step.model, step.make_batch(2))
    assert all(tensor.is_contiguous() for tensor in seen)


def test_precision_is_that_of_the_step_and_of_the_mathematics_no_more() -> None:
    configuration = Configuration({"precision": "bf16"})
    with configuration.applied(resolve(blocks_workload())) as configured:
        assert configured.precision == "bf16"
    assert not configuration.keeps_mathematics
    assert Configuration({"checkpointing": "on"}).keeps_mathematics


@pytest.mark.parametrize("ends", ["well", "in an error", "by Ctrl-C"])
def test_the_callers_model_and_optimizer_are_afterwards_what_they_were(ends: str) -> None:
    workload = convolutions_workload()
    optimizer = torch.optim.AdamW(workload.model.parameters())
    step = resolve(Workload(workload.model, workload.data, workload.loss, optimizer=optimizer))
    StepRunner(step).run((2,))
    workload.model[0].weight.data = torch.rand(8, 3, 3, 3).transpose(0, 0).flip(0)
    step.model.eval()
    before, random_before = everything(step.model, optimizer), torch.get_rng_state()
    assert torch.backends.cuda.flash_sdp_enabled()
    knobs = {"checkpointing": "on", "optimizer": "fused", "channels_last": "on", "attention": "math"}
    try:
        with Configuration(knobs).applied(step):
            assert everything(step.model, optimizer) != before
            assert not torch.backends.cuda.flash_sdp_enabled()
            torch.rand(3)
            if ends == "in an error":
                raise RuntimeError("of the user's")
            if ends == "by Ctrl-C":
                signal.raise_signal(signal.SIGINT)
    except (RuntimeError, KeyboardInterrupt):
        assert ends != "well"
    assert everything(step.model, optimizer) == before
    assert torch.equal(torch.get_rng_state(), random_before)
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_knob_that_fails_half_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    step = resolve(convolutions_workload())
    before = everything(step.model)

    def fail(*_: object) -> None:
        raise NotImplementedError("not on this model")

    broken = copy.copy(KNOBS["compile"])
    object.__setattr__(broken, "apply", fail)
    monkeypatch.setitem(KNOBS, "compile", broken)
    with (
        pytest.raises(NotImplementedError),
        Configuration({"channels_last": "on", "checkpointing": "on", "compile": "on"}).applied(step),
    ):
        pass
    assert everything(step.model) == before


def test_models_with_a_switch_of_their_own_use_that() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, use_cache=False))
    step = resolve(Workload(gpt2))
    with Configuration({"checkpointing": "on"}).applied(step):
        assert gpt2.is_gradient_checkpointing
        assert "on" not in possible(step, "checkpointing")
    assert not gpt2.is_gradient_checkpointing
    assert possible(step, "checkpointing") == {"on"}


def test_a_switch_by_which_batchnorm_would_see_batches_twice_is_not_used() -> None:
    model = timm.create_model("resnet18", num_classes=4)
    step = resolve(Workload(model, lambda n: (torch.rand(n, 3, 32, 32), torch.zeros(n, dtype=torch.long))))
    with Configuration({"checkpointing": "on"}).applied(step):
        step.compute_loss(step.model.train(), step.make_batch(2)).backward()
        assert not model.grad_checkpointing
    assert model.bn1.num_batches_tracked == model.layer4[0].bn1.num_batches_tracked == 1


def possible(step, name: str, device: str = "cpu") -> set[str]:
    """The values other than the plain one that a knob can take."""
    knob, situation = KNOBS[name], Situation(step, device)
    return {value for value in knob.values if value != PLAIN and knob.obstacle(situation, value) is None}


def test_knobs_are_offered_where_they_apply_and_say_why_elsewhere() -> None:
    flat = resolve(Workload(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))))
    blocks, images, attention = map(resolve, (blocks_workload(), convolutions_workload(), attention_workload()))
    assert possible(blocks, "checkpointing") == possible(images, "checkpointing") == {"on"}
    assert not possible(flat, "checkpointing")
    assert possible(images, "channels_last") == {"on"}
    assert not possible(blocks, "channels_last")
    assert possible(attention, "attention", "cuda") == {"flash", "efficient", "cudnn", "math"}
    assert not possible(attention, "attention", "cpu")
    assert not possible(blocks, "attention", "cuda")
    assert possible(blocks, "compile") == {"on"}
    compiled = resolve(Workload(torch.compile(Blocks()), torch.ones(4, 16)))
    assert not possible(compiled, "compile")
    why = KNOBS["channels_last"].obstacle(Situation(blocks, "cpu"), "on")
    assert why == "the model has no convolutions over images or volumes"


def test_optimizers_offer_the_implementations_that_they_have() -> None:
    def offered(optimizer) -> set[str]:
        return possible(resolve(blocks_workload(optimizer=optimizer)), "optimizer")

    assert offered(torch.optim.AdamW) == {"for-loop", "foreach", "fused"}
    assert offered(torch.optim.RMSprop) == {"for-loop", "foreach"}
    assert offered(torch.optim.SparseAdam) == set()
    assert offered(lambda p: torch.optim.SGD(p, lr=0.1, foreach=True)) == set()


def test_repeated_blocks_are_the_finest_that_are_most_of_the_model() -> None:
    model = convolutions()
    assert repeated_blocks(model) == [model[1][0], model[1][1], model[2][0], model[2][1]]
    assert repeated_blocks(nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))) == []


def test_configurations_are_equal_by_what_they_change() -> None:
    one = Configuration({"compile": PLAIN, "optimizer": "fused", "checkpointing": "on"})
    other = Configuration({"checkpointing": "on", "optimizer": "fused"})
    assert one == other and hash(one) == hash(other) and one.as_json() == other.as_json()
    assert str(Configuration({})) == "plain"
    with pytest.raises(InvalidInput, match="no knob 'speed'; there are checkpointing"):
        Configuration({"speed": "on"})
    with pytest.raises(InvalidInput, match="no value 'off'; it has plain, on"):
        Configuration({"compile": "off"})


def plan_with(**knobs: str):
    return plan_of(8, 4, knobs=knobs)


def test_a_plan_applies_its_knobs_for_training() -> None:
    model = convolutions()
    optimizer = torch.optim.AdamW(model.parameters())
    plan_with(checkpointing="on", channels_last="on", optimizer="foreach").apply(model, optimizer)
    assert optimizer.param_groups[0]["foreach"]
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    step = TrainingStep(model, lambda n: torch.rand(n, 3, 8, 8), lambda m, x: m(x).square().mean(), optimizer)
    kept = saved_bytes(step)
    assert kept < 0.7 * saved_bytes(replace(step, model=convolutions()))
    plan_with(checkpointing="on").apply(model)
    assert saved_bytes(step) == kept  # no second time


def test_a_plan_compiles_the_model_in_place() -> None:
    model = Blocks()
    names = list(model.state_dict())
    plan_with(compile="on").apply(model)
    assert model._compiled_call_impl is not None
    assert list(model.state_dict()) == names


def test_a_plan_says_what_its_knobs_need() -> None:
    plan, model = plan_with(optimizer="fused"), Blocks()
    with pytest.raises(InvalidInput, match=r"pass the optimizer as well, as in plan\.apply\(model, optimizer\)"):
        plan.apply(model)
    with pytest.raises(InvalidInput, match="RMSprop has no fused implementation"):
        plan.apply(model, torch.optim.RMSprop(model.parameters()))
    assert "optimizer=fused" in str(plan) and "plan.apply" in plan.code()
    plan_with().apply(model)


def test_knobs_are_in_the_plans_file_and_older_files_have_none(tmp_path) -> None:
    path = tmp_path / "plan.json"
    plan_with(checkpointing="on").save(path)
    assert TrainingPlan.load(path).knobs == {"checkpointing": "on"}
    older = json.loads(path.read_text())
    del older["knobs"]
    path.write_text(json.dumps(older))
    assert TrainingPlan.load(path).knobs == {}
