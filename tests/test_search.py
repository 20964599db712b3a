"""The search against imagined devices: what it tries, what it answers and what that costs."""

from __future__ import annotations

import doctest
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import autobatch.search
from autobatch.errors import InvalidInput
from autobatch.search import MicroBatchSearch

Bytes = Callable[[int], float]
BUDGET = 1_000_000
LIMIT = BUDGET / 0.95
"""What the device really has: a peak above the budget but within this is over budget, a larger one out of memory."""


@dataclass
class Run:
    search: MicroBatchSearch
    tried: list[int]
    out_of_memory: int


def run(
    peak: Bytes,
    cap: int,
    *,
    budget: float = BUDGET,
    turn: Bytes | None = None,
    rest: float | None = None,
    measured: bool = True,
    **options: Any,
) -> Run:
    """Search on a device whose steps need `peak(n)` bytes, less the whole target's saving at `cap`."""
    search = MicroBatchSearch(int(budget), cap, **options)
    result = Run(search, [], 0)
    while (n := search.propose()) is not None:
        assert search.minimum <= n <= cap
        result.tried.append(n)
        assert len(result.tried) <= 60, "the search does not end"
        saving = search.whole_saving_bytes if n == cap else 0
        size = peak(n) - saving
        if size > budget / 0.95:
            result.out_of_memory += 1
            search.observe(n, fits=False)
        else:
            known = {
                "peak_bytes": int(size),
                "turn_bytes": int(turn(n) - saving) if turn else None,
                "rest_bytes": None if rest is None else int(rest - saving),
            }
            search.observe(n, fits=int(size) <= budget, **(known if measured else {}))
    return result


def affine(fixed: float, per_sample: float) -> Bytes:
    return lambda n: fixed + per_sample * n


def noisy(peak: Bytes, noise: float, seed: int) -> Bytes:
    return lambda n: peak(n) * (1 + noise * (hash((seed, n)) % 2001 / 1000 - 1))


def stepped(peak: Bytes, step: float) -> Bytes:
    return lambda n: math.ceil(peak(n) / step) * step


def table(points: Mapping[int, float]) -> Bytes:
    """Measured MiB between which the truth is taken to be straight, as bytes."""
    sizes = sorted(points)

    def at(n: int) -> float:
        i = min(max(bisect_right(sizes, n), 1), len(sizes) - 1)
        a, b = sizes[i - 1], sizes[i]
        return (points[a] + (points[b] - points[a]) * (n - a) / (b - a)) * 2**20

    return at


def largest(fits: Callable[[int], bool], cap: int) -> int:
    return bisect_right(range(1, cap + 1), False, key=lambda n: not fits(n))


# What it does, step by step


def test_the_docstring_shows_what_happens() -> None:
    assert doctest.testmod(autobatch.search).failed == 0


@pytest.mark.parametrize(
    ("peak", "cap", "options", "tried", "best"),
    [
        pytest.param(affine(100_000, 1), 1, {}, [1], 1, id="one sample is all that is needed"),
        pytest.param(affine(1_000_000, 1), 256, {}, [1], None, id="nothing fits"),
        pytest.param(affine(100_000, 100), 256, {}, [1, 10, 256], 256, id="the cap fits"),
        pytest.param(affine(100_000, 10_000), 256, {}, [1, 9, 90], 90, id="the line gives the answer"),
        pytest.param(affine(100_000, 10_000), 256, {"exact": True}, [1, 9, 90, 91], 90, id="and the proof"),
        pytest.param(affine(100_000, 10_000), 256, {"minimum": 2}, [2, 17, 90], 90, id="two samples at least"),
        pytest.param(affine(100_000, 10_000), 256, {"prior": affine(100_000, 10_000)}, [90], 90, id="a right prior"),
    ],
)
def test_a_sequence_of_trials(
    peak: Bytes, cap: int, options: dict[str, Any], tried: list[int], best: int | None
) -> None:
    result = run(peak, cap, **options)
    assert (result.tried, result.search.best) == (tried, best)
    assert result.search.trials == len(tried)


# What it costs, over thousands of devices


def devices(count: int) -> Iterator[tuple[float, float, int, int]]:
    """(fixed bytes, bytes per sample, cap, true answer) with limits at 0, 1, cap-1, cap, cap+1 and anywhere."""
    draw = random.Random(20)
    for _ in range(count):
        cap = int(2 ** draw.uniform(0, 13))
        answer = draw.choice([0, 1, cap - 1, cap, cap + 1, *(int(cap * 2 ** draw.uniform(-8, 2)) for _ in range(5))])
        fixed = draw.choice([0.0, 0.05, 0.3, 0.5, 0.7, draw.random()]) * BUDGET
        if answer == 0:
            fixed = max(fixed, 0.8 * BUDGET) * 1.3
        yield fixed, abs(BUDGET - fixed) / (answer + draw.uniform(0.01, 0.9)), cap, min(answer, cap)


FAMILIES: dict[str, Callable[[float, float, int], Bytes]] = {
    "affine": lambda fixed, slope, seed: affine(fixed, slope),
    "a little noisy": lambda fixed, slope, seed: noisy(affine(fixed, slope), 0.005, seed),
    "noisy": lambda fixed, slope, seed: noisy(affine(fixed, slope), 0.03, seed),
    "stepped": lambda fixed, slope, seed: stepped(affine(fixed, slope), BUDGET / (20, 100, 1000)[seed % 3]),
    "flat at small sizes": lambda fixed, slope, seed: (
        lambda n: max((fixed + BUDGET) / 2 * (fixed < BUDGET), fixed + slope * n)
    ),
    "curved": lambda fixed, slope, seed: lambda n: fixed + slope * n ** (0.9, 1.1)[seed % 2],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_over_many_devices_a_search_takes_four_trials_on_average_and_never_more_than_twelve(family: str) -> None:
    trials, ratios = [], []
    for seed, (fixed, slope, cap, _) in enumerate(devices(2000)):
        peak = FAMILIES[family](fixed, slope, seed)
        result = run(peak, cap)
        best = result.search.best
        trials.append(len(result.tried))
        if best:
            assert peak(best) <= BUDGET + 1
            ratios.append(best / max(1, largest(lambda n: peak(n) <= BUDGET, cap)))  # noqa: B023
        else:
            assert result.tried == [1]
    assert mean(trials) <= 4
    assert max(trials) <= 12
    assert mean(ratios) >= 0.98


@pytest.mark.parametrize("exact", [False, True])
def test_on_affine_devices_the_answer_is_right_and_cheap(exact: bool) -> None:
    pushed = []
    for fixed, slope, cap, answer in devices(1000):
        result = run(affine(fixed, slope), cap, exact=exact)
        best = result.search.best or 0
        assert best == answer if exact else answer / 1.02 <= best <= answer
        assert result.search.proved or not exact or answer == 0
        assert len(result.tried) <= 12
        pushed.append(sum(result.tried) / max(answer, 1))
    assert mean(pushed) <= (3 if exact else 2)


@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_with_head_room_no_trial_on_an_affine_device_runs_out_of_memory(noise: float) -> None:
    """Save where two samples already do: what the second one costs can only be seen by running it."""
    for seed, (fixed, slope, cap, answer) in enumerate(devices(1500)):
        peak = noisy(affine(fixed, slope), noise, seed)
        if answer >= 1 and peak(2) <= LIMIT:
            assert run(peak, cap).out_of_memory == 0, (fixed, slope, cap)


@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_where_what_is_held_is_known_there_are_fewer_trials_and_no_more_failures(noise: float) -> None:
    trials, ratios = [], []
    for seed, (fixed, slope, cap, answer) in enumerate(devices(1500)):
        peak = noisy(affine(fixed, slope), noise, seed)
        result = run(peak, cap, turn=peak, rest=fixed)
        if answer:
            assert result.out_of_memory == (peak(2) > LIMIT and cap > 1), (fixed, slope, cap)
            ratios.append((result.search.best or 0) / answer)
        trials.append(len(result.tried))
    assert mean(trials) <= 3
    assert mean(ratios) >= 0.98


def test_what_is_held_without_samples_makes_the_second_trial_a_large_one() -> None:
    peak = affine(800_000, 100)
    assert run(peak, 10_000).tried[1] == 2
    assert 16 < run(peak, 10_000, turn=peak, rest=800_000).tried[1] <= 32


def test_where_runs_peak_apart_by_chance_the_last_bytes_are_not_searched_for() -> None:
    trials = {0: 0, 80_000: 0}
    for seed in range(50):
        jumpy = noisy(affine(100_000, 1_000), 0.04, seed)
        for jump in trials:
            result = run(jumpy, 10_000, turn=jumpy, rest=100_000, jump_bytes=jump)
            trials[jump] += len(result.tried)
            assert (result.search.best or 0) > 780
    assert trials[80_000] < 0.8 * trials[0]


def test_jumps_are_no_reason_to_stop_where_samples_take_little_of_the_budget() -> None:
    peak = affine(915_000, 200)
    result = run(peak, 10_000, turn=peak, rest=915_000, jump_bytes=80_000)
    assert 375 <= (result.search.best or 0) <= 425


def test_what_the_first_sample_costs_once_is_not_taken_for_what_each_costs() -> None:
    """Copies made in the forward pass, of weights in another precision say, whatever the batch."""
    peak = affine(600_000, 500)
    result = run(peak, 10_000, turn=peak, rest=100_000, whole_saving_bytes=50_000)
    assert 784 <= (result.search.best or 0) <= 800
    assert result.out_of_memory == 0


def test_the_whole_target_is_no_second_guess_where_one_sample_fills_the_budget() -> None:
    peak = affine(500_000, 300_000)
    assert run(peak, 1_000, turn=peak, rest=500_000, whole_saving_bytes=100_000).tried == [1, 2]


def test_where_the_whole_target_fits_the_small_trials_are_a_fraction_of_it() -> None:
    for fixed, slope, cap, answer in devices(2000):
        if answer == cap >= 64 and fixed <= BUDGET / 2:
            tried = run(affine(fixed, slope), cap).tried
            assert tried[-1] == cap
            assert sum(tried[:-1]) <= cap


# What it promises, whatever the device


@settings(max_examples=300, deadline=None)
@given(
    cap=st.integers(1, 1_000_000), minimum=st.integers(1, 4), sizes=st.data(), exact=st.booleans(),
    saving=st.sampled_from([0, 100_000]), prior=st.sampled_from([None, affine(50_000, 30), affine(0, 900)]),
)  # fmt: skip
def test_any_device_at_all_is_survived(
    cap: int, minimum: int, sizes: st.DataObject, exact: bool, saving: int, prior: Bytes | None
) -> None:
    assume(minimum <= cap)
    trial = st.tuples(st.booleans(), st.none() | st.integers(0, 2 * BUDGET), st.none() | st.integers(0, 2 * BUDGET))
    search = MicroBatchSearch(BUDGET, cap, minimum, prior, exact, saving)
    tried: dict[int, bool] = {}
    while (n := search.propose()) is not None:
        assert minimum <= n <= cap
        assert n not in tried
        tried[n], peak, turn = sizes.draw(trial)
        search.observe(n, fits=tried[n], peak_bytes=peak, turn_bytes=turn)
        assert search.trials <= (38 if exact else 12)
    assert search.best == max((n for n, fits in tried.items() if fits), default=None)
    if exact and search.best:
        assert search.best == cap or tried[search.best + 1] is False
    assert search.proved == (search.best is not None and (search.best == cap or tried.get(search.best + 1) is False))


@settings(max_examples=300, deadline=None)
@given(cap=st.integers(1, 1_000_000), share=st.floats(0, 1.2), measured=st.booleans())
def test_an_exact_answer_is_exact_also_where_memory_jumps(cap: int, share: float, measured: bool) -> None:
    edge = int(share * cap)
    result = run(lambda n: BUDGET / 2 if n <= edge else 9 * BUDGET, cap, exact=True, measured=measured)
    assert (result.search.best or 0) == min(edge, cap)
    assert len(result.tried) <= 37


@settings(max_examples=200, deadline=None)
@given(wrong=st.floats(0.1, 10), fixed=st.floats(0, 0.8), answer=st.integers(1, 5000), extra=st.floats(0.3, 4))
def test_a_wildly_wrong_prior_costs_trials_but_not_the_answer(
    wrong: float, fixed: float, answer: int, extra: float
) -> None:
    truth = affine(fixed * BUDGET, (1 - fixed) * BUDGET / (answer + 0.5))
    cap = max(1, int(answer * extra))
    result = run(truth, cap, prior=lambda n: wrong * truth(n))
    assert len(result.tried) <= 12
    assert (result.search.best or 0) >= min(answer, cap) / 1.02


def test_a_prior_that_is_a_little_off_is_corrected_at_once() -> None:
    truth = affine(300_000, 2_000)
    for off in (0.96, 1.04):
        result = run(truth, 4096, prior=lambda n: off * truth(n))  # noqa: B023
        assert len(result.tried) == 2
        assert result.search.best is not None
        assert 343 <= result.search.best <= 350
        assert result.out_of_memory == 0


# Real steps on a CPU, in MiB: the optimizer's temporaries hide the slope at small sizes

CPU = {
    "mlp": ({1: 793, 8: 752, 64: 762, 256: 800}, {1: 617, 8: 624, 64: 632, 256: 656}),
    "cnn": ({1: 361, 8: 372, 64: 674, 128: 846, 256: 1323}, {1: 315, 8: 360, 64: 626, 128: 780, 256: 1195}),
    "transformer": ({1: 363, 8: 469, 64: 1134, 128: 2018, 256: 3644}, {1: 363, 8: 464, 64: 1134, 128: 1954, 256: 3484}),
}


@pytest.mark.parametrize("model", CPU)
@pytest.mark.parametrize("budget_mib", [805, 900, 1000, 1200, 2000, 3000, 4000])
def test_real_cpu_steps_are_searched_without_running_out_of_memory(model: str, budget_mib: int) -> None:
    peak, turn = (table(points) for points in CPU[model])
    budget, cap = budget_mib * 2**20, 1024
    result = run(peak, cap, budget=budget, turn=turn)
    truth = largest(lambda n: peak(n) <= budget, cap)
    assert result.search.best is not None
    assert truth * 0.95 <= result.search.best <= truth
    assert len(result.tried) <= 8
    assert result.out_of_memory == 0


def test_the_turn_shows_the_slope_that_the_optimizer_hides() -> None:
    turn = affine(100_000, 1_000)
    peak = lambda n: max(600_000, turn(n))  # noqa: E731
    assert run(peak, 100_000, turn=turn).out_of_memory == 0
    assert run(peak, 100_000).out_of_memory > 0


# The whole target in one pass


def test_the_whole_target_is_tried_where_its_saving_makes_it_fit() -> None:
    peak = affine(400_000, 10_000)
    result = run(peak, 70, whole_saving_bytes=150_000)
    assert peak(69) > BUDGET >= peak(70) - 150_000
    assert result.search.best == 70
    assert result.out_of_memory == 0


def test_the_whole_target_is_not_tried_where_the_line_says_it_does_not_fit() -> None:
    result = run(affine(400_000, 10_000), 80, whole_saving_bytes=150_000)
    assert result.search.best == 60
    assert 80 not in result.tried


def test_the_whole_target_may_fit_although_one_sample_with_gradients_held_does_not() -> None:
    result = run(affine(1_010_000, 1_000), 4, whole_saving_bytes=100_000)
    assert (result.tried, result.search.best) == ([1, 4], 4)


@settings(max_examples=300, deadline=None)
@given(
    cap=st.integers(2, 4096), fixed=st.floats(0, 0.9), saving=st.integers(1, 400_000), room=st.floats(0.3, 3),
    exact=st.booleans(),
)  # fmt: skip
def test_with_a_saving_the_best_of_both_ways_is_found(
    cap: int, fixed: float, saving: int, room: float, exact: bool
) -> None:
    peak = affine(fixed * BUDGET, (1 - fixed) * BUDGET / (room * cap))
    assume(peak(2) <= BUDGET)
    result = run(peak, cap, whole_saving_bytes=saving, exact=exact)
    whole = int(peak(cap)) - saving <= 0.999 * BUDGET
    accumulated = largest(lambda n: int(peak(n)) <= BUDGET, cap - 1)
    assert result.search.best is not None
    assert result.search.best >= (cap if whole else accumulated / (1 if exact else 1.02))
    assert len(result.tried) <= 12


# The odd things


def test_a_cap_below_the_minimum_is_an_error_that_names_both() -> None:
    with pytest.raises(InvalidInput, match=r"1 samples per rank.* at least 2"):
        MicroBatchSearch(BUDGET, cap=1, minimum=2)
    with pytest.raises(InvalidInput, match="at least 1"):
        MicroBatchSearch(BUDGET, cap=1, minimum=0)


def test_a_size_that_was_not_proposed_cannot_be_observed() -> None:
    search = MicroBatchSearch(BUDGET, cap=8)
    with pytest.raises(InvalidInput, match="5 samples"):
        search.observe(5, fits=True)
    assert search.propose() == search.propose() == 1


@pytest.mark.parametrize("budget", [0, -1])
def test_no_budget_at_all_still_measures_the_smallest_size(budget: int) -> None:
    search = MicroBatchSearch(budget, cap=8)
    assert search.propose() == 1
    search.observe(1, fits=False, peak_bytes=100)
    assert search.propose() is None
    assert search.best is None
    assert not search.proved


def test_a_best_size_that_fails_on_a_second_look_is_given_up() -> None:
    search = run(affine(100_000, 10_000), 256).search
    assert search.best == 90
    search.observe(90, fits=False)
    assert search.best == 9
    n = search.propose()
    assert n is not None
    assert 9 < n < 90


def test_peaks_that_fall_with_size_are_no_reason_to_jump_blindly() -> None:
    result = run(table({1: 0.6, 8: 0.55, 64: 0.56, 4096: 4.0}), 4096)
    assert result.out_of_memory == 0
    assert len(result.tried) <= 8


def test_a_device_that_measures_nothing_is_bisected() -> None:
    result = run(affine(0, 10_000), 4096, measured=False)
    assert result.search.best is not None
    assert 98 <= result.search.best <= 100
    assert len(result.tried) <= 12


def test_the_size_that_a_plan_would_name_is_tried_before_the_largest() -> None:
    peak = affine(100_000, 1_000)
    result = run(peak, 2_000, turn=peak, rest=100_000, rounded=lambda n: min(n, 667))
    assert 667 in result.tried
    assert result.tried.index(667) < result.tried.index(result.search.best or 0)
    assert 882 <= (result.search.best or 0) <= 900
    near = run(peak, 2_000, turn=peak, rest=100_000, rounded=lambda n: n if n < 885 else 885)
    assert near.search.best == 885  # within the tolerance of 900


def test_where_peaks_jump_what_the_optimizer_hides_may_be_steeper_than_the_turn() -> None:
    def turn(n: int) -> float:
        return 100_000 + 500 * n

    def peak(n: int) -> float:
        return max(300_000, 100_000 + 1_000 * n)

    assert run(peak, 2_000, turn=turn, rest=100_000).out_of_memory
    assert not run(peak, 2_000, turn=turn, rest=100_000, jump_bytes=80_000).out_of_memory
