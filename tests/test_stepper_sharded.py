"""Models under `fully_shard`, of which one rank runs out of memory while the others wait for it within the pass."""

import pytest
from torchrun import torchrun

pytestmark = pytest.mark.xdist_group("sharded")  # so that one worker starts the ranks, for all that look at them

IMPORTS = """
import resource
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from plans import plan_of
from stepping import Tagger, distance, texts, token_mean

class Block(nn.Module):
    '''With random numbers, and a buffer that every pass changes.'''
    def __init__(self):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(6, 12), nn.Linear(12, 6), nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += x.detach().float().sum()
        return x + self.drop(self.down(self.up(x).tanh()))

class RunsOut(torch.autograd.Function):
    '''Memory that runs out at the times given, of those that a pass comes here in a step, forward or backward.'''
    @staticmethod
    def forward(ctx, x, way, times, came):
        ctx.plan = way, times, came
        if way == "forward":
            RunsOut.come(times, came)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        way, times, came = ctx.plan
        if way == "backward":
            RunsOut.come(times, came)
        return gradient, None, None, None

    @staticmethod
    def come(times, came):
        came.append(1)
        if len(came) in times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 6), Block(), Block(), Block(), nn.Linear(6, 1))

def batch_of(n, seed):
    generator = torch.Generator().manual_seed(10 * seed + rank)
    return torch.randn(n, 4, generator=generator), torch.randn(n, 1, generator=generator)

def training(sharded=lambda model: fully_shard(model), plants=(), size=4, evaluates=False):
    '''Two optimizer steps; in the second, memory runs out as planted, or micro-batches have `size` samples at most.'''
    model = Net()
    sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    stepper = plan_of(24, 4, ranks=2, rank=rank).stepper(model, optimizer, loss=nn.MSELoss(), clip_grad_norm=1.0)
    torch.manual_seed(100 + rank)
    for step in range(2):
        if evaluates:  # which leaves the root's parameters gathered
            model.eval()
            with torch.no_grad():
                model(torch.ones(1, 4))
            model.train()
        if step == 1:
            stepper.load_state_dict(stepper.state_dict() | {"largest": size})
            for block, way, *times in plants:
                came = []
                model[block].drop.register_forward_hook(
                    lambda module, args, out, way=way, times=times, came=came: RunsOut.apply(out, way, times, came))
        stepper.step(batch_of(12, step))
    values = [p.full_tensor() for p in model.parameters()] + list(model.buffers())
    return values, [(e.step, e.from_size, e.to_size, e.rank) for e in stepper.events]

def nested(**options):
    def shard(model):
        for block in list(model)[1:4]:
            fully_shard(block, **options)
        fully_shard(model, **options)
    return shard

def ends_as(expected, **arguments):
    values, events = training(**arguments)
    print(all(map(torch.equal, values, expected)), events, file=out)
"""
PLACES = """
half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for sharded in (fully_shard, nested(), nested(reshard_after_forward=False), nested(mp_policy=half)):
    expected, _ = training(sharded, size=3)
    # block 1 or 3, in the first, second or last of three passes, on one rank
    for plant in ((3, "forward", 1), (1, "forward", 3), (3, "backward", 2), (1, "backward", 3)):
        ends_as(expected, sharded=sharded, plants=[plant] if rank == 1 else [])
"""
AGAIN = """
expected, _ = training(nested(), size=3)
both = [(2, "forward", 2)] if rank == 0 else [(1, "backward", 3)]  # on both ranks, at other places
ends_as(expected, sharded=nested(), plants=both)
further = [(2, "forward", 2, 5)] if rank == 0 else []  # and again two passes later, when it has caught up
ends_as(expected, sharded=nested(), plants=further)
expected, _ = training(nested(), size=2)
smaller = [(2, "forward", 2, 7)] if rank == 0 else []  # and again in the step that is run again
ends_as(expected, sharded=nested(), plants=smaller)
expected, _ = training(nested(), size=3, evaluates=True)
ends_as(expected, sharded=nested(), plants=[(2, "forward", 2)] if rank == 0 else [], evaluates=True)
"""
REAL = """
class Wide(nn.Module):
    '''Whose activations are far larger than its weights.'''
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(4, 4096), nn.LayerNorm(4096), nn.Linear(4096, 1)

    def forward(self, x):
        return self.outer(self.norm(self.inner(x)).relu())

def wide(limited):
    torch.manual_seed(0)
    model = Wide()
    for module in (model.inner, model.norm, model):
        fully_shard(module)
    stepper = plan_of(4096, 1024, ranks=2, rank=rank).stepper(
        model, torch.optim.SGD(model.parameters(), lr=0.001), loss=nn.MSELoss())
    for step in range(3):
        if limited and step == 1 and rank == 1:  # 1024 samples take 16 MiB in each of three tensors and more
            taken = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_DATA, (taken + (44 << 20), resource.RLIM_INFINITY))
        stepper.step(batch_of(2048, step))
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return [p.full_tensor() for p in model.parameters()], stepper.events

expected, _ = wide(False)
values, (event, *_) = wide(True)
print(all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(values, expected)), file=out)
print(event.step, event.from_size, event.to_size, event.rank, "allocate" in event.message, file=out)
"""
STRANDED = """
always = [(2, "forward", *range(2, 99))] if rank == 1 else []
try:
    training(nested(), plants=always)
except Exception as error:
    print(type(error).__name__, error, file=out)
os._exit(0)  # as a rank does that ends with an error, which frees the other
"""
FAILS = """
class Bug(nn.Module):
    def forward(self, x):
        if rank == 1:
            raise LookupError("on this rank only")
        return x
def buggy(model):
    model.append(Bug())
    fully_shard(model)
try:
    training(buggy)
except Exception as error:
    print(type(error).__name__, error, file=out)
os._exit(0)
"""

BROKEN_OFF = """
class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        raise FloatingPointError("on all ranks")

half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
def gradients(way, failing, **options):
    model, passes, seen = Net(), [], []
    nested(**options)(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.full_tensor().clone() for p in model.parameters()]))
    def step(model, batch):
        passes.append(1)
        loss = nn.functional.mse_loss(model.eval()(batch[0]).float(), batch[1])
        if len(passes) == failing and way == "backward":
            loss = Fails.apply(loss)
        elif len(passes) == failing:
            raise FloatingPointError("on all ranks")
        return loss
    stepper = plan_of(24, 4, ranks=2, rank=rank).stepper(
        model, optimizer, training_step=step, reduction="mean", recover=way != "unrecovered")
    try:
        stepper.step(batch_of(12, 5))
    except FloatingPointError:
        stepper.step(batch_of(12, 1))
    else:
        stepper.step(batch_of(12, 1))
    return seen[-1]
for options in ({}, {"mp_policy": half}):
    expected = gradients("", 0, **options)
    for way in ("forward", "backward", "unrecovered"):
        for failing in (2, 3):
            print(distance(gradients(way, failing, **options), expected) < 1e-6, file=out)
"""
LOOKED = """
def plan():
    return plan_of(24, 4, ranks=2, rank=rank, batch_dims={"tokens": 0, "labels": 0})
def tagger():
    torch.manual_seed(0)
    model = Tagger()
    for module in (model.embedding, model.scores, model):
        fully_shard(module)
    return model
whole = texts(24)
own = {k: v[12 * rank : 12 * rank + 12] for k, v in whole.items()}
torch.manual_seed(0)
expected = float(token_mean(Tagger(), whole))
def step(model, batch):
    scores = model(batch["tokens"])
    if rank == 1 and not torch.is_grad_enabled() and len(batch["tokens"]) > most:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return nn.functional.cross_entropy(scores.transpose(1, 2), batch["labels"])
for precision in ("fp32", "bf16"):
    for most in (3, 2, 1):  # samples that one of the ranks can run together to find out what the loss is
        model = tagger()
        stepper = plan().model_copy(update={"precision": precision}).stepper(
            model, torch.optim.SGD(model.parameters(), lr=0.1), training_step=step)
        try:
            print(abs(float(stepper.step(own)) / expected - 1) < (1e-5 if precision == "fp32" else 1e-2), file=out)
        except Exception as error:
            print(type(error).__name__, "with two samples together" in str(error), file=out)
model = tagger()
try:
    plan().stepper(model, torch.optim.SGD(model.parameters()), training_step=step, recover=False).step(own)
except Exception as error:
    print(type(error).__name__, "Say what it is" in str(error), file=out)
"""
FILLED_UP = """
from autobatch import InvalidInput
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
both = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (12, 3)]
mean = 0.1 * model[0](torch.cat(both)).detach().mean(0)
fully_shard(model)
stepper = plan_of(24, 4, ranks=2, rank=rank, min_micro_batch_size=2).stepper(
    model, torch.optim.SGD(model.parameters(), lr=0.0), training_step=lambda net, x: net(x).mean(), reduction="mean")
result = stepper.step(both[rank])
print(result.samples, result.micro_batches, torch.allclose(model[1].running_mean, mean), file=out)
with torch.device("meta"):
    unmade = nn.Linear(3, 1)
fully_shard(unmade, mesh=init_device_mesh("cpu", (2,)))
try:
    plan_of(24, 4, ranks=2, rank=rank).stepper(unmade, torch.optim.SGD(unmade.parameters()))
except InvalidInput as error:
    print("has parameters on meta" in str(error), file=out)
"""
OTHER_NAMES = """
from autobatch.training import fsdp2
fsdp2._OF_PARAMETERS = ("renamed",)  # as another torch may have
def step(model, batch):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
model = Net()
nested()(model)
stepper = plan_of(24, 4, ranks=2, rank=rank).stepper(
    model, torch.optim.SGD(model.parameters()), training_step=step, reduction="mean")
try:
    stepper.step(batch_of(12, 0))
except Exception as error:
    print(type(error).__name__, file=out)
"""
LOOK_FAILS = """
def step(model, batch):
    if rank == 1 and not torch.is_grad_enabled() and len(batch[0]) > 1:
        raise LookupError("on this rank only")
    return model(batch[0]).square().mean()
model = Net()
nested()(model)
try:
    plan_of(24, 4, ranks=2, rank=rank).stepper(model, torch.optim.SGD(model.parameters()), training_step=step).step(
        batch_of(12, 0))
except Exception as error:
    print(type(error).__name__, error, file=out)
os._exit(0)
"""
CANNOT_CATCH_UP = """
passes = []
def step(model, batch):
    passes.append(1)
    loss = nn.functional.mse_loss(model(batch[0]), batch[1])
    if rank == 1 and len(passes) == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if len(batch[0]) == 1:
        raise ValueError("there have to be two samples")
    return loss
model = Net()
nested()(model)
try:
    plan_of(24, 4, ranks=2, rank=rank).stepper(
        model, torch.optim.SGD(model.parameters()), training_step=step, reduction="mean").step(batch_of(12, 0))
except Exception as error:
    print(type(error).__name__, error, file=out)
os._exit(0)
"""


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return torchrun(
        folder,
        2,
        IMPORTS,
        places=PLACES,
        again=AGAIN,
        broken_off=BROKEN_OFF,
        looked=LOOKED,
        filled_up=FILLED_UP,
        other_names=OTHER_NAMES,
    )


def test_wherever_a_rank_runs_out_training_ends_as_if_it_had_begun_with_the_smaller_size(on_two_ranks):
    assert on_two_ranks["places"] == ["\n".join(["True [(1, 4, 3, 1)]"] * 16)] * 2


def test_ranks_that_run_out_together_or_again_catch_up_too(on_two_ranks):
    once = "True [(1, 4, 3, 0)]"
    assert on_two_ranks["again"] == ["\n".join([once, once, "True [(1, 4, 3, 0), (1, 3, 2, 0)]", once])] * 2


def test_a_rank_whose_memory_really_runs_out_catches_up(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # so that what is freed is given back
    assert torchrun(tmp_path, 2, IMPORTS, real=REAL)["real"] == ["True\n1 1024 819 1 True"] * 2


def test_a_rank_that_cannot_catch_up_says_so_and_ends_at_once(tmp_path):
    _, said = torchrun(tmp_path, 2, IMPORTS, stranded=STRANDED)["stranded"]
    assert said.startswith("NothingFits memory ran out on rank 1 in optimizer step 1 with micro-batches of 4 samples")
    assert said.endswith("by a plan with smaller micro-batches: fit(..., max_micro_batch=3).")


def test_a_rank_that_fails_within_a_pass_ends_at_once_with_its_own_error(tmp_path):
    _, said = torchrun(tmp_path, 2, IMPORTS, fails=FAILS)["fails"]
    assert said == "LookupError on this rank only"


def test_a_step_that_fails_leaves_nothing_to_the_gradients_of_the_next(on_two_ranks):
    assert on_two_ranks["broken_off"] == ["\n".join(["True"] * 12)] * 2


def test_what_the_loss_is_is_found_out_though_one_rank_runs_out_or_asked_for(on_two_ranks):
    once = ["True", "True", "InvalidInput True"]
    assert on_two_ranks["looked"] == ["\n".join([*once, *once, "InvalidInput True"])] * 2


def test_a_rank_that_alone_cannot_find_out_what_the_loss_is_ends_at_once(tmp_path):
    _, said = torchrun(tmp_path, 2, IMPORTS, fails=LOOK_FAILS)["fails"]
    assert "LookupError: on this rank only" in said and "Say what it is" in said


def test_a_rank_that_fails_where_it_catches_up_says_that_memory_ran_out_first(tmp_path):
    _, said = torchrun(tmp_path, 2, IMPORTS, fails=CANNOT_CATCH_UP)["fails"]
    assert said.startswith("NothingFits memory ran out on rank 1 in optimizer step 0 with micro-batches of 4 samples")
    assert "Tried to allocate 2.00 GiB; ValueError: there have to be two samples" in said


def test_micro_batches_that_only_keep_others_company_count_nowhere(on_two_ranks):
    first, second = (said.splitlines() for said in on_two_ranks["filled_up"])
    assert first[0] == "12 3 True" and second[0] == "3 3 True"


def test_parameters_that_are_not_where_the_model_is_run_are_refused(on_two_ranks):
    assert all(said.endswith("\nTrue") for said in on_two_ranks["filled_up"])


def test_with_a_torch_that_names_things_otherwise_nothing_is_recovered(on_two_ranks):
    assert on_two_ranks["other_names"] == ["OutOfMemoryError"] * 2
