"""What ranks agree on when they look for a plan together."""

import json

import pytest
from torchrun import torchrun

IMPORTS = """
import json, time
import warm
from autobatch import child, ranks as talk
from test_fit import *
child._start = warm.start_child
"""

SMALLER = """
plan = fit_wide(target=60 * ranks + 1, memory_limit="430MiB" if rank == 1 else "520MiB")
plans = [plan.for_rank(r) for r in range(ranks)]
assert plans[rank] == plan
print(json.dumps([plan.verified, plan.max_micro_batch_size, [p.micro_batch_sizes for p in plans]]), file=out)
"""
UNEQUAL = """
def step(model, batch):
    if rank == 1:
        time.sleep(0.02 * len(batch[0]))  # a slower device
    return model(batch[0]).square().mean()
plan = fit_wide(target=121, loss=None, training_step=step, per_rank=True, memory_limit="520MiB" if rank else "430MiB")
plans = [plan.for_rank(r) for r in range(ranks)]
assert plans[rank].micro_batch_sizes == plan.micro_batch_sizes
print(json.dumps({
    "parts": [share.samples for share in plan.rank_shares],
    "largest": [share.max_micro_batch_size for share in plan.rank_shares],
    "micro-batches": [p.micro_batch_sizes for p in plans],
    "verified": plan.verified,
}), file=out)
"""
TOO_SMALL = """
from autobatch import NothingFits
try:
    autobatch.fit(
        Wide(fixed_mib=100), 8, data=wide_batch, device="cpu", memory_limit="450MiB" if rank == 1 else "2GiB",
        training_step=lambda model, batch: model(batch[0]).mean() + model.fixed.sum())
except NothingFits as error:
    print(json.dumps([str(error), error.needed_bytes, error.budget_bytes]), file=out)
"""
FAILS = """
def step(model, batch):
    if rank == 1:
        raise LookupError("on this rank only")
    return model(batch[0]).mean()
try:
    fit_wide(target=8, loss=None, training_step=step)
except Exception as error:
    print(type(error).__name__, error, file=out)
"""
NO_DEVICE = """
try:
    fit_wide(target=8, device="cuda:99" if rank == 1 else "cpu")
except Exception as error:
    print(type(error).__name__, error, file=out)
"""
DEFAULT_DEVICE = """
torch.set_default_device("meta")
print(talk.gather(rank), file=out)
torch.set_default_device("cpu")
"""
OTHERS = """
try:
    fit_wide(target=8 + rank)
except Exception as error:
    print(type(error).__name__, error, file=out)
"""
ALONE = """
if rank == 0:
    print(fit_wide(target=10, world_size=5).micro_batch_sizes, file=out)
dist.barrier()
"""
NEVER = """
talk.GRACE_SECONDS = 1.0
if rank == 1:
    os._exit(0)  # before the ranks have talked at all
try:
    talk.gather(rank)
except Exception as error:
    print(type(error).__name__, error, file=out)
os._exit(0)
"""
DIES = """
if rank == 1:
    talk.talk_of(dist.group.WORLD)  # as it would
    os._exit(0)
try:
    fit_wide(target=8)
except Exception as error:
    print(type(error).__name__, error, file=out)
"""
HANGS = """
talk.GRACE_SECONDS = 1.0
try:
    with talk.failing_together(True):
        if rank == 1:
            time.sleep(12)
        talk.gather(rank)
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
        smaller=SMALLER,
        unequal=UNEQUAL,
        too_small=TOO_SMALL,
        fails=FAILS,
        others=OTHERS,
        alone=ALONE,
        no_device=NO_DEVICE,
        default_device=DEFAULT_DEVICE,
    )


def test_a_rank_with_less_memory_decides_for_all(on_two_ranks):
    first, second = map(json.loads, on_two_ranks["smaller"])
    assert first == second
    verified, largest, sizes = first
    assert verified
    assert largest < 61
    assert [sum(of_rank) for of_rank in sizes] == [61, 60]


def test_four_ranks_agree_as_well(tmp_path):
    said = [json.loads(text) for text in torchrun(tmp_path, 4, IMPORTS, smaller=SMALLER)["smaller"]]
    assert all(answer == said[0] for answer in said)
    assert [sum(of_rank) for of_rank in said[0][2]] == [61, 60, 60, 60]


def test_unequal_ranks_have_unequal_parts_that_add_up(on_two_ranks):
    first, second = map(json.loads, on_two_ranks["unequal"])
    assert first == second
    assert first["verified"]
    assert first["largest"][0] < first["largest"][1]
    assert first["parts"][0] > first["parts"][1] + 10
    assert [sum(sizes) for sizes in first["micro-batches"]] == first["parts"]
    assert sum(first["parts"]) == 121


def test_where_nothing_fits_on_one_rank_all_name_it_and_its_numbers(on_two_ranks):
    first, second = map(json.loads, on_two_ranks["too_small"])
    assert first == second
    message, needed, budget = first
    assert message.startswith("nothing fits on rank 1: a training step with micro-batches of 1 sample takes ")
    assert budget < 450 * 1024**2 < 600 * 1024**2 < needed


def test_a_rank_that_fails_ends_all_with_its_reason(on_two_ranks):
    assert on_two_ranks["fails"] == [
        "RankFailed rank 1 failed: LookupError: on this rank only",
        "LookupError on this rank only",
    ]


def test_ranks_that_ask_for_different_targets_are_told(on_two_ranks):
    for said in on_two_ranks["others"]:
        assert said.startswith(
            "InvalidInput the ranks of a group share one target, but ask for different ones: 8 on rank 0, 9"
        )


def test_with_world_size_given_one_rank_may_ask_alone(on_two_ranks):
    assert on_two_ranks["alone"] == ["(2,)", ""]


@pytest.mark.parametrize("program", [NEVER, DIES, HANGS], ids=["never came", "dies", "hangs"])
def test_a_rank_that_never_comes_is_named(tmp_path, program):
    """The others wait as long as the process group was told to."""
    (said, _) = torchrun(tmp_path, 2, IMPORTS, timeout=3, missing=program)["missing"]
    assert said.startswith("RankFailed rank 1 is missing: the others waited in vain")


def test_a_rank_without_the_device_ends_the_others_with_its_reason(on_two_ranks):
    first, second = on_two_ranks["no_device"]
    assert first.startswith("RankFailed rank 1 failed: DeviceUnavailable") and second.startswith("DeviceUnavailable")


def test_ranks_talk_on_the_host_whatever_the_default_device_is(on_two_ranks):
    assert on_two_ranks["default_device"] == ["[0, 1]"] * 2
