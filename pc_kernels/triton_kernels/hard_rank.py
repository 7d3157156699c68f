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


class Buckets(NamedTuple):
    """A program's scratch memory for the counting sort: pointers, and the number of buckets."""

    sizes: tl.tensor
    starts: tl.tensor
    """Behind each bucket's place, where the next value goes: at last, where the next bucket starts."""
    ordered: tl.tensor
    """The values, bucket by bucket."""
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
def starts_of(buckets, BLOCK: tl.constexpr):
    """Where each bucket starts: the sizes' running sum. Returns the largest size."""
    before = tl.full((), 0, tl.int32)
    largest = tl.zeros([BLOCK], tl.int32)
    tl.store(buckets.starts, 0)
    for first in range(0, buckets.number, BLOCK):
        b = first + tl.arange(0, BLOCK)
        inside = b < buckets.number
        size = tl.load(buckets.sizes + b, mask=inside, other=0, cache_modifier=".cg")
        tl.store(buckets.starts + 1 + b, before + tl.cumsum(size, axis=0) - size, mask=inside)
        before += tl.sum(size, axis=0)
        largest = tl.maximum(largest, size)
    return tl.max(largest, axis=0)


@triton.jit
def rank_by_buckets(row, rank_ptr, number, buckets, low, factors, options):
    """Ranks of a row of any length, without NaN."""
    lane = tl.arange(0, options.BLOCK)
    for first in range(0, buckets.number, options.BLOCK):
        b = first + lane
        tl.store(buckets.sizes + b, tl.zeros([options.BLOCK], tl.int32), mask=b < buckets.number)
    tl.debug_barrier()
    for first in range(0, row.count, options.BLOCK):
        j = first + lane
        valid = counted(j, row)
        x = tl.load(row.x + j, mask=valid, other=0.0)
        bucket = bucket_of(x, low, factors, buckets.number)
        tl.atomic_add(buckets.sizes + bucket, 1, mask=valid, sem="relaxed")
    tl.debug_barrier()
    largest = starts_of(buckets, 4 * options.BLOCK)
    tl.debug_barrier()
    for first in range(0, row.count, options.BLOCK):
        j = first + lane
        valid = counted(j, row)
        x = tl.load(row.x + j, mask=valid, other=0.0)
        bucket = bucket_of(x, low, factors, buckets.number)
        place = tl.atomic_add(buckets.starts + 1 + bucket, 1, mask=valid, sem="relaxed")
        tl.store(buckets.ordered + place, x, mask=valid)
    tl.debug_barrier()
    for first in range(0, row.count, options.BLOCK):
        j = first + lane
        valid = counted(j, row)
        x = tl.load(row.x + j, mask=valid, other=0.0)
        bucket = bucket_of(x, low, factors, buckets.number)
        start = tl.load(buckets.starts + bucket, mask=valid, other=0, cache_modifier=".cg")
        below = start
        equal = tl.zeros([options.BLOCK], tl.int32)
        for i in range(0, largest, options.PAIRS):
            for k in tl.static_range(options.PAIRS):
                # Behind the bucket lie greater values, and then none.
                at = start + i + k
                other = tl.load(buckets.ordered + at, mask=at < number, other=float("nan"))
                below += (other < x).to(tl.int32)
                equal += (other == x).to(tl.int32)
        rank = present(mid_rank(below, equal, number), valid, row)
        tl.store(rank_ptr + j, rank, mask=j < row.count)


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
    width,
    keep_ptr,
    self_start,
    rank_ptr,
    ints_ptr,
    rows_ptr,
    count,
    buckets,
    ints_stride,
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
    sizes_ptr = ints_ptr + program * ints_stride
    memory = Buckets(sizes_ptr, sizes_ptr + buckets, rows_ptr + program * count, buckets)
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
                width,
                DISSIMILARITY,
            ),
            rank_ptr + start,
            memory,
            Options(FINITE, SHORT, BLOCK, PAIRS),
        )
        tl.debug_barrier()
