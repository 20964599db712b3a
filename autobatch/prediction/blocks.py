"""Blocks of memory, their neighbours, and the pools that they wait in while they are free."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment; `before` and `after` are its neighbours there."""

    address: int
    size: int
    pool: Pool
    allocated: bool = False
    mapped: bool = True
    """False: address space of an expandable segment, with no memory behind it."""
    before: Block | None = None
    after: Block | None = None
    born: int = 0
    """The pool's clock when it became free, for garbage collection."""

    @property
    def is_whole_segment(self) -> bool:
        return self.before is None and self.after is None


@dataclass(slots=True)
class Clock:
    """Counts searches for a free block, by which garbage collection knows how old a block is."""

    now: int = 0


@dataclass(eq=False, slots=True)
class Pool:
    """Free blocks of one stream, small or large."""

    small: bool
    page: int
    """Bytes that an expandable segment grows by."""
    clock: Clock
    """Shared by the pools of all streams."""
    blocks: dict[int, Block] = field(default_factory=dict)
    """Free blocks with memory behind them, by address."""
    by_size: list[tuple[int, int]] = field(default_factory=list)
    """Their (size, address), sorted."""
    unmapped: dict[int, Block] = field(default_factory=dict)

    def add(self, block: Block) -> None:
        block.born = self.clock.now
        self.blocks[block.address] = block
        insort(self.by_size, (block.size, block.address))

    def remove(self, block: Block) -> None:
        del self.blocks[block.address]
        del self.by_size[bisect_left(self.by_size, (block.size, block.address))]

    def from_size(self, size: int) -> Iterator[Block]:
        """Free blocks of at least `size` bytes, the smallest first, and of those the lowest address."""
        for i in range(bisect_left(self.by_size, (size, 0)), len(self.by_size)):
            yield self.blocks[self.by_size[i][1]]


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def cut(block: Block, size: int) -> Block:
    """Shorten a block to `size` bytes, and give the rest of it."""
    rest = Block(block.address + size, block.size - size, block.pool, before=block, after=block.after)
    if block.after is not None:
        block.after.before = rest
    block.after, block.size = rest, size
    return rest


def join(block: Block, after: Block) -> None:
    """Lengthen a block by the one after it."""
    block.size += after.size
    block.after = after.after
    if after.after is not None:
        after.after.before = block


def room(block: Block) -> int:
    """Bytes that a free block could grow to."""
    after = block.after
    return block.size + (after.size if after is not None and not after.mapped else 0)


def free_from(block: Block | None, size: int) -> bool:
    while block is not None and not block.allocated and size > 0:
        size -= block.size
        block = block.after
    return size <= 0


def run(block: Block | None) -> Iterator[Block]:
    while block is not None:
        yield block
        block = block.after
