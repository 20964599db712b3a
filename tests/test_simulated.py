"""Plans and estimates for GPUs that aren't here."""

import io
import json
import random

import pytest
import torch
from rich.console import Console
from torch import nn

import autobatch
from autobatch import Estimate, InvalidInput, NothingFits, TrainingPlan, Workload, estimating
from autobatch.devices import get_device
from autobatch.devices.simulated import SimulatedDevice
from autobatch.devices.target import find_target
from autobatch.devices.timing import Timing
from autobatch.estimator import Question
from autobatch.prediction.tracing import traced
from autobatch.profile import profile_device
from autobatch.report.tables import profile_view
from autobatch.units import format_bytes
from autobatch.workload import resolve

GIB = 1 << 30


def wide():
    return nn.Sequential(nn.Linear(512, 4096), nn.GELU(), nn.Linear(4096, 512))


def profile(tmp_path, **changes):
    content = {
        "schema_version": 1,
        "device": {"type": "cuda", "name": "NVIDIA GeForce RTX 3090", "total_bytes": 24 * GIB, "capability": "8.6"},
        "context_bytes": GIB,
        "versions": {"torch": "2.11.0", "cuda": "12.8"},
    }
    path = tmp_path / "card.json"
    path.write_text(json.dumps(content | changes))
    return str(path)


# Which GPU


def test_a_gpu_has_a_name_a_size_or_a_profile(tmp_path):
    assert isinstance(get_device("rtx-3090"), SimulatedDevice)
    assert get_device("NVIDIA GeForce RTX 4090").info.capability == "8.9"
    assert get_device("4090").info.name == get_device("rtx-4090").info.name
    any_card, card = get_device("24GiB"), get_device("rtx-4090")
    assert any_card.limit_bytes <= card.limit_bytes < 24 * GIB
    assert any_card.info.name == "any 24 GiB card (as NVIDIA A10G)"
    assert get_device("17GiB").info.name == "any GPU with 17.00 GiB"
    saved = find_target(profile(tmp_path))
    assert (saved.visible_bytes, saved.context.likely, saved.capability) == (24 * GIB, GIB, (8, 6))
    assert saved.conditions.gpu.torch == (2, 11)


def test_a_profile_without_a_context_takes_it_from_the_table(tmp_path):
    known, unknown = find_target(profile(tmp_path)), find_target(profile(tmp_path, context_bytes=None))
    assert known.context.low == known.context.high
    assert 200 << 20 < unknown.context.low < unknown.context.likely < unknown.context.high < GIB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "no device profile"),
        ({"device": {"type": "cpu", "name": "a CPU", "total_bytes": 5}}, "not one made on a CUDA GPU"),
        ({"context_bytes": -5}, "no device profile"),
        ({"device": {"type": "simulated", "name": "RTX", "total_bytes": 5, "capability": "8.6"}}, "not one made on a"),
    ],
)
def test_a_file_that_is_no_profile_of_a_gpu_is_an_error(tmp_path, changes, message):
    with pytest.raises(InvalidInput, match=message):
        find_target(profile(tmp_path, **changes))


def test_an_unknown_gpu_is_an_error_with_those_that_are_meant():
    with pytest.raises(InvalidInput, match=r"rtx-4090.*--catalog"):
        autobatch.fit(wide(), 64, device="rtx-4009")
    with pytest.raises(InvalidInput, match="cannot be read"):
        get_device("missing.json")
    with pytest.raises(InvalidInput, match="must name a GPU"):
        autobatch.estimate(wide(), 4, device=None)


# Plans


def test_a_plan_is_labelled_predicted_and_says_its_error():
    plan = autobatch.fit(wide(), 1 << 15, device="rtx-3090", memory_limit="1GiB")
    assert plan.evidence == "predicted" and not plan.verified and 0 < plan.error_bound < 0.2
    assert sum(plan.micro_batch_sizes) == 1 << 15 and plan.accumulation_steps > 1
    assert plan.peak_bytes <= plan.budget_bytes < GIB
    assert plan.max_is_exact  # a trial costs nothing, so it goes to the end
    assert "predicted" in str(plan) and "RTX 3090" in str(plan)
    assert '.to("cuda")' in plan.code()
    assert any("catalogue" in assumption for assumption in plan.assumptions)
    assert TrainingPlan.model_validate_json(plan.model_dump_json()) == plan
    with pytest.raises(ValueError, match="simulated"):
        TrainingPlan.model_validate(plan.model_dump() | {"verified": True})


def test_a_whole_target_that_fits_is_one_micro_batch():
    plan = autobatch.fit(wide(), 64, device="a100-80gb")
    assert plan.micro_batch_sizes == (64,)


def test_nothing_of_the_callers_changes():
    model = wide()
    model[0](torch.ones(2, 512)).sum().backward()
    optimizer = torch.optim.Adam(model.parameters())
    before = [p.clone() for p in model.parameters()], [p.grad is None for p in model.parameters()]
    states = random.getstate(), torch.get_rng_state()
    autobatch.fit(model, 256, device="rtx-3090", memory_limit="2GiB", optimizer=optimizer, precision="bf16")
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
    assert [p.grad is None for p in model.parameters()] == before[1]
    assert not optimizer.state
    assert (random.getstate(), torch.get_rng_state().tolist()) == (states[0], states[1].tolist())
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
    assert not torch.is_autocast_enabled("cpu")


def test_nothing_fits_says_what_is_needed():
    with pytest.raises(NothingFits, match="a limit of at least") as raised:
        autobatch.fit(wide(), 64, device="rtx-3090", memory_limit="350MiB")
    assert raised.value.needed_bytes > raised.value.budget_bytes


def test_a_model_on_the_meta_device_is_enough():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8192, 8192) for _ in range(24)))  # 6 GiB
    plan = autobatch.fit(model, 1 << 15, device="h100")
    assert plan.peak_bytes > 4 * 6 * GIB
    with pytest.raises(InvalidInput, match="meta device"):
        autobatch.fit(model, 64, device="cpu")


def test_a_step_that_does_not_grow_evenly_is_fitted_all_the_same():
    def gram(model, batch):
        out = model(batch)
        return (out @ out.T).sum()  # n by n

    workload = Workload(nn.Linear(8, 8), data=lambda n: torch.ones(n, 8), training_step=gram)
    plan = autobatch.fit(workload, 1 << 15, device="rtx-3090", memory_limit="2GiB", exact=True)
    assert any("traced by itself" in warning for warning in plan.warnings)
    room = plan.budget_bytes - find_target("rtx-3090").context.likely
    assert 0.8 < 4 * plan.max_micro_batch_size**2 / room <= 1


# Estimates


def test_an_estimate_adds_up():
    found = autobatch.estimate(wide(), 512, device="rtx-4090", precision="bf16")
    assert found.fits and found.batch_size == 512
    weights = sum(p.numel() * 4 for p in wide().parameters())
    assert found.by_category["parameter"] == weights
    assert found.by_category["optimizer state"] == 2 * weights
    total = sum(found.by_category.values())
    assert total == pytest.approx(found.allocated_peak_bytes, rel=0.01)
    assert found.by_module.bytes == total == sum(group.bytes for group in found.by_operator)
    assert {child.path for child in found.by_module.children} >= {"0", "2"}
    assert found.allocated_peak_bytes <= found.capacity_bytes <= found.reserved_peak_bytes
    assert found.device_total.low < found.capacity_bytes + found.context.likely < found.device_total.high
    peak = found.timeline.moments[found.timeline.peak]
    assert sum(peak.bytes) == total
    assert {moment.phase for moment in found.timeline.moments} >= {"forward", "backward", "optimizer"}
    assert Estimate.model_validate_json(found.model_dump_json()) == found


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    options = {"device": "rtx-4090", "memory_limit": "1GiB"}
    largest = autobatch.estimate(wide(), **options)
    assert largest.batch_size == largest.largest_micro_batch and largest.fits
    assert not autobatch.estimate(wide(), largest.batch_size + 1, **options).fits


def test_accumulation_holds_the_gradients():
    alone, held = (autobatch.estimate(wide(), 4096, device="t4", accumulation=a) for a in (False, True))
    assert held.allocated_peak_bytes > alone.allocated_peak_bytes
    assert held.by_category["gradient"] > alone.by_category.get("gradient", 0)


def test_gradients_that_are_zeroed_instead_of_dropped_are_held_as_with_accumulation():
    class Zeroing(torch.optim.AdamW):
        def zero_grad(self, set_to_none=True):
            super().zero_grad(set_to_none=False)

    zeroed = autobatch.estimate(wide(), 4096, device="t4", optimizer=Zeroing)
    dropped, accumulated = (autobatch.estimate(wide(), 4096, device="t4", accumulation=a) for a in (False, True))
    assert zeroed.allocated_peak_bytes == accumulated.allocated_peak_bytes > dropped.allocated_peak_bytes
    assert zeroed.by_category["gradient"] == accumulated.by_category["gradient"]


def test_several_gpus_are_answered_from_one_trace(monkeypatch):
    kinds = []

    def counted(step, capability):
        kinds.append(capability)
        return traced(step, capability)

    monkeypatch.setattr(estimating, "traced", counted)
    names = ["rtx-3090", "a100-40gb", "t4", "rtx-4090"]
    found = estimating.estimates(Workload(wide()), Question.checked(64, names, None, 0.05, accumulation=False))
    assert [one.device.name for one in found] == [get_device(name).info.name for name in names]
    assert len(kinds) == 2  # one of them has no flash attention


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_a_batch_of_no_size_is_refused(batch_size):
    with pytest.raises(InvalidInput, match="batch_size"):
        autobatch.estimate(wide(), batch_size, device="t4")


def test_where_there_is_no_end_the_largest_is_the_largest_tried():
    assert autobatch.estimate(nn.Linear(8, 4), 4, device="h200").largest_micro_batch == 1 << 20


def test_a_compiled_model_is_predicted_as_it_was_written():
    plain, compiled, wrapped = wide(), wide(), torch.compile(wide())
    compiled.compile()
    peaks = {autobatch.estimate(m, 64, device="t4").allocated_peak_bytes for m in (plain, compiled, wrapped)}
    assert len(peaks) == 1


def test_a_profile_shows_the_peak_of_the_micro_batch_that_it_shows():
    profile = profile_device(4096, device="rtx-3090", memory_limit=GIB)
    plans = [result.plan for result in profile.results]
    assert all(plan.accumulation_steps > 1 for plan in plans[1:])  # else the plan is that very micro-batch
    for result in profile.results:
        (peak,) = {t.peak_bytes for t in result.plan.trials if t.micro_batch_size == result.plan.max_micro_batch_size}
        assert result.peak_bytes == peak
    assert any(result.peak_bytes > result.plan.peak_bytes for result in profile.results)
    console = Console(file=io.StringIO())
    console.print(profile_view(profile))
    assert all(format_bytes(result.peak_bytes) in console.file.getvalue() for result in profile.results)


def test_the_gradient_buckets_of_a_data_parallel_model_are_counted(tmp_path):
    model, options = wide(), {"device": "t4", "memory_limit": "1GiB"}
    plain = autobatch.estimate(model, 64, **options)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = autobatch.estimate(nn.parallel.DistributedDataParallel(model), 64, **options)
    finally:
        torch.distributed.destroy_process_group()
    buckets = sum(4 * p.numel() for p in model.parameters())
    assert wrapped.reserve_bytes == buckets and plain.reserve_bytes == 0
    for end in ("likely", "low", "high"):
        assert getattr(wrapped.device_total, end) - getattr(plain.device_total, end) == buckets
    per_sample = 4 * 4 * 4096  # both sides of the activation, and their gradients
    fewer = plain.largest_micro_batch - wrapped.largest_micro_batch
    assert fewer * per_sample == pytest.approx(buckets, rel=0.1)


def test_what_the_card_cannot_do_as_asked_is_warned_of():
    def warnings(name, **options):
        found = autobatch.estimate(nn.Linear(8, 4), 4, device=name, **options)
        plan = autobatch.fit(nn.Linear(8, 4), 4, device=name, **options)
        assert set(found.warnings) <= set(plan.warnings)
        return " ".join(found.warnings)

    said = warnings("t4", precision="bf16", memory_limit="20GiB")
    assert "bf16 needs compute capability 8.0, and Tesla T4 has 7.5" in said
    assert "memory_limit is 20.00 GiB, but a process can have no more than 14.56 GiB" in said
    assert not warnings("a100-40gb", precision="bf16", memory_limit="20GiB")
    assert not warnings("t4", precision="fp16")


def test_a_gpu_that_is_not_here_cannot_be_timed():
    step = resolve(Workload(nn.Linear(4, 1)))
    told = pytest.raises(InvalidInput, match="how fast a step is cannot be predicted")
    with get_device("rtx-3090").trials(step, 1 << 34) as run, told:
        run((2, 2), timing=Timing())
