"""Stage `dissimilarity`: a Gram row becomes squared distances, then dissimilarities of a kind.

The same formulas as csrc/cpu/dissimilarity.h; docs/method.md, "Distances".
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .row import Row, counted, empty_tally, extent_of, tallied

CODES = {"given": 0, "euclidean": 1, "sqeuclidean": 2, "cosine": 3}
"""What the kernels call a dissimilarity."""

GIVEN = tl.constexpr(CODES["given"])
EUCLIDEAN = tl.constexpr(CODES["euclidean"])
SQEUCLIDEAN = tl.constexpr(CODES["sqeuclidean"])
COSINE = tl.constexpr(CODES["cosine"])

NEAR = tl.constexpr(1 / 64)
"""Squared distances below this share of |a|² + |b|² are summed again from the differences."""

BESIDE = tl.constexpr(1 / 4)
"""Distances of a far anchor below this share of its offset have lost more than 2 bits to it."""

FEATURES = tl.constexpr(4)
"""Features of a pair summed side by side there; more would cost registers everywhere else."""


class Gram(NamedTuple):
    """What makes dissimilarities of inner products: pointers to features, to their norms and more."""

    anchors: tl.tensor
    references: tl.tensor
    anchor_sq: tl.tensor
    reference_sq: tl.tensor
    offsets: tl.tensor
    twins: tl.tensor
    width: tl.tensor
    """Features."""
    DISSIMILARITY: tl.constexpr


@triton.jit
def offset_of(gram, i):
    """The offset of anchor i's row; given dissimilarities have none."""
    if gram.DISSIMILARITY == GIVEN:
        return 0.0
    else:
        return tl.load(gram.offsets + i)


@triton.jit
def squared_distances(gram, i, j, wanted, BLOCK: tl.constexpr):
    """|a_i − b_j|² from the differences, where wanted; elsewhere nothing is read."""
    lane = tl.arange(0, FEATURES)
    anchor = gram.anchors + tl.cast(i, tl.int64) * gram.width
    reference = gram.references + tl.cast(j, tl.int64)[:, None] * gram.width
    total = tl.zeros([BLOCK, FEATURES], tl.float32)
    for first in range(0, gram.width, FEATURES):
        k = first + lane
        a = tl.load(anchor + k, mask=k < gram.width, other=0.0)[None, :]
        inside = wanted[:, None] & (k < gram.width)[None, :]
        b = tl.load(reference + k[None, :], mask=inside, other=0.0)
        total += tl.where(inside, (a - b) * (a - b), 0.0)
    return tl.sum(total, axis=1)


@triton.jit
def squares_of(gram, anchor_sq, reference_sq, offset):
    """Of inner products: |a − b|², of a far anchor less |a|², and whether it is near.

    An anchor is far if |a|² would cost the digits in which its references differ.
    """
    scale = anchor_sq + reference_sq
    squared = scale - 2.0 * gram
    near = squared < scale * NEAR
    return tl.where(offset > 0.0, reference_sq - 2.0 * gram, squared), near


@triton.jit
def dissimilarity_of(squared, anchor_sq, offset, DISSIMILARITY: tl.constexpr):
    """δ, less the row's offset: √(x+y) − √x = y/(√(x+y) + √x)."""
    if DISSIMILARITY == EUCLIDEAN:
        far = offset > 0.0
        square = tl.where(far, anchor_sq + squared, squared)
        distance = tl.sqrt(tl.maximum(square, 0.0, propagate_nan=tl.PropagateNan.ALL))
        value = tl.where(far, squared / (distance + offset), distance)
    elif DISSIMILARITY == SQEUCLIDEAN:
        value = squared
    elif DISSIMILARITY == COSINE:
        value = squared * 0.5
    else:
        tl.static_assert(False, "an unknown dissimilarity")
    return value


@triton.jit
def near_dissimilarities(gram, i, j, near, offset, BLOCK: tl.constexpr):
    """δ of near pairs less the row's offset, from the differences of their features."""
    anchor_sq = tl.load(gram.anchor_sq + i)
    short = squared_distances(gram, i, j, near, BLOCK)
    squared = tl.where(offset > 0.0, short - anchor_sq, short)
    return dissimilarity_of(squared, anchor_sq, offset, gram.DISSIMILARITY)


@triton.jit
def dissimilarity_block(row, gram, anchor_sq, offset, first, BLOCK: tl.constexpr):
    """δ of a block of a Gram row, less the row's offset, and which pairs are near and wait for theirs."""
    j = first + tl.arange(0, BLOCK)
    inside = j < row.count
    products = tl.load(row.x + j, mask=inside, other=0.0)
    reference_sq = tl.load(gram.reference_sq + j, mask=inside, other=0.0)
    squared, near = squares_of(products, anchor_sq, reference_sq, offset)
    value = dissimilarity_of(squared, anchor_sq, offset, gram.DISSIMILARITY)
    return value, near & counted(j, row)


@triton.jit
def measure_near(tally, row, gram, i, offset, BLOCK: tl.constexpr):
    """δ less the offset where -inf marks a near pair; returns the `Tally` with them."""
    for first in range(0, row.count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        valid = counted(j, row)
        near = tl.load(row.x + j, mask=valid, other=0.0) == float("-inf")
        if tl.max(near.to(tl.int32), axis=0) > 0:
            x = near_dissimilarities(gram, i, j, near, offset, BLOCK)
            tl.store(row.x + j, x, mask=near)
            tally = tallied(tally, x, near)
    return tally


@triton.jit
def measured(row, gram, i, offset, BLOCK: tl.constexpr):
    """δ of anchor i's row less the offset, -inf for near pairs: the others' `Tally`, and the marks."""
    tally = empty_tally(BLOCK)
    marked = tl.zeros([BLOCK], tl.int32)
    anchor_sq = tl.load(gram.anchor_sq + i)
    for first in range(0, row.count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        x, near = dissimilarity_block(row, gram, anchor_sq, offset, first, BLOCK)
        tl.store(row.x + j, tl.where(near, float("-inf"), x), mask=j < row.count)
        marked |= near.to(tl.int32)
        tally = tallied(tally, x, counted(j, row) & (near == 0))
    return tally, marked


@triton.jit
def tie(row, gram, BLOCK: tl.constexpr):
    """Products of references that are equal bit for bit become equal: they take the first one's."""
    if tl.load(gram.twins + row.count) > 0:
        for first in range(0, row.count, BLOCK):
            j = first + tl.arange(0, BLOCK)
            twin = tl.load(gram.twins + j, mask=j < row.count, other=0)
            later = (j < row.count) & (twin != j)
            tl.store(row.x + j, tl.load(row.x + twin, mask=later, other=0.0), mask=later)
        tl.debug_barrier()


@triton.jit
def row_extent(row, gram, i, offset, PRODUCTS: tl.constexpr, BLOCK: tl.constexpr):
    """The `Extent` of anchor i's row. Where it holds PRODUCTS, they become δ less the offset first.

    What does not count gets garbage. Near pairs are rare: an infinity marks their places, and only if
    there are any does a second pass follow. Ends with a barrier.
    """
    if PRODUCTS:
        tie(row, gram, BLOCK)
        if offset > 0.0:
            tally, marked = measured(row, gram, i, offset, BLOCK)
        else:
            tally, marked = measured(row, gram, i, 0.0, BLOCK)
        if tl.max(marked, axis=0) > 0:
            tally = measure_near(tally, row, gram, i, offset, BLOCK)
        tl.debug_barrier()
    else:
        tally = empty_tally(BLOCK)
        for first in range(0, row.count, BLOCK):
            j = first + tl.arange(0, BLOCK)
            valid = counted(j, row)
            tally = tallied(tally, tl.load(row.x + j, mask=valid, other=0.0), valid)
    return extent_of(tally)


@triton.jit
def far_distances(gram, i, j, d, wanted, BLOCK: tl.constexpr):
    """|a_i − b_j| of a far anchor, from δ less the offset; beside it, where wanted, from differences."""
    offset = offset_of(gram, i)
    distance = d + offset
    beside = wanted & (distance < offset * BESIDE)
    if tl.max(beside.to(tl.int32), axis=0) > 0:
        true = tl.sqrt(squared_distances(gram, i, j, beside, BLOCK))
        distance = tl.where(beside, true, distance)
    return distance


@triton.jit
def dissimilarity_backward(gram, i, j, d, grad, wanted, FAR: tl.constexpr, BLOCK: tl.constexpr):
    """∂L/∂δ to V, with ∂L/∂anchor = Σ_j V_j (anchor − reference_j); a distance of 0 has gradient 0.

    `gram` is None for values that are no row of a Gram matrix; FAR: δ are less a far anchor's offset.
    """
    if gram is not None:
        if gram.DISSIMILARITY == EUCLIDEAN:
            distance = far_distances(gram, i, j, d, wanted, BLOCK) if FAR else d
            grad = tl.where(distance == 0.0, 0.0, grad / tl.where(distance == 0.0, 1.0, distance))
        if gram.DISSIMILARITY == SQEUCLIDEAN:
            grad = 2.0 * grad
    return grad


@triton.jit
def dissimilarity_row(row, gram, i, BLOCK: tl.constexpr):
    """A Gram row becomes δ less the row's offset, in place."""
    offset = offset_of(gram, i)
    anchor_sq = tl.load(gram.anchor_sq + i)
    tie(row, gram, BLOCK)
    for first in range(0, row.count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        value, near = dissimilarity_block(row, gram, anchor_sq, offset, first, BLOCK)
        if tl.max(near.to(tl.int32), axis=0) > 0:
            value = tl.where(near, near_dissimilarities(gram, i, j, near, offset, BLOCK), value)
        tl.store(row.x + j, value, mask=j < row.count)


@triton.jit
def dissimilarity_kernel(
    values_ptr,
    anchors_ptr,
    references_ptr,
    anchor_sq_ptr,
    reference_sq_ptr,
    offsets_ptr,
    twins_ptr,
    unit_ptr,
    width,
    count,
    DISSIMILARITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The stage standing alone: a program is a row."""
    i = tl.program_id(0)
    values = values_ptr + tl.cast(i, tl.int64) * count
    dissimilarity_row(
        Row(values, count, -1, values, False),
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
        i,
        BLOCK,
    )


@triton.jit
def straight_dissimilarity_kernel(
    values_ptr,
    anchors_ptr,
    references_ptr,
    anchor_sq_ptr,
    reference_sq_ptr,
    offsets_ptr,
    twins_ptr,
    unit_ptr,
    width,
    rows,
    count,
    DISSIMILARITY: tl.constexpr,
    WIDTH: tl.constexpr,
    ANCHORS: tl.constexpr,
    REFERENCES: tl.constexpr,
):
    """The stage from the features on, without a Gram matrix: a program is a tile of ANCHORS × REFERENCES.

    Features are `width` ≤ WIDTH. Every place gets its δ, the anchors' own too.
    """
    i = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    j = tl.program_id(1) * REFERENCES + tl.arange(0, REFERENCES)
    k = tl.arange(0, WIDTH)
    anchor = anchors_ptr + tl.cast(i, tl.int64)[:, None] * width
    reference = references_ptr + tl.cast(j, tl.int64)[:, None] * width
    inside_k = (k < width)[None, :]
    a = tl.load(anchor + k[None, :], mask=(i < rows)[:, None] & inside_k, other=0.0)
    b = tl.load(reference + k[None, :], mask=(j < count)[:, None] & inside_k, other=0.0)
    gram = tl.dot(a, tl.trans(b), input_precision="ieee")
    anchor_sq = tl.load(anchor_sq_ptr + i, mask=i < rows, other=0.0)[:, None]
    reference_sq = tl.load(reference_sq_ptr + j, mask=j < count, other=0.0)[None, :]
    offset = tl.load(offsets_ptr + i, mask=i < rows, other=0.0)[:, None]
    inside = (i < rows)[:, None] & (j < count)[None, :]
    squared, near = squares_of(gram, anchor_sq, reference_sq, offset)
    near = near & inside
    if tl.max(tl.max(near.to(tl.int32), axis=1), axis=0) > 0:
        short = tl.zeros([ANCHORS, REFERENCES], tl.float32)
        for feature in range(width):
            a_k = tl.load(anchor + feature, mask=(i < rows)[:, None], other=0.0)
            b_k = tl.load(tl.trans(reference) + feature, mask=(j < count)[None, :], other=0.0)
            short += (a_k - b_k) * (a_k - b_k)
        squared = tl.where(near, tl.where(offset > 0.0, short - anchor_sq, short), squared)
    place = values_ptr + tl.cast(i, tl.int64)[:, None] * count + j[None, :]
    tl.store(place, dissimilarity_of(squared, anchor_sq, offset, DISSIMILARITY), mask=inside)
