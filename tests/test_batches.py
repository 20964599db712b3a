"""Cutting, growing and rebuilding batches of any shape."""

import subprocess
import sys
from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autobatch.batches import batch_size, compare_layouts, find_layout, grow, map_arrays, split
from autobatch.errors import InvalidInput

Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    name: str = "kept"


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def test_map_arrays_rebuilds_every_kind_of_container():
    user = UserDict(a=zeros(2))
    user.note = "kept"
    batch = (Pair(zeros(2), [zeros(2), "text"]), {"k": Sample(zeros(2))}, user, np.zeros(2), None, 3)
    pair, mapping, mapped_user, array, none, number = map_arrays(lambda leaf: leaf + 1, batch)
    assert isinstance(pair, Pair) and pair.x[0] == 1 and pair.y[0][0] == 1 and pair.y[1] == "text"
    assert isinstance(mapping["k"], Sample) and mapping["k"].image[0] == 1 and mapping["k"].name == "kept"
    assert isinstance(mapped_user, UserDict) and mapped_user["a"][0] == 1 and mapped_user.note == "kept"
    assert isinstance(array, np.ndarray) and array[0] == 1 and (none, number) == (None, 3)
    assert user["a"][0] == 0 and batch[1]["k"].image[0] == 0


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (zeros(8, 3, 32, 32), 8),
        ((zeros(8, 5), zeros(8)), 8),
        ([zeros(2, 5), zeros(2)], 2),
        ({"ids": zeros(8, 512), "mask": zeros(8, 512), "position_ids": zeros(1, 512), "labels": zeros(8, 512)}, 8),
        ({"ids": zeros(8, 64), "mask": zeros(8, 64), "positions": zeros(64)}, 8),
        ({"ids": zeros(8, 64), "causal": zeros(64, 64), "labels": zeros(8, 64)}, 8),
        ((zeros(20, 8, 5), zeros(8)), 8),
        ((zeros(8, 5), zeros(3), torch.tensor(1.0)), 8),
        ((zeros(8, 5), list("abcdefgh")), 8),
        (([zeros(3, 9, 7) for _ in range(5)], [{"boxes": zeros(2, 4), "labels": zeros(2)} for _ in range(5)]), 5),
        (([zeros(3, 9, 7) for _ in range(3)], [{"boxes": zeros(2, 4)} for _ in range(3)]), 3),
        (([zeros(5, 16), zeros(7, 16), zeros(4, 16)], zeros(3)), 3),
        (Sample(np.zeros((6, 2))), 6),
    ],
)
def test_the_batch_size_is_found(batch, size):
    assert batch_size(batch) == size


def test_what_has_no_batch_dimension_is_shared_and_a_later_dimension_is_cut():
    sequence, labels, weights, scalar = torch.arange(40.0).view(5, 4, 2), torch.arange(4), zeros(3), torch.tensor(2.0)
    first, second = split((sequence, labels, weights, scalar), [1, 3])
    assert first[0].shape == (5, 1, 2) and torch.equal(second[0], sequence[:, 1:])
    assert first[2] is weights and second[3] is scalar


def test_lists_of_samples_are_cut_as_lists():
    images, targets = [zeros(3, 4, i) for i in range(1, 4)], [{"boxes": zeros(i, 4)} for i in range(1, 4)]
    first, second = split((images, targets), [2, 1])
    assert [image.shape[2] for image in first[0]] == [1, 2] and second == ([images[2]], [targets[2]])


def test_sizes_that_do_not_add_up_are_an_error_with_both_numbers():
    with pytest.raises(InvalidInput, match=r"8 samples.* add up to 7"):
        split((zeros(8, 3), zeros(8)), [4, 3])


def test_a_batch_without_dimensions_is_an_error():
    with pytest.raises(InvalidInput, match="no dimension"):
        batch_size({"loss": torch.tensor(1.0)})


def test_two_batches_of_known_sizes_show_the_layout_exactly():
    def make(n):
        return {"x": zeros(2, n, 2), "same": zeros(3, 3), "names": ["a"] * n, "nested": (zeros(n), zeros(7, n))}

    layout = compare_layouts(make(2), make(3), (2, 3))
    assert layout.cuts == {("x",): 1, ("names",): 0, ("nested", 0): 0, ("nested", 1): 1}
    grown = grow(make(3), layout, 7)
    assert map_arrays(lambda leaf: tuple(leaf.shape), grown) == map_arrays(lambda leaf: tuple(leaf.shape), make(7))


@pytest.mark.parametrize("make", [lambda n: zeros(4), lambda n: zeros(2 * n), lambda n: {str(n): zeros(n)}])
def test_data_that_does_not_grow_by_one_per_sample_is_an_error(make):
    with pytest.raises(InvalidInput):
        compare_layouts(make(2), make(3), (2, 3))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_pieces_put_together_are_the_whole_and_share_its_memory(sizes, use_numpy):
    n = sum(sizes)
    x, ids = torch.arange(n * 6.0).view(n, 2, 3), torch.arange(n)
    batch = {"x": x.numpy() if use_numpy else x, "more": [ids, (ids * 2,)], "note": "kept"}
    pieces = split(batch, sizes)
    assert [len(piece["x"]) for piece in pieces] == sizes
    for leaf in (lambda b: b["x"], lambda b: b["more"][0], lambda b: b["more"][1][0]):
        assert np.array_equal(np.concatenate([np.asarray(leaf(piece)) for piece in pieces]), np.asarray(leaf(batch)))
        assert all(np.shares_memory(np.asarray(leaf(piece)), np.asarray(leaf(batch))) for piece in pieces)
    assert all(piece["note"] == "kept" for piece in pieces)


@given(st.integers(1, 8), st.integers(1, 40))
def test_a_grown_batch_cycles_through_the_samples_and_shares_no_memory(size, n):
    batch = (torch.arange(size * 2.0).view(size, 2), torch.arange(size))
    grown = grow(batch, find_layout(batch), n)
    assert grown[1].tolist() == [i % size for i in range(n)]
    assert grown[0].untyped_storage().data_ptr() != batch[0].untyped_storage().data_ptr()


def test_batches_are_cut_without_importing_torch():
    code = "import sys, numpy as np; from autobatch.batches import split; split(np.zeros((4, 2)), [1, 3]); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
