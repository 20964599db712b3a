"""Plans: their arithmetic, their JSON, and the loop they give."""

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autobatch.errors import InvalidInput, PlanFileError
from autobatch.plan import TrainingPlan
from autobatch.sizes import micro_batches, micro_batches_of_ranks, split_evenly
from autobatch.trial import DeviceInfo, Trial, Verdict


def make_plan(target=256, largest=37, world_size=1, tried=None, **changes) -> TrainingPlan:
    sizes = micro_batches(split_evenly(target, world_size)[0], largest)
    trial = Trial(micro_batch_sizes=tried or (sizes[0], sizes[-1]), verdict=Verdict.FITS, peak_bytes=900)
    fields = {
        "target_batch_size": target,
        "world_size": world_size,
        "micro_batch_sizes": sizes,
        "max_micro_batch_size": largest,
        "peak_bytes": 900,
        "limit_bytes": 1000,
        "budget_bytes": 950,
        "headroom": 0.05,
        "verified": True,
        "trials": (trial,),
        "device": DeviceInfo(type="cpu", name="a processor", total_bytes=2000),
    }
    return TrainingPlan(**fields | changes)


def test_the_fewest_steps_then_sizes_as_equal_as_possible():
    plan = make_plan(target=256, largest=37)
    assert plan.micro_batch_sizes == (37, 37, 37, 37, 36, 36, 36)
    assert (plan.accumulation_steps, plan.micro_batch_size) == (7, 37)


@given(st.integers(1, 5000), st.integers(1, 600), st.integers(1, 40))
def test_every_rank_together_hits_the_target_exactly(target, largest, world_size):
    world_size = min(world_size, target)
    plan = make_plan(target, largest, world_size)
    ranks = [plan.for_rank(rank) for rank in range(world_size)]
    sizes = [size for rank in ranks for size in rank.micro_batch_sizes]
    assert sum(sizes) == target
    assert 1 <= min(sizes) <= max(sizes) <= largest
    assert plan.accumulation_steps == math.ceil(math.ceil(target / world_size) / largest)
    for rank in ranks:
        assert max(rank.micro_batch_sizes) - min(rank.micro_batch_sizes) <= 1


@given(st.integers(1, 3000), st.integers(1, 600))
def test_uniform_is_the_largest_single_size_that_divides_the_target(target, largest):
    sizes = make_plan(target, largest).uniform().micro_batch_sizes
    assert sum(sizes) == target
    assert len(set(sizes)) == 1
    assert not any(target % size == 0 for size in range(sizes[0] + 1, min(largest, target) + 1))


def test_a_uniform_size_that_never_ran_is_not_called_verified():
    plan = make_plan(target=256, largest=37)
    assert plan.uniform().micro_batch_size == 32
    assert not plan.uniform().verified
    assert make_plan(target=72, largest=36, tried=(36, 36)).uniform().verified


def test_uniform_says_which_targets_would_work_for_these_ranks():
    with pytest.raises(InvalidInput, match=r"256 is not a multiple of 3 ranks.* 255 and 258"):
        make_plan(256, 37, world_size=3).uniform()


def test_a_model_that_needs_two_samples_never_gets_a_micro_batch_of_one():
    assert micro_batches(5, 3, smallest=2) == (3, 2)
    with pytest.raises(InvalidInput, match="3 samples cannot be split"):
        micro_batches(3, 2, smallest=2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("samples", [10, 7])
def test_weighted_micro_batches_give_the_whole_batch_gradient(precision, samples):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).double()
    plan = make_plan(target=10, largest=4, precision=precision)
    x, y = torch.randn(samples, 5, dtype=torch.double), torch.randint(0, 3, (samples,))
    loss_fn = torch.nn.functional.cross_entropy
    weights = []
    for (micro_x, micro_y), weight in plan.split((x, y)):
        assert micro_x.untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), "a copy, not a view"
        (loss_fn(model(micro_x), micro_y) * weight).backward()
        weights.append(weight)
    accumulated = model.weight.grad.clone()
    model.zero_grad()
    loss_fn(model(x), y).backward()
    assert sum(weights) == pytest.approx(1)
    torch.testing.assert_close(accumulated, model.weight.grad, rtol=1e-12, atol=1e-15)


def test_unequal_ranks_weigh_so_that_the_mean_over_ranks_is_the_mean_over_samples():
    plan = make_plan(target=7, largest=2, world_size=2)
    values = torch.arange(7.0)
    shares = [values[:4], values[4:]]
    means = [sum(w * m.mean() for m, w in plan.for_rank(r).split(shares[r])) for r in range(2)]
    assert sum(means) / 2 == pytest.approx(values.mean().item())


def test_scaled_lr():
    plan = make_plan(target=256)
    assert plan.scaled_lr(0.1, 64) == pytest.approx(0.4)
    assert plan.scaled_lr(0.1, 64, rule="sqrt") == pytest.approx(0.2)
    with pytest.raises(InvalidInput, match="base_batch"):
        plan.scaled_lr(0.1, 0)
    with pytest.raises(InvalidInput, match="linear"):
        plan.scaled_lr(0.1, 64, rule="cubic")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_code_of_a_plan_trains(precision):
    plan = make_plan(target=16, largest=5, precision=precision)
    model = torch.nn.Linear(4, 2)
    before = model.weight.detach().clone()
    loader = [{"x": torch.randn(16, 4), "y": torch.randint(0, 2, (16,))} for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def compute_loss(model, micro):
        return torch.nn.functional.cross_entropy(model(micro["x"]), micro["y"])

    scope = {}
    exec(plan.code(), scope)
    scope["train_epoch"](plan, model, loader, compute_loss, optimizer, scheduler, max_norm=1.0)
    assert not torch.equal(before, model.weight)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert ("autocast" in plan.code(), "GradScaler" in plan.code()) == (precision != "fp32", precision == "fp16")


@pytest.mark.parametrize("samples", [16, 10, 3])
def test_the_code_for_several_ranks_synchronises_with_the_last_micro_batch_only(samples):
    class Synchronising(torch.nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.synchronised, self.inside = [], False

        @contextlib.contextmanager
        def no_sync(self):
            self.inside = True
            yield
            self.inside = False

        def forward(self, x):
            self.synchronised.append(not self.inside)
            return super().forward(x)

    model, scope = Synchronising(), {}
    exec(make_plan(target=32, largest=4, world_size=2).code(), scope)
    loss = lambda model, x: model(x).mean()  # noqa: E731
    plan = make_plan(target=32, largest=4, world_size=2)
    scope["train_epoch"](plan, model, [torch.randn(samples, 4)], loss, torch.optim.SGD(model.parameters(), 0.1))
    assert model.synchronised == [False] * (len(model.synchronised) - 1) + [True]


def test_ranks_with_unequal_shares_take_the_same_number_of_steps_and_sizes_that_the_model_runs_on():
    assert micro_batches_of_ranks(399, 2, 199) == [(100, 100), (100, 99)]
    assert micro_batches_of_ranks(7, 2, 3, smallest=2) == [(2, 2), (3,)]
    second = make_plan(7, 3, world_size=2, min_micro_batch_size=2).for_rank(1)
    assert second.micro_batch_sizes == (3,)
    assert second.for_rank(0).micro_batch_sizes == (2, 2)


def test_a_batch_is_cut_where_the_plan_expects_its_samples():
    plan = make_plan(target=256, largest=128)
    ids = torch.zeros(128, 256)  # (tokens, samples), and as many tokens as an even guess would take for samples
    assert [micro[0].shape for micro, _ in plan.split((ids, ids))] == [(128, 128)] * 2
    batch = {"x": torch.zeros(256, 128), "mask": torch.zeros(128, 128), "places": torch.zeros(128)}
    pieces = [micro for micro, _ in plan.split(batch)]
    assert pieces[0]["x"].shape == (128, 128)
    assert pieces[0]["mask"].shape == (128, 128)
    assert len(pieces) == 2


def test_save_and_load_give_the_same_plan(tmp_path):
    plan = make_plan(world_size=3, assumptions=("AdamW",), warnings=("é",), versions={"torch": "2"})
    plan.save(tmp_path / "plan.json")
    assert TrainingPlan.load(tmp_path / "plan.json") == plan
    written = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert written["accumulation_steps"] == plan.accumulation_steps
    assert written["schema_version"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: "", "not valid JSON"),
        (lambda text: "[]", "names no schema_version"),
        (
            lambda text: text.replace('"schema_version": 1', '"schema_version": 7'),
            "schema version 7, but this autobatch reads version 1",
        ),
        (lambda text: text.replace('"target_batch_size": 256', '"target_batch_size": 255'), "damaged.*add up to 256"),
        (lambda text: text.replace('"max_micro_batch_size": 37', '"max_micro_batch_size": 3'), "damaged.*beyond max"),
        (
            lambda text: text.replace('"peak_bytes": 900,\n  "limit', '"peak_bytes": "many",\n  "limit'),
            "damaged: peak_bytes: 'many' is not a whole number. Make",
        ),
        (
            lambda text: text.replace('"headroom"', '"legroom"'),
            "damaged: headroom: it is missing|damaged: legroom: there is nothing of that name",
        ),
        (
            lambda text: text.replace('"headroom": 0.05', '"headroom": NaN'),
            "damaged: headroom: nan is not a finite number",
        ),
        (
            lambda text: text.replace('"peak_bytes": 900,\n  "limit', '"peak_bytes": 960,\n  "limit'),
            "said to be verified",
        ),
        (lambda text: text.replace('"fits"', '"over_budget"'), "said to be verified"),
        (
            lambda text: text.replace('"target_batch_size": 256', '"target_batch_size": "256"'),
            "damaged: target_batch_size: '256' is not a whole number",
        ),
    ],
)
def test_a_damaged_plan_file_is_a_clear_error(tmp_path, damage, complaint):
    path = tmp_path / "plan.json"
    make_plan().save(path)
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(PlanFileError, match=complaint):
        TrainingPlan.load(path)


def test_a_binary_or_missing_file_is_a_clear_error(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanFileError, match="not valid JSON"):
        TrainingPlan.load(tmp_path / "binary")
    with pytest.raises(PlanFileError, match="No such file"):
        TrainingPlan.load(tmp_path / "absent")


def test_a_full_disk_leaves_the_older_plan_as_it_was(tmp_path):
    older = make_plan(target=128)
    older.save(tmp_path / "plan.json")
    # A real ENOSPC-like failure in a process that may not write a file of more than 100 bytes.
    program = (
        "import resource, signal, sys; from autobatch.plan import TrainingPlan\n"
        "plan = TrainingPlan.load(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "plan.save(sys.argv[1])"
    )
    path = str(tmp_path / "plan.json")
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=False)
    assert "PlanFileError" in done.stderr
    assert "could not be written" in done.stderr
    assert TrainingPlan.load(path) == older
    assert len(list(tmp_path.iterdir())) == 1


def test_a_path_that_is_not_a_file_is_never_replaced():
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(PlanFileError, match="could not be written to /dev/full: it is not a file"):
        make_plan().save("/dev/full")


def test_an_empty_batch_is_a_clear_error():
    with pytest.raises(InvalidInput, match="no samples"):
        list(make_plan().split(torch.randn(0, 8)))


def test_a_batch_is_cut_where_the_plan_knows_its_samples_are():
    """Not along a dimension that happens to be as long as the target."""
    plan = make_plan(target=64, largest=16).model_copy(update={"batch_dims": {"0": 0, "1": 0}})
    pieces = list(plan.split((torch.randn(37, 64), torch.zeros(37))))
    assert [(x.shape, y.shape) for (x, y), _ in pieces] == [((13, 64), (13,)), ((12, 64), (12,)), ((12, 64), (12,))]
    assert sum(weight for _, weight in pieces) == pytest.approx(1)
    time_first = plan.model_copy(update={"batch_dims": {"x": 1, "mask": None}})
    batch = {"x": torch.randn(64, 20, 3), "mask": torch.ones(64, 64)}
    assert [(m["x"].shape, m["mask"].shape) for m, _ in time_first.split(batch)] == [((64, 10, 3), (64, 64))] * 2


def test_parts_that_disagree_about_the_samples_are_an_error_that_names_them():
    plan = make_plan(target=64, largest=16).model_copy(update={"batch_dims": {"0": 0, "1": 0}})
    with pytest.raises(InvalidInput, match=r"37 in 0 \(dimension 0\), 36 in 1"):
        list(plan.split((torch.randn(37, 8), torch.zeros(36))))


def test_more_samples_than_the_share_are_an_error():
    plan = make_plan(target=64, largest=16)
    with pytest.raises(InvalidInput, match="100 samples, more than the 64 of one optimizer step: "):
        list(plan.split(torch.randn(100, 8)))


def test_the_last_batch_of_a_sequence_first_loader_is_cut_by_samples():
    plan = make_plan(target=64, largest=10)
    assert {micro.shape[1] for micro, _ in plan.split(torch.randn(20, 64, 8))} == {10, 9}
    assert [micro.shape[1] for micro, _ in plan.split(torch.randn(20, 15, 8), samples=15)] == [8, 7]
