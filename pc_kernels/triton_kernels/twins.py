"""References that are equal bit for bit, found by a table of hashes while points are moved.

Programs enter their references, all those of a hash at one place; the last program reads what came first
there, and compares, since a hash proves nothing.
"""

import triton
import triton.language as tl

INDEX_BITS = tl.constexpr(30)
"""Of an entry; above them are 33 bits of the hash, which it does without the last ones."""

INDEX, TAG = tl.constexpr((1 << 30) - 1), tl.constexpr((1 << 33) - 1)
"""Masks of these."""

NOBODY = tl.constexpr((1 << 63) - 1)
"""Where nothing has been entered: more than any entry."""


@triton.jit
def hash_of(column, x):
    """64 bits for each feature: two rounds of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    bits = x.to(tl.uint32, bitcast=True).to(tl.uint64)
    z = (column.to(tl.uint64) << 32) | bits
    z += tl.full([1], 0x9E3779B97F4A7C15, tl.uint64)
    z = (z ^ (z >> 30)) * tl.full([1], 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full([1], 0x94D049BB133111EB, tl.uint64)
    return (z ^ (z >> 31)).to(tl.int64, bitcast=True)


@triton.jit
def enter(table_ptr, room, row, hashes, inside):
    """Puts references in the table of `room` places, a power of two, and one more; returns where."""
    tag = (hashes >> 31) & TAG
    entry = (tag << INDEX_BITS) | row.to(tl.int64)
    place = (hashes & (room - 1).to(tl.int64)).to(tl.int32)
    pending = inside.to(tl.int32)
    nobody = tl.zeros_like(entry) + NOBODY
    while tl.max(pending, 0) > 0:
        asks = pending > 0
        at = tl.where(asks, place, room)
        before = tl.atomic_cas(table_ptr + at, nobody, tl.where(asks, entry, nobody), sem="relaxed")
        found = asks & ((before == NOBODY) | ((before >> INDEX_BITS) == tag))
        tl.atomic_min(table_ptr + place, entry, mask=found, sem="relaxed")
        pending = (asks & (found == 0)).to(tl.int32)
        place = tl.where(pending > 0, (place + 1) & (room - 1), place)
    return place


@triton.jit
def keep_equal(twins_ptr, moved_ptr, row, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of ROWS points, those that are not the same bits as their twins become their own."""
    j = row + tl.arange(0, ROWS)
    first = tl.load(twins_ptr + j, mask=j < count, other=0)
    asked = (j < count) & (first != j)
    bad = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = asked[:, None] & (column < width)[None, :]
        places = j.to(tl.int64)[:, None] * width + column[None, :]
        others = first.to(tl.int64)[:, None] * width + column[None, :]
        x = tl.load(moved_ptr + places, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        y = tl.load(moved_ptr + others, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        bad |= (x != y).to(tl.int32)
    tl.store(twins_ptr + j, j, mask=asked & (tl.max(bad, 1) > 0))


@triton.jit
def find_twins(
    twins_ptr,
    table_ptr,
    moved_ptr,
    count,
    width,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Twins [count] <- of places in the table the first reference that equals each.

    twins[count] <- for how many that may be another.
    """
    later = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        place = tl.load(twins_ptr + j, mask=j < count, other=0)
        entry = tl.load(table_ptr + place, mask=j < count, other=0, cache_modifier=".cg")
        first = (entry & INDEX).to(tl.int32)
        tl.store(twins_ptr + j, first, mask=j < count)
        later += ((j < count) & (first != j)).to(tl.int32)
    number = tl.sum(later, 0)
    tl.store(twins_ptr + count, number)
    tl.debug_barrier()
    if number > 0:
        for start in range(0, count, BLOCK):
            j = start + tl.arange(0, BLOCK)
            first = tl.load(twins_ptr + j, mask=j < count, other=0)
            if tl.max(((j < count) & (first != j)).to(tl.int32), 0) > 0:
                for row in range(start, tl.minimum(start + BLOCK, count), ROWS):
                    keep_equal(twins_ptr, moved_ptr, row, count, width, ROWS, COLUMNS)
