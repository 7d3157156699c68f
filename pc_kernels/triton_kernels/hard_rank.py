"""Stage `hard_rank`: mid-ranks in [0, 1] of rows; for a teacher, from its Gram row on.

A monotone map drops the values into at least one bucket a point, and a counting sort brings together
what shares a bucket; a value's rank is its bucket's place plus how many of the bucket compare below.
Atomics hand out the places in a bucket in any order, but ranks do not depend on it. Short rows compare
all pairs instead. Memory between threads as in grid.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .dissimilarity import GIVEN, Gram, offset_of, row_extent
from .row import SPECIALIZATION, Row, counted, empty_tally, extent_of, finite, present, tallied
from .row_sums import factors_of

ARRAYS = tl.constexpr(3)
"""Of `Buckets`, each of a place for each value and `SPARE` more."""

SPARE = tl.constexpr(2 * 16)
"""So that all start in whole sectors."""

MOST_BUCKETS = tl.constexpr(1 << 20)
"""Of the first buckets: their number is a float32 number."""

CROWD = tl.constexpr(16)
"""More values than these in a bucket are a crowd, which is split: to compare them would cost more."""

RUN = tl.constexpr(16)
"""Buckets that a thread sums up at a time: the others wait for it once."""

LEAST = tl.constexpr(-(1 << 31))
MOST = tl.constexpr((1 << 31) - 1)


class Buckets(NamedTuple):
    """A program's scratch memory for the counting sort: pointers, and the number of buckets at first."""

    places: tl.tensor
    """Bucket b's size; then its first place; as it fills, where its next value goes; at last its end.

    Before the first bucket's there is a 0: the end of bucket b - 1 is where bucket b starts.
    """
    bucket: tl.tensor
    """Of each value; its complement if all in it are alike."""
    ordered: tl.tensor
    """The values' keys, bucket by bucket; before, what is known of crowds."""
    number: tl.tensor


class Options(NamedTuple):
    """What undefined rows are, the way of all rows, and the sizes of blocks."""

    FINITE: tl.constexpr
    """A row with an infinity is undefined, as a teacher's."""
    SHORT: tl.constexpr
    """All pairs are compared: a row is one block."""
    BLOCK: tl.constexpr
    PAIRS: tl.constexpr


@triton.jit
def mid_rank(below, equal, number):
    """From how many compare below, and equal (itself among them); exactly 0 and 1 at the ends."""
    half = 0.5 / tl.maximum(number - 1, 1).to(tl.float64)
    rank = ((2 * below + equal - 1).to(tl.float64) * half).to(tl.float32)
    return tl.where(number > 1, rank, 0.5)


@triton.jit
def bucket_of(x, low, factors, buckets):
    """Monotone in x, infinities included: rounding is. `low` has been multiplied by `factors.half`."""
    t = (x * factors.half - low) * factors.first * factors.second
    last = tl.cast(buckets - 1, tl.float32)
    return tl.minimum(tl.maximum(t, 0.0), last).to(tl.int32)


@triton.jit
def rank_all_pairs(row, rank_ptr, number, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    """Ranks of a row that is one block long."""
    j = tl.arange(0, BLOCK)
    valid = counted(j, row)
    x = tl.load(row.x + j, mask=valid, other=0.0)
    below = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for first in range(0, row.count, PAIRS):
        k = first + tl.arange(0, PAIRS)
        other = tl.load(row.x + k, mask=counted(k, row), other=float("nan"))[:, None]
        below += tl.sum((other < x[None, :]).to(tl.int32), axis=0)  # a NaN compares false
        equal += tl.sum((other == x[None, :]).to(tl.int32), axis=0)
    tl.debug_barrier()  # ranks may take the values' place
    rank = present(mid_rank(below, equal, number), valid, row)
    tl.store(rank_ptr + j, rank, mask=j < row.count)


@triton.jit
def key_of(x):
    """An integer in the order of the numbers, -0 and 0 the same; none is `LEAST` or `MOST`."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & MOST)


@triton.jit
def unsigned(x):
    """A difference of keys, which may have left int32, as float32: the order is kept."""
    return x.to(tl.uint32, bitcast=True).to(tl.float32)


@triton.jit
def fill(ptr, number, value, BLOCK: tl.constexpr):
    """Puts a value in so many places; ends with a barrier."""
    for first in range(0, number, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(ptr + i, tl.full([BLOCK], value, tl.int32), mask=i < number)
    tl.debug_barrier()


@triton.jit
def count_in_buckets(row, buckets, low, factors, BLOCK: tl.constexpr):
    """Each value's bucket, by its size, and the sizes of the buckets; ends with a barrier."""
    for first in range(0, row.count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        valid = counted(j, row)
        x = tl.load(row.x + j, mask=valid, other=0.0)
        bucket = bucket_of(x, low, factors, buckets.number)
        tl.store(buckets.bucket + j, bucket, mask=valid)
        tl.atomic_add(buckets.places + bucket, 1, mask=valid, sem="relaxed")
    tl.debug_barrier()


@triton.jit
def starts_of(places, number, BLOCK: tl.constexpr):
    """The sizes of so many buckets become their first places: a running sum. Ends with a barrier.

    Returns the largest size. Those below 0, of values that are all alike, do not count for it.
    """
    before = tl.full((), 0, tl.int32)
    largest = tl.zeros([BLOCK], tl.int32)
    for first in range(0, number, BLOCK):
        b = first + tl.arange(0, BLOCK)
        size = tl.load(places + b, mask=b < number, other=0, cache_modifier=".cg")
        largest = tl.maximum(largest, size)
        size = tl.abs(size)
        tl.store(places + b, before + tl.cumsum(size, axis=0) - size, mask=b < number)
        before += tl.sum(size, axis=0)
    tl.store(places + number, before)
    tl.debug_barrier()
    return tl.max(largest, axis=0)


@triton.jit
def raise_to(ptr, value, mask):
    """An atomic maximum. Few values change it, and only these wait in line."""
    seen = tl.load(ptr, mask=mask, other=MOST, cache_modifier=".cg")
    tl.atomic_max(ptr, value, mask=mask & (value > seen), sem="relaxed")


@triton.jit
def look_at_crowds(row, buckets, BLOCK: tl.constexpr):
    """A crowd's largest key, the complement of its least, and its size, to its first three places.

    A bucket's number is its first place from then on. Ends with a barrier.
    """
    for first in range(0, row.count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        valid = counted(j, row)
        key = key_of(tl.load(row.x + j, mask=valid, other=0.0))
        bucket = tl.load(buckets.bucket + j, mask=valid, other=0)
        bucket = tl.maximum(bucket, ~bucket)
        start = tl.load(buckets.places + bucket, mask=valid, other=0, cache_modifier=".cg")
        end = tl.load(buckets.places + bucket + 1, mask=valid, other=0, cache_modifier=".cg")
        crowded = end - start > CROWD
        known = buckets.ordered + start
        raise_to(known, key, crowded)
        raise_to(known + 1, ~key, crowded)
        tl.store(known + 2, end - start, mask=crowded)
        tl.store(buckets.bucket + j, start, mask=valid)
    tl.debug_barrier()


@triton.jit
def split_crowds(row, buckets, BLOCK: tl.constexpr):
    """A crowd's values to as many buckets as they are, by their keys, unless they are all alike.

    These are counted anew: bucket b has no place before b. Ends with a barrier.
    """
    for first in range(0, row.count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        valid = counted(j, row)
        key = key_of(tl.load(row.x + j, mask=valid, other=0.0))
        start = tl.load(buckets.bucket + j, mask=valid, other=0)
        known = buckets.ordered + start
        high = tl.load(known, mask=valid, other=LEAST, cache_modifier=".cg")  # LEAST: no crowd
        low = ~tl.load(known + 1, mask=valid, other=LEAST, cache_modifier=".cg")
        size = tl.load(known + 2, mask=valid, other=0, cache_modifier=".cg")
        alike, apart = high == low, high > low
        # One factor for the whole crowd: products with it are in the order of the keys.
        factor = (size - 1).to(tl.float32) / unsigned(tl.where(apart, high - low, 1))
        step = (unsigned(tl.where(apart, key - low, 0)) * factor).to(tl.int32)
        bucket = start + tl.where(apart, tl.minimum(step, size - 1), 0)
        tl.store(buckets.bucket + j, tl.where(alike, ~start, bucket), mask=valid)
        tl.store(buckets.places + start, -size, mask=alike)
        tl.atomic_add(buckets.places + bucket, 1, mask=valid & (high != low), sem="relaxed")
    tl.debug_barrier()


@triton.jit
def put_in_order(row, buckets, BLOCK: tl.constexpr):
    """Keys to the places of their buckets, but where all are alike; ends with a barrier."""
    for first in range(0, row.count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        valid = counted(j, row)
        key = key_of(tl.load(row.x + j, mask=valid, other=0.0))
        bucket = tl.load(buckets.bucket + j, mask=valid, other=-1)
        alone = bucket >= 0
        place = tl.atomic_add(buckets.places + bucket, 1, mask=alone, sem="relaxed")
        tl.store(buckets.ordered + place, key, mask=alone)
    tl.debug_barrier()


@triton.jit
def rank_in_buckets(row, rank_ptr, number, buckets, largest, options):
    """Ranks of values in order: a bucket's first place, and what compares below in the bucket."""
    for first in range(0, row.count, options.BLOCK):
        j = first + tl.arange(0, options.BLOCK)
        valid = counted(j, row)
        key = key_of(tl.load(row.x + j, mask=valid, other=0.0))
        bucket = tl.load(buckets.bucket + j, mask=valid, other=0)
        alike = bucket < 0
        bucket = tl.maximum(bucket, ~bucket)
        # Where all are alike none has been put in order.
        past = buckets.places + bucket + alike.to(tl.int32)
        start = tl.load(buckets.places + bucket - 1, mask=valid, other=0, cache_modifier=".cg")
        end = tl.load(past, mask=valid, other=0, cache_modifier=".cg")
        below = start
        equal = tl.where(alike, end - start, 0)
        end = tl.where(alike, start, end)
        for i in range(0, largest, options.PAIRS):
            for k in tl.static_range(options.PAIRS):
                at = start + i + k
                other = tl.load(buckets.ordered + at, mask=at < end, other=MOST)
                below += (other < key).to(tl.int32)
                equal += (other == key).to(tl.int32)
        rank = present(mid_rank(below, equal, number), valid, row)
        tl.store(rank_ptr + j, rank, mask=j < row.count)


@triton.jit
def rank_by_buckets(row, rank_ptr, number, buckets, low, factors, options):
    """Ranks of a row of any length, without NaN."""
    BLOCK: tl.constexpr = options.BLOCK
    WIDE: tl.constexpr = RUN * BLOCK
    tl.store(buckets.places - 1, 0)
    fill(buckets.places, buckets.number, 0, WIDE)
    count_in_buckets(row, buckets, low, factors, BLOCK)
    largest = starts_of(buckets.places, buckets.number, WIDE)
    while largest > CROWD:
        fill(buckets.ordered, number + 2, LEAST, WIDE)
        look_at_crowds(row, buckets, BLOCK)
        fill(buckets.places, number, 0, WIDE)
        split_crowds(row, buckets, BLOCK)
        largest = starts_of(buckets.places, number, WIDE)
    put_in_order(row, buckets, BLOCK)
    rank_in_buckets(row, rank_ptr, number, buckets, largest, options)


@triton.jit
def extent_beside_infinities(row, BLOCK: tl.constexpr):
    """The `Extent` of the values that are not infinite."""
    tally = empty_tally(BLOCK)
    for first in range(0, row.count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        valid = counted(j, row)
        x = tl.load(row.x + j, mask=valid, other=0.0)
        tally = tallied(tally, x, valid & (tl.abs(x) != float("inf")))
    return extent_of(tally)


@triton.jit
def store_alike(row, rank_ptr, undefined, options):
    """Ranks of values that do not differ, or of an undefined row."""
    value = tl.where(undefined, float("nan"), 0.5)
    for first in range(0, row.count, options.BLOCK):
        j = first + tl.arange(0, options.BLOCK)
        # `coherence_row` knows a teacher's undefined row by any of its ranks.
        written = counted(j, row) | (undefined & options.FINITE)
        rank = present(tl.zeros([options.BLOCK], tl.float32) + value, written, row)
        tl.store(rank_ptr + j, rank, mask=j < row.count)


@triton.jit
def hard_rank_row(i, row, gram, rank_ptr, buckets, options):
    """Ranks of the row of anchor i; 0 where nothing counts."""
    BLOCK: tl.constexpr = options.BLOCK
    PRODUCTS: tl.constexpr = gram.DISSIMILARITY != GIVEN
    extent = row_extent(row, gram, i, offset_of(gram, i), PRODUCTS, BLOCK)
    number = extent.number
    if not options.FINITE:  # noqa: SIM102 - a constant: no code at all
        if finite(extent.total) == 0:
            extent = extent_beside_infinities(row, BLOCK)
    undefined = finite(extent.total) == 0
    alike = (extent.number == number) & (extent.high <= extent.low)
    if undefined | alike | (number < 2):
        store_alike(row, rank_ptr, undefined, options)
    elif options.SHORT:
        rank_all_pairs(row, rank_ptr, number, BLOCK, options.PAIRS)
    else:
        apart = extent.high > extent.low  # or there are infinities, and at most one finite value
        span = tl.where(apart, extent.high.to(tl.float64) - extent.low, 1.0)
        per_unit = tl.cast(buckets.number - 1, tl.float64) / span
        factors = factors_of(per_unit, extent.low, extent.high)
        low = tl.where(extent.low <= extent.high, extent.low, 0.0) * factors.half
        rank_by_buckets(row, rank_ptr, number, buckets, low, factors, options)


@triton.jit(**SPECIALIZATION)
def hard_rank_kernel(
    values_ptr,
    anchors_ptr,
    references_ptr,
    anchor_sq_ptr,
    reference_sq_ptr,
    offsets_ptr,
    twins_ptr,
    unit_ptr,
    width,
    keep_ptr,
    self_start,
    rank_ptr,
    ints_ptr,
    count,
    room,
    rows,
    DISSIMILARITY: tl.constexpr,
    FINITE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Ranks [rows, count], perhaps in the values' place; a row with a NaN is NaN where a value counts.

    FINITE: so is one with an infinity, and throughout. A Gram row becomes squared distances first, in
    place.
    """
    program = tl.cast(tl.program_id(0), tl.int64)
    bucket_ptr = ints_ptr + program * ARRAYS * room
    places_ptr = bucket_ptr + 2 * room + 16
    number = tl.minimum(count, MOST_BUCKETS)
    buckets = Buckets(places_ptr, bucket_ptr, bucket_ptr + room, number)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(i, tl.int64) * count
        own = tl.where(self_start >= 0, self_start + i, -1)
        hard_rank_row(
            i,
            Row(values_ptr + start, count, own, keep_ptr + start, HAS_KEEP),
            Gram(
                anchors_ptr,
                references_ptr,
                anchor_sq_ptr,
                reference_sq_ptr,
                offsets_ptr,
                twins_ptr,
                width,
                DISSIMILARITY,
            ),
            rank_ptr + start,
            buckets,
            Options(FINITE, SHORT, BLOCK, PAIRS),
        )
        tl.debug_barrier()
