"""Training on several ranks, against plain training on the whole batch."""

import pytest
from torchrun import torchrun

IMPORTS = """
import copy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from plans import plan_of
from stepping import Kept, Tagger, distance, gradients_of, sample_mean, texts, token_mean, token_sum
torch.set_default_dtype(torch.float64)

def fresh():
    torch.manual_seed(0)
    return Tagger()

def own(plans, batch):
    '''This rank's share of a whole batch.'''
    start = sum(sum(plans(r).micro_batch_sizes) for r in range(rank))
    return {k: v[start : start + sum(plans(rank).micro_batch_sizes)] for k, v in batch.items()}
"""
WHOLE = """
model = fresh()
for samples, recover in ((24, True), (23, True), (23, False)):
    plans = lambda r: plan_of(samples, 3, ranks=ranks, rank=r)
    plain, wrapped = copy.deepcopy(model), DistributedDataParallel(model)
    optimizer = Kept(model.parameters(), lr=0.1)
    stepper = plans(rank).stepper(wrapped, optimizer, training_step=token_mean, recover=recover)
    for seed in range(2):
        whole = texts(samples, seed=seed)
        expected = gradients_of(plain, token_mean, whole)
        loss = float(token_mean(plain, whole).detach())
        result = stepper.step(own(plans, whole))
        print(distance(optimizer.seen, expected) < 1e-12, abs(float(result) / loss - 1) < 1e-12, file=out)
        plain.load_state_dict(model.state_dict())
print(result.samples, result.micro_batches, file=out)
"""
TRAVEL = """
model = fresh()
import torch.distributed as dist
plans = lambda r: plan_of(24, 3, ranks=2, rank=r)
for recover in (True, False):
    twin = copy.deepcopy(model)
    wrapped = DistributedDataParallel(twin)
    calls = []
    if not recover:
        def hook(state, bucket):
            calls.append(bucket.buffer().numel())
            return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(
                lambda f: f.value()[0])
        wrapped.register_comm_hook(None, hook)
    else:
        reduce = dist.all_reduce
        def counted(tensor, *args, **kwargs):
            calls.append(tensor.numel())
            return reduce(tensor, *args, **kwargs)
        dist.all_reduce = counted
    stepper = plans(rank).stepper(
        wrapped, Kept(twin.parameters()), training_step=sample_mean, reduction="mean", recover=recover)
    stepper.step(own(plans, texts(24)))
    dist.all_reduce = reduce
    print(sum(n for n in calls if n > 1) == sum(p.numel() for p in twin.parameters()), file=out)
"""
UNEQUAL = """
model = fresh()
from autobatch.plan import RankShare
parts = [RankShare(samples=17, max_micro_batch_size=10), RankShare(samples=6, max_micro_batch_size=2)]
first = plan_of(23, 12, ranks=2, rank=0).model_copy(
    update={"rank_shares": parts, "micro_batch_sizes": (9, 8), "max_micro_batch_size": 10})
plans = lambda r: first.for_rank(r)
def step(model, batch):
    if rank == 1 and stepper.steps == 1 and len(batch["tokens"]) == 2:
        torch.empty(1 << 50)
    return token_mean(model, batch)
plain, wrapped = copy.deepcopy(model), DistributedDataParallel(model)
optimizer = Kept(model.parameters(), lr=0.1)
count = lambda batch: (batch["labels"] != -100).sum()
stepper = plans(rank).stepper(wrapped, optimizer, training_step=step, reduction=count)
for seed in range(2):
    whole = texts(23, seed=seed)
    expected = gradients_of(plain, token_mean, whole)
    stepper.step(own(plans, whole))
    print(distance(optimizer.seen, expected) < 1e-12, file=out)
    plain.load_state_dict(model.state_dict())
print(stepper.micro_batch_sizes, len(stepper.events), file=out)
"""
FOUND_OUT = """
for step in (token_mean, token_sum, sample_mean):  # one micro-batch on each rank, or one sample
    for samples in (12, 3):
        model = fresh()
        plans = lambda r: plan_of(samples, 8, ranks=2, rank=r, batch_dims={"tokens": 0, "labels": 0})
        plain, wrapped = copy.deepcopy(model), DistributedDataParallel(model)
        optimizer = Kept(model.parameters(), lr=0.1)
        whole = texts(samples)
        expected = gradients_of(plain, step, whole)
        plans(rank).stepper(wrapped, optimizer, training_step=step).step(own(plans, whole))
        print(distance(optimizer.seen, expected) < 1e-12, file=out)
"""
LITTLE_MEMORY = """
model = fresh()
plans = lambda r: plan_of(12, 3, ranks=2, rank=r)
plain, wrapped = copy.deepcopy(model), DistributedDataParallel(model)
def step(model, batch):
    if rank == 1 and not torch.is_grad_enabled() and len(batch["tokens"]) > most:
        torch.empty(1 << 50)
    return token_mean(model, batch)
most = 2  # samples together, without gradients
optimizer = Kept(model.parameters(), lr=0.1)
stepper = plans(rank).stepper(wrapped, optimizer, training_step=step)
for seed in range(11):  # it is found out in the first, and looked at again in the tenth
    whole = texts(12, seed=seed)
    expected = gradients_of(plain, token_mean, whole)
    stepper.step(own(plans, whole))
    assert distance(optimizer.seen, expected) < 1e-12
    plain.load_state_dict(model.state_dict())
most = 1
try:
    plans(rank).stepper(wrapped, optimizer, training_step=step).step(own(plans, whole))
except Exception as error:
    print(type(error).__name__, error, file=out)
"""
IDLE = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
count = lambda batch: (batch["labels"] != -100).sum()
whole = texts(12)
whole["labels"][:6] = -100  # nothing counts on the first rank
plans = lambda r: plan_of(12, 3, ranks=2, rank=r, batch_dims={"tokens": 0, "labels": 0})
model = fresh()
plain, wrapped = copy.deepcopy(model), DistributedDataParallel(model)
expected = gradients_of(plain, token_mean, whole)
optimizer = Kept(model.parameters(), lr=0.1)
plans(rank).stepper(wrapped, optimizer, training_step=token_mean, reduction=count).step(own(plans, whole))
print(distance(optimizer.seen, expected) < 1e-12, file=out)
sharded = fresh()
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
stepper = plans(rank).stepper(sharded, torch.optim.SGD(sharded.parameters()), training_step=token_mean, reduction=count)
try:
    stepper.step(own(plans, whole))
except Exception as error:
    print(str(error)[:42], file=out)
whole = texts(12)
whole["labels"][:3] = -100  # nothing counts in one of its micro-batches
micros = [{k: v[:3] for k, v in own(plans, whole).items()}, {k: v[3:] for k, v in own(plans, whole).items()}]
for micro in stepper.accumulate(micros):
    result = micro.backward()
print(abs(float(result) / float(token_mean(plain, whole).detach()) - 1) < 1e-10, file=out)
"""
SHORT = """
model = fresh()
plain, wrapped = copy.deepcopy(model), DistributedDataParallel(model)
optimizer = Kept(model.parameters(), lr=0.1)
plan = plan_of(24, 5, ranks=2, rank=rank, batch_dims={"tokens": 0, "labels": 0})
whole = texts(10)
expected = gradients_of(plain, sample_mean, whole)
stepper = plan.stepper(wrapped, optimizer, training_step=sample_mean, reduction="mean")
stepper.step({k: v[:3] if rank == 0 else v[3:] for k, v in whole.items()})
print(distance(optimizer.seen, expected) < 1e-12, file=out)
"""
MARKED = """
torch.manual_seed(0)
model = nn.Linear(6, 7)
def step(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], ignore_index=254)
inputs, labels = torch.randn(24, 6), torch.randint(7, (24,))
labels[12:20:2] = 254  # on the second rank alone
plan = plan_of(24, 4, ranks=2, rank=rank)
plain, wrapped = copy.deepcopy(model), DistributedDataParallel(model)
optimizer = Kept(model.parameters(), lr=0.1)
expected = gradients_of(plain, step, (inputs, labels))
own_part = slice(12 * rank, 12 * rank + 12)
plan.stepper(wrapped, optimizer, training_step=step).step((inputs[own_part], labels[own_part]))
print(distance(optimizer.seen, expected) < 1e-12, file=out)
"""
BOTH_RUN_OUT = """
model = fresh()
plan = plan_of(24, 6, ranks=2, rank=rank, batch_dims={"tokens": 0, "labels": 0})
whole, attempts = texts(7), []
def step(model, batch):
    attempts.append(len(batch["tokens"]))
    if len(attempts) == 1:
        torch.empty(1 << 50)
    return sample_mean(model, batch)
stepper = plan.stepper(DistributedDataParallel(model), Kept(model.parameters()), training_step=step, reduction="mean")
stepper.step({k: v[:2] if rank == 0 else v[2:] for k, v in whole.items()})
print([(e.from_size, e.to_size, e.rank) for e in stepper.events], attempts, file=out)
"""
UNUSED = """
model = fresh()
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.never = nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 1)
    def forward(self, x):
        return (self.left if x[0, 0] > 0 else self.right)(x)
model = Two()
wrapped = DistributedDataParallel(model, find_unused_parameters=True)
plan = plan_of(8, 2, ranks=2, rank=rank)
seen = {}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer.register_step_pre_hook(
    lambda *_: seen.update({n: None if p.grad is None else p.grad.sum().item()
                            for n, p in model.named_parameters()}))
plan.stepper(wrapped, optimizer, training_step=lambda m, b: m(b).mean(), reduction="mean").step(
    torch.ones(4, 3) * (1 if rank == 0 else -1))
print([seen[name] for name in ("left.bias", "right.bias", "never.bias")], file=out)
"""
OOM = """
model = fresh()
plans = lambda r: plan_of(24, 6, ranks=ranks, rank=r)
plain, wrapped = copy.deepcopy(model), DistributedDataParallel(model)
def step(model, batch):
    loss = token_mean(model, batch)
    if rank == 1 and stepper.steps == 1 and len(batch["tokens"]) > 4:
        loss.backward(retain_graph=True)  # some gradients are there already
        torch.empty(1 << 50)
    return loss
count = lambda batch: (batch["labels"] != -100).sum()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
stepper = plans(rank).stepper(wrapped, optimizer, training_step=step, reduction=count)
theirs = torch.optim.AdamW(plain.parameters(), lr=0.01)
for seed in range(4):
    whole = texts(24, seed=seed)
    stepper.step(own(plans, whole))
    theirs.zero_grad()
    token_mean(plain, whole).backward()
    theirs.step()
print(distance(list(model.parameters()), list(plain.parameters())) < 1e-10, file=out)
print([(e.step, e.from_size, e.to_size, e.rank) for e in stepper.events], stepper.micro_batch_sizes, file=out)
"""
STATISTICS = """
model = fresh()
model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
plain, wrapped = copy.deepcopy(model), DistributedDataParallel(model)
whole = torch.randn(21, 3, generator=torch.Generator().manual_seed(1)) + 3
plan = plan_of(21, 4, ranks=2, rank=rank)
stepper = plan.stepper(
    wrapped, torch.optim.SGD(model.parameters(), lr=0.0), training_step=lambda m, b: m(b).mean(), reduction="mean")
for _ in range(2):
    stepper.step(whole[:11] if rank == 0 else whole[11:])
    plain(whole)
print(torch.allclose(model[0].running_mean, plain[0].running_mean, rtol=1e-12), file=out)
print(model[0].num_batches_tracked.item(), file=out)
"""
REFUSED = """
model = fresh()
try:
    plan_of(24, 6, ranks=2, rank=rank).stepper(
        DistributedDataParallel(model, static_graph=True), Kept(model.parameters()), training_step=token_mean)
except Exception as error:
    print(type(error).__name__, str(error)[:60], file=out)
"""
FAILS = """
model = fresh()
plans = lambda r: plan_of(24, 6, ranks=ranks, rank=r)
def step(model, batch):
    if rank == 1:
        raise LookupError("on this rank only")
    return token_mean(model, batch)
stepper = plans(rank).stepper(
    DistributedDataParallel(model), Kept(model.parameters()), training_step=step, reduction="mean")
try:
    stepper.step(own(plans, texts(24)))
except Exception as error:
    print(type(error).__name__, error, file=out)
"""
DIES = """
model = fresh()
plans = lambda r: plan_of(24, 6, ranks=ranks, rank=r)
def step(model, batch):
    if rank == 1:
        os._exit(0)
    return token_mean(model, batch)
stepper = plans(rank).stepper(
    DistributedDataParallel(model), Kept(model.parameters()), training_step=step, reduction="mean")
try:
    stepper.step(own(plans, texts(24)))
except Exception as error:
    print(type(error).__name__, error, file=out)
"""
IGNORED = """
model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
model.register_buffer("own", torch.full((2,), float(rank)))
model.register_buffer("shared", torch.full((2,), float(rank)))
DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["own", "1.running_mean"])
model[1].running_mean.fill_(rank)
model[1].momentum = 0.0
plan_of(8, 4, ranks=2, rank=rank).stepper(
    DistributedDataParallel(model), Kept(model.parameters()), training_step=lambda model, x: model(x).mean(),
    reduction="mean").step(torch.randn(4, 3))
print(model.own.tolist(), model.shared.tolist(), model[1].running_mean.tolist(), file=out)
"""
BODY_FAILS = """
model = fresh()
stepper = plan_of(24, 4, ranks=2, rank=rank).stepper(
    DistributedDataParallel(model), Kept(model.parameters()), training_step=token_mean, reduction="mean")
own_texts = texts(12)
try:
    for i, micro in enumerate(stepper.accumulate({k: v[j : j + 4] for k, v in own_texts.items()} for j in (0, 4, 8))):
        micro.backward(torch.ones(2, requires_grad=True) if rank == 1 and i == 1 else None)
except Exception as error:
    print(type(error).__name__, str(error)[:30], file=out)
"""
SHARDED = """
model = fresh()
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
plans = lambda r: plan_of(23, 3, ranks=ranks, rank=r)
plain = copy.deepcopy(model)
mesh = init_device_mesh("cpu", (ranks,))
fully_shard(model.scores, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
stepper = plans(rank).stepper(model, optimizer, training_step=token_mean, clip_grad_norm=0.1)
theirs = torch.optim.AdamW(plain.parameters(), lr=0.01)
for seed in range(3):
    whole = texts(23, seed=seed)
    batch = own(plans, whole)
    if seed == 2:  # short: unequal numbers of micro-batches
        whole = {k: v[:13] for k, v in whole.items()}
        batch = {k: v[:11] if rank == 0 else v[11:] for k, v in whole.items()}
    result = stepper.step(batch)
    theirs.zero_grad()
    loss = token_mean(plain, whole)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    assert abs(float(result.grad_norm) / float(norm) - 1) < 1e-10
    theirs.step()
    print(abs(float(result) / float(loss) - 1) < 1e-10, file=out)
full = [p.full_tensor() for p in model.parameters()]
print(distance(full, list(plain.parameters())) < 1e-9, file=out)
"""
SHARDED_LOSS = """
from torch.distributed.fsdp import fully_shard
class Own(nn.Module):
    # with a loss of its own
    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(3, 2)
    def forward(self, x, labels=None):
        scores = self.scores(x)
        return scores if labels is None else {"loss": nn.functional.cross_entropy(scores, labels), "scores": scores}
x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
labels = torch.arange(12) % 2
for loss, named in ((nn.CrossEntropyLoss(), False), (None, True)):
    torch.manual_seed(0)
    model = Own()
    expected = float(nn.functional.cross_entropy(model(x), labels).detach())
    fully_shard(model)
    stepper = plan_of(12, 3, ranks=2, rank=rank).stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=loss)
    mine = slice(6 * rank, 6 * rank + 6)
    result = stepper.step({"x": x[mine], "labels": labels[mine]} if named else (x[mine], labels[mine]))
    print(abs(float(result) / expected - 1) < 1e-12, file=out)
"""


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    return torchrun(
        tmp_path_factory.mktemp("ranks"),
        2,
        IMPORTS,
        whole=WHOLE,
        travel=TRAVEL,
        short=SHORT,
        found_out=FOUND_OUT,
        little_memory=LITTLE_MEMORY,
        idle=IDLE,
        unequal=UNEQUAL,
        unused=UNUSED,
        oom=OOM,
        both_run_out=BOTH_RUN_OUT,
        marked=MARKED,
        statistics=STATISTICS,
        sharded=SHARDED,
        sharded_loss=SHARDED_LOSS,
        refused=REFUSED,
        fails=FAILS,
        ignored=IGNORED,
        body_fails=BODY_FAILS,
    )


def test_gradients_are_those_of_the_whole_batch_over_two_unequal_ranks(on_two_ranks):
    """24 samples, and 23, so that ranks have unequal shares; token counts are always unequal."""
    assert on_two_ranks["whole"] == ["True True\n" * 6 + size for size in ("12 4", "11 4")]


def test_gradients_are_those_of_the_whole_batch_over_four_ranks(tmp_path):
    said = torchrun(tmp_path, 4, IMPORTS, whole=WHOLE, oom=OOM)
    assert said["whole"] == ["True True\n" * 6 + size for size in ("6 2", "6 2", "6 2", "5 2")]
    assert said["oom"] == ["True\n[(1, 6, 4, 1)] (3, 3)"] * 4


def test_gradients_travel_once_per_optimizer_step(on_two_ranks):
    assert on_two_ranks["travel"] == ["True\nTrue"] * 2


def test_unequal_parts_are_exact_and_only_the_rank_that_runs_out_shrinks(on_two_ranks):
    assert on_two_ranks["unequal"] == ["True\nTrue\n(9, 8) 1", "True\nTrue\n(1, 1, 1, 1, 1, 1) 1"]


def test_what_the_loss_is_is_found_out_by_all_ranks_together(on_two_ranks):
    assert on_two_ranks["found_out"] == ["\n".join(["True"] * 6)] * 2


def test_a_rank_with_little_memory_has_all_find_it_out_with_fewer_samples_or_ask(on_two_ranks):
    for said in on_two_ranks["little_memory"]:
        assert said.startswith(
            "InvalidInput what the loss is a mean over could not be found out, as memory ran out with"
        )


def test_ranks_on_which_nothing_counts_take_part_or_are_refused(on_two_ranks):
    assert on_two_ranks["idle"] == ["True\nnothing in the batch of rank 0 counts (a m\nTrue"] * 2


def test_a_short_last_batch_of_unequal_ranks_is_exact(on_two_ranks):
    assert on_two_ranks["short"] == ["True", "True"]


def test_parameters_that_only_one_rank_used_have_gradients_on_all(on_two_ranks):
    assert on_two_ranks["unused"] == ["[0.5, 0.5, None]"] * 2


def test_one_rank_that_runs_out_alone_has_all_run_the_step_again(on_two_ranks):
    assert on_two_ranks["oom"] == ["True\n[(1, 6, 4, 1)] (4, 4, 4)"] * 2


def test_of_ranks_that_run_out_together_the_largest_size_is_told(on_two_ranks):
    """With 2 and 5 samples: of 5 the next is 4, which cuts those into 3 and 2."""
    assert on_two_ranks["both_run_out"] == ["[(5, 4, 1)] [2, 2]", "[(5, 4, 1)] [5, 3, 2]"]


def test_marks_that_one_rank_alone_has_are_known_to_all(on_two_ranks):
    assert on_two_ranks["marked"] == ["True", "True"]


def test_batch_norm_has_the_statistics_of_all_ranks(on_two_ranks):
    assert on_two_ranks["statistics"] == ["True\n2"] * 2


def test_sharded_models_have_the_gradient_of_the_whole_batch(on_two_ranks):
    assert on_two_ranks["sharded"] == ["True\n" * 3 + "True"] * 2


def test_a_sharded_model_that_is_given_a_loss_is_not_run_on_fake_tensors(on_two_ranks):
    """Its hooks would gather them into the model itself."""
    assert on_two_ranks["sharded_loss"] == ["True\nTrue"] * 2


def test_a_static_graph_is_refused(on_two_ranks):
    assert on_two_ranks["refused"] == ["InvalidInput DistributedDataParallel with static_graph=True cannot accumu"] * 2


def test_a_rank_that_fails_ends_the_others_with_its_reason(on_two_ranks):
    assert on_two_ranks["fails"] == [
        "RankFailed rank 1 failed: LookupError: on this rank only",
        "LookupError on this rank only",
    ]


def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path):
    (said, _) = torchrun(tmp_path, 2, IMPORTS, dies=DIES)["dies"]
    assert said.startswith("RankFailed rank 1 is missing")


def test_buffers_that_are_to_be_ignored_stay_each_ranks_own(on_two_ranks):
    assert on_two_ranks["ignored"] == [f"[{r}, {r}] [0.0, 0.0] [{r}, {r}, {r}]" for r in (0.0, 1.0)]


def test_a_rank_that_fails_in_a_micro_batch_of_a_loader_ends_the_others_with_its_reason(on_two_ranks):
    first, second = on_two_ranks["body_fails"]
    assert first.startswith("RankFailed rank 1 failed: ") and not second.startswith("RankFailed")
