"""The simulated caching allocator, against worked examples of torch's rules and against a plain model of them."""

from __future__ import annotations

import doctest
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.prediction import allocator as module
from autobatch.prediction.allocator import AllocatorSettings, CachingAllocator, OutOfMemory

KIB, MIB = 1 << 10, 1 << 20
EXPANDABLE = AllocatorSettings(expandable_segments=True)


def test_the_docstring_shows_what_happens():
    assert doctest.testmod(module).failed == 0


# Worked examples


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # exactly 1 MiB would remain: not split, and counted as allocated
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (30 * MIB + 1, 30 * MIB + 512, 32 * MIB),
    ],
)
def test_one_request(size, allocated, reserved):
    allocator = CachingAllocator()
    allocator.malloc(size)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


def test_the_best_fit_is_the_smallest_block_and_of_those_the_lowest():
    allocator = CachingAllocator()
    a, _, b, _, c, _ = (allocator.malloc(size * KIB) for size in (300, 4, 200, 4, 200, 4))
    low, high = b.address, c.address
    for block in (a, c, b):
        allocator.free(block)
    assert allocator.malloc(200 * KIB).address == low
    assert allocator.malloc(200 * KIB).address == high


def test_neighbours_merge_and_a_block_is_reused_in_part():
    allocator = CachingAllocator()
    a, b, c = (allocator.malloc(6 * MIB) for _ in range(3))
    for block in (a, c, b):
        allocator.free(block)
    assert [[b.size for b in segment] for segment in allocator.segments()] == [[20 * MIB]]
    allocator.malloc(19 * MIB + 512)
    assert allocator.allocated_bytes == 20 * MIB  # what remains is below 1 MiB


def test_streams_and_pools_do_not_share():
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(15 * MIB, stream=0))
    allocator.malloc(15 * MIB, stream=1)
    allocator.malloc(1 * MIB, stream=0)
    assert allocator.reserved_bytes == (16 + 16 + 2) * MIB


def test_what_lies_free_is_released_before_it_is_out_of_memory():
    allocator = CachingAllocator(100 * MIB)
    blocks = [allocator.malloc(30 * MIB) for _ in range(3)]
    for block in blocks[:2]:
        allocator.free(block)
    allocator.malloc(60 * MIB)
    assert (allocator.retries, allocator.reserved_bytes) == (1, 90 * MIB)
    with pytest.raises(OutOfMemory, match="94371840 reserved of 104857600"):
        allocator.malloc(20 * MIB)


def test_a_block_in_the_middle_of_a_segment_cannot_be_released():
    allocator = CachingAllocator(100 * MIB)
    big = allocator.malloc(80 * MIB)
    allocator.free(big)
    allocator.malloc(11 * MIB)
    with pytest.raises(OutOfMemory):
        allocator.malloc(75 * MIB)


def test_expandable_segments_grow_by_pages_and_leave_no_gaps():
    allocator = CachingAllocator(settings=EXPANDABLE)
    for size in (15, 15, 30):
        allocator.malloc(size * MIB)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.malloc(512)
    assert allocator.reserved_bytes == 62 * MIB


def test_expandable_segments_give_back_whole_pages():
    allocator = CachingAllocator(100 * MIB, EXPANDABLE)
    a, b, c = (allocator.malloc(30 * MIB) for _ in range(3))
    allocator.free(b)  # from 30 to 60 MiB: one whole page, from 40 to 60
    allocator.empty_cache()
    assert allocator.reserved_bytes == 80 * MIB
    allocator.malloc(25 * MIB)  # 10 MiB are there; the page is mapped again
    assert allocator.reserved_bytes == 100 * MIB
    allocator.free(a), allocator.free(c)


def test_roundup_to_divisions_of_a_power_of_two():
    allocator = CachingAllocator(settings=AllocatorSettings(roundup_power2_divisions=4))
    assert allocator.malloc(1200 * KIB).size == 1280 * KIB  # 1024, 1280, 1536, 1792, 2048
    assert allocator.malloc(1024 * KIB).size == 1024 * KIB


def test_blocks_above_max_split_are_kept_whole():
    allocator = CachingAllocator(400 * MIB, AllocatorSettings(max_split_bytes=100 * MIB))
    big, bigger = allocator.malloc(120 * MIB), allocator.malloc(200 * MIB)
    allocator.free(big), allocator.free(bigger)
    allocator.malloc(30 * MIB)  # not cut from the 120
    assert allocator.reserved_bytes == 350 * MIB
    allocator.malloc(110 * MIB)  # 120 is near enough
    assert allocator.reserved_bytes == 350 * MIB
    allocator.malloc(150 * MIB)  # 200 is too much: it is released for it, which is no retry
    assert (allocator.reserved_bytes, allocator.retries) == (300 * MIB, 0)


def test_garbage_collection_releases_the_old():
    collecting = AllocatorSettings(garbage_collection_threshold=0.5)
    allocator = CachingAllocator(200 * MIB, collecting)
    old = allocator.malloc(60 * MIB)
    allocator.free(old)
    recent = allocator.malloc(70 * MIB)
    allocator.free(recent)
    allocator.malloc(80 * MIB)
    assert allocator.reserved_bytes == (70 + 80) * MIB
    assert allocator.retries == 0


def test_a_block_cannot_be_freed_twice():
    allocator = CachingAllocator()
    block = allocator.malloc(512)
    allocator.free(block)
    with pytest.raises(ValueError, match="not allocated"):
        allocator.free(block)


# Against a plain model: segments as lists, everything found by looking at everything


@dataclass
class Piece:
    size: int
    used: bool


class PlainModel:
    """The default mode, without address arithmetic: a segment is (small, stream, pieces in order)."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.segments = []

    def reserved(self):
        return sum(piece.size for _, _, pieces in self.segments for piece in pieces)

    def allocated(self):
        return sum(piece.size for _, _, pieces in self.segments for piece in pieces if piece.used)

    def malloc(self, size, stream):
        size = max(512, -(-size // 512) * 512)
        small = size <= MIB
        for _ in range(3):
            fitting = [
                (piece.size, i, j)
                for i, (s, t, pieces) in enumerate(self.segments)
                if (s, t) == (small, stream)
                for j, piece in enumerate(pieces)
                if not piece.used and piece.size >= size
            ]
            if fitting:
                _, i, j = min(fitting)
                return self.use(self.segments[i][2], j, size)
            segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            if self.reserved() + segment <= self.capacity:
                self.segments.append((small, stream, [Piece(segment, False)]))
            else:
                self.segments = [s for s in self.segments if len(s[2]) > 1 or s[2][0].used]
        return None

    def use(self, pieces, j, size):
        piece, rest = pieces[j], pieces[j].size - size
        small = any(p is piece for s, _, ps in self.segments if s for p in ps)
        if rest >= 512 if small else rest > MIB:
            pieces.insert(j + 1, Piece(rest, False))
            piece.size = size
        piece.used = True
        return piece

    def free(self, piece):
        piece.used = False
        for _, _, pieces in self.segments:
            j = 0
            while j + 1 < len(pieces):
                if not pieces[j].used and not pieces[j + 1].used:
                    pieces[j].size += pieces.pop(j + 1).size
                else:
                    j += 1


SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, 2 * MIB),
    st.integers(1, 40 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 12 * MIB, 20 * MIB]),
)
ACTIONS = st.lists(st.tuples(SIZES, st.integers(0, 1), st.integers(0, 2**16), st.booleans()), max_size=60)


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.integers(20 * MIB, 300 * MIB))
def test_it_does_what_a_plain_model_does(actions, capacity):
    allocator, model, live = CachingAllocator(capacity), PlainModel(capacity), []
    for size, stream, which, is_free in actions:
        if is_free and live:
            block, piece = live.pop(which % len(live))
            allocator.free(block)
            model.free(piece)
        else:
            piece = model.malloc(size, stream)
            if piece is None:
                with pytest.raises(OutOfMemory):
                    allocator.malloc(size, stream)
            else:
                live.append((allocator.malloc(size, stream), piece))
        assert (allocator.allocated_bytes, allocator.reserved_bytes) == (model.allocated(), model.reserved())
        layout = [[(block.size, block.allocated) for block in segment] for segment in allocator.segments()]
        assert layout == [[(piece.size, piece.used) for piece in pieces] for _, _, pieces in model.segments]


ANY_SETTINGS = st.builds(
    AllocatorSettings,
    expandable_segments=st.booleans(),
    max_split_bytes=st.one_of(st.none(), st.integers(21 * MIB, 60 * MIB)),
    roundup_power2_divisions=st.sampled_from([0, 4, 8]),
    garbage_collection_threshold=st.sampled_from([0.0, 0.3, 0.8]),
    large_segment_bytes=st.sampled_from([20 * MIB, 40 * MIB]),
)


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.one_of(st.none(), st.integers(1, 300 * MIB)), ANY_SETTINGS)
def test_whatever_the_settings_the_books_balance(actions, capacity, options):
    allocator, live = CachingAllocator(capacity, options), []
    for size, stream, which, is_free in actions:
        if is_free and live:
            allocator.free(live.pop(which % len(live)))
        else:
            try:
                live.append(allocator.malloc(size, stream))
            except OutOfMemory:
                assert capacity is not None
            else:
                assert live[-1].size >= size
        blocks = [block for segment in allocator.segments() for block in segment]
        used = [block for block in blocks if block.allocated]
        assert {id(block) for block in used} == {id(block) for block in live}
        assert allocator.allocated_bytes == sum(block.size for block in used)
        assert allocator.reserved_bytes == sum(block.size for block in blocks if block.mapped)
        assert allocator.allocated_bytes <= allocator.reserved_bytes
        assert capacity is None or allocator.reserved_bytes <= capacity
        for segment in allocator.segments():
            for one, other in pairwise(segment):
                assert other.before is one
                assert one.address + one.size == other.address
                assert one.allocated or other.allocated or one.mapped != other.mapped
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)
