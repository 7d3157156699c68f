"""Stage `hard_rank`: mid-ranks in [0, 1] of rows; for a teacher, from its Gram row on.

A monotone map drops the values into at least one bucket a point, and a counting sort brings together
what shares a bucket; a value's rank is its bucket's place plus how many of the bucket compare below.
Atomics hand out the places in a bucket in any order, but ranks do not depend on it. Short rows compare
all pairs instead. Memory between threads as in grid.py.
"""

import triton
import triton.language as tl

from .dissimilarity import GIVEN, dissimilarity_row
from .formulas import counted, finite


@triton.jit
def mid_rank(below, equal, number):
    """From how many compare below, and equal (itself among them); exactly 0 and 1 at the ends."""
    whole = 2 * tl.maximum(number - 1, 1)
    rank = tl.div_rn((2 * below + equal - 1).to(tl.float32), whole.to(tl.float32))
    return tl.where(number > 1, rank, 0.5)


@triton.jit
def value_range(x_ptr, count, own, keep_ptr, HAS_KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """Of the values that count: how many, how many NaN and infinite, and the finite ones' range."""
    number = tl.full((), 0, tl.int32)
    nans = tl.full((), 0, tl.int32)
    infinities = tl.full((), 0, tl.int32)
    low = tl.full((), float("inf"), tl.float32)
    high = tl.full((), float("-inf"), tl.float32)
    for first in range(0, count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        valid = counted(j, count, own, keep_ptr, HAS_KEEP)
        x = tl.load(x_ptr + j, mask=valid, other=0.0)
        fit = valid & finite(x)
        number += tl.sum(valid.to(tl.int32), axis=0)
        nans += tl.sum((x != x).to(tl.int32), axis=0)
        infinities += tl.sum((valid & (fit == 0)).to(tl.int32), axis=0)
        low = tl.minimum(low, tl.min(tl.where(fit, x, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(fit, x, float("-inf")), axis=0))
    return number, nans, infinities - nans, low, high


@triton.jit
def bucket_of(x, low, scale, buckets):
    """Monotone in x, infinities included."""
    t = (x.to(tl.float64) - low) * scale
    return tl.minimum(tl.maximum(t, 0.0), tl.cast(buckets - 1, tl.float64)).to(tl.int32)


@triton.jit
def rank_all_pairs(
    x_ptr,
    rank_ptr,
    count,
    own,
    keep_ptr,
    number,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Ranks of a row that is one block long."""
    j = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + j, mask=j < count, other=0.0)
    below = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, PAIRS):
        k = first + tl.arange(0, PAIRS)
        valid = counted(k, count, own, keep_ptr, HAS_KEEP)
        other = tl.load(x_ptr + k, mask=valid, other=float("nan"))[None, :]  # compares false
        below += tl.sum((other < x[:, None]).to(tl.int32), axis=1)
        equal += tl.sum((other == x[:, None]).to(tl.int32), axis=1)
    tl.debug_barrier()  # ranks may take the values' place
    tl.store(rank_ptr + j, mid_rank(below, equal, number), mask=j < count)


@triton.jit
def rank_by_buckets(
    x_ptr,
    rank_ptr,
    counts_ptr,
    starts_ptr,
    places_ptr,
    sorted_ptr,
    count,
    own,
    keep_ptr,
    number,
    low,
    scale,
    buckets,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ranks of a row of any length, without NaN."""
    lane = tl.arange(0, BLOCK)
    for first in range(0, buckets, BLOCK):
        tl.store(
            counts_ptr + first + lane, tl.zeros([BLOCK], tl.int32), mask=first + lane < buckets
        )
    tl.debug_barrier()
    for first in range(0, count, BLOCK):
        j = first + lane
        valid = counted(j, count, own, keep_ptr, HAS_KEEP)
        x = tl.load(x_ptr + j, mask=valid, other=0.0)
        bucket = bucket_of(x, low, scale, buckets)
        place = tl.atomic_add(counts_ptr + bucket, 1, mask=valid, sem="relaxed")
        tl.store(places_ptr + j, place, mask=valid)
    tl.debug_barrier()
    before = tl.full((), 0, tl.int32)
    for first in range(0, buckets, BLOCK):
        b = first + lane
        size = tl.load(counts_ptr + b, mask=b < buckets, other=0, cache_modifier=".cg")
        tl.store(starts_ptr + b, before + tl.cumsum(size, axis=0) - size, mask=b < buckets)
        before += tl.sum(size, axis=0)
    tl.debug_barrier()
    for first in range(0, count, BLOCK):
        j = first + lane
        valid = counted(j, count, own, keep_ptr, HAS_KEEP)
        x = tl.load(x_ptr + j, mask=valid, other=0.0)
        start = tl.load(starts_ptr + bucket_of(x, low, scale, buckets), mask=valid, other=0)
        place = tl.load(places_ptr + j, mask=valid, other=0)
        tl.store(sorted_ptr + start + place, x, mask=valid)
    tl.debug_barrier()
    for first in range(0, count, BLOCK):
        j = first + lane
        valid = counted(j, count, own, keep_ptr, HAS_KEEP)
        x = tl.load(x_ptr + j, mask=valid, other=0.0)
        bucket = bucket_of(x, low, scale, buckets)
        start = tl.load(starts_ptr + bucket, mask=valid, other=0)
        size = tl.load(counts_ptr + bucket, mask=valid, other=0, cache_modifier=".cg")
        below = start
        equal = tl.zeros([BLOCK], tl.int32)
        for i in range(tl.max(size, axis=0)):
            inside = valid & (i < size)
            other = tl.load(sorted_ptr + start + i, mask=inside, other=float("nan"))
            below += (other < x).to(tl.int32)
            equal += (other == x).to(tl.int32)
        tl.store(rank_ptr + j, mid_rank(below, equal, number), mask=j < count)


@triton.jit(do_not_specialize=["self_start"])
def hard_rank_kernel(
    values_ptr,
    rank_ptr,
    anchors_ptr,
    references_ptr,
    anchor_sq_ptr,
    reference_sq_ptr,
    offsets_ptr,
    width,
    keep_ptr,
    ints_ptr,
    floats_ptr,
    rows,
    count,
    buckets,
    ints_stride,
    floats_stride,
    self_start,
    METRIC: tl.constexpr,
    FINITE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Ranks [rows, count], perhaps in the values' place; a row with a NaN is NaN throughout.

    FINITE: so is one with an infinity. A Gram row becomes squared distances first, in place.
    """
    program = tl.cast(tl.program_id(0), tl.int64)
    counts_ptr = ints_ptr + program * ints_stride
    starts_ptr = counts_ptr + buckets
    sorted_ptr = floats_ptr + program * floats_stride
    lane = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * count
        x_row, rank_row, keep_row = values_ptr + start, rank_ptr + start, keep_ptr + start
        own = tl.where(self_start >= 0, self_start + row, -1)
        if METRIC != GIVEN:
            for first in range(0, count, BLOCK):
                dissimilarity_row(
                    x_row,
                    anchors_ptr + tl.cast(row, tl.int64) * width,
                    references_ptr,
                    width,
                    tl.load(anchor_sq_ptr + row),
                    reference_sq_ptr,
                    tl.load(offsets_ptr + row),
                    first,
                    count,
                    own,
                    METRIC,
                    BLOCK,
                )
            tl.debug_barrier()
        number, nans, infinities, low, high = value_range(
            x_row, count, own, keep_row, HAS_KEEP, BLOCK
        )
        unranked = nans > 0
        if FINITE:
            unranked = (nans + infinities) > 0
        alike = (infinities == 0) & (high <= low)
        if unranked | alike | (number < 2):
            value = tl.where(unranked, float("nan"), 0.5)
            for first in range(0, count, BLOCK):
                j = first + lane
                tl.store(rank_row + j, tl.zeros([BLOCK], tl.float32) + value, mask=j < count)
        elif SHORT:
            rank_all_pairs(x_row, rank_row, count, own, keep_row, number, HAS_KEEP, BLOCK, PAIRS)
        else:
            apart = high > low  # or there are infinities, and at most one finite value
            extent = tl.where(apart, high.to(tl.float64) - low, 1.0)
            scale = tl.where(apart, tl.cast(buckets - 1, tl.float64) / extent, 1.0)
            rank_by_buckets(
                x_row,
                rank_row,
                counts_ptr,
                starts_ptr,
                starts_ptr + buckets,
                sorted_ptr,
                count,
                own,
                keep_row,
                number,
                tl.where(low <= high, low, 0.0),
                scale,
                buckets,
                HAS_KEEP,
                BLOCK,
            )
        tl.debug_barrier()
