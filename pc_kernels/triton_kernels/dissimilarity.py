"""Stage `dissimilarity`: a Gram row becomes squared distances, then the metric's dissimilarities.

The same formulas as csrc/cpu/dissimilarity.h; docs/method.md, "Distances".
"""

import triton
import triton.language as tl

GIVEN = tl.constexpr(0)
EUCLIDEAN = tl.constexpr(1)
SQEUCLIDEAN = tl.constexpr(2)
COSINE = tl.constexpr(3)

NEAR = tl.constexpr(1 / 64)
"""Squared distances below this share of |a|² + |b|² are summed again from the differences."""

FEATURES = tl.constexpr(4)
"""Features of a pair summed side by side there; more would cost registers everywhere else."""


@triton.jit
def squared_distances(anchor_ptr, references_ptr, width, j, wanted, BLOCK: tl.constexpr):
    """|a − b_j|² from the differences, where wanted; elsewhere nothing is read."""
    lane = tl.arange(0, FEATURES)
    reference = references_ptr + tl.cast(j, tl.int64)[:, None] * width
    total = tl.zeros([BLOCK, FEATURES], tl.float32)
    for first in range(0, width, FEATURES):
        k = first + lane
        a = tl.load(anchor_ptr + k, mask=k < width, other=0.0)[None, :]
        inside = wanted[:, None] & (k < width)[None, :]
        b = tl.load(reference + k[None, :], mask=inside, other=0.0)
        total += tl.where(inside, (a - b) * (a - b), 0.0)
    return tl.sum(total, axis=1)


@triton.jit
def squares_of(gram, anchor_sq, reference_sq, offset):
    """Of inner products: |a − b|², of a far anchor less |a|², and whether it is near.

    Far is so far out that |a|² would cost the digits in which the references differ.
    """
    scale = anchor_sq + reference_sq
    squared = scale - 2.0 * gram
    near = squared < scale * NEAR
    return tl.where(offset > 0.0, reference_sq - 2.0 * gram, squared), near


@triton.jit
def metric_of(squared, anchor_sq, offset, METRIC: tl.constexpr):
    """δ, less the row's offset: √(x+y) − √x = y/(√(x+y) + √x)."""
    value = squared
    if METRIC == EUCLIDEAN:
        far = offset > 0.0
        distance = tl.sqrt_rn(tl.maximum(tl.where(far, anchor_sq + squared, squared), 0.0))
        distance = tl.where(squared == squared, distance, squared)
        value = tl.where(far, squared / (distance + offset), distance)
    if METRIC == COSINE:
        value = squared * 0.5
    return value


@triton.jit
def dissimilarity_row(
    values_ptr,
    anchor_ptr,
    references_ptr,
    width,
    anchor_sq,
    reference_sq_ptr,
    offset,
    first,
    count,
    own,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of a Gram row in place: δ less the row's offset. The anchor's own place gets garbage."""
    j = first + tl.arange(0, BLOCK)
    inside = j < count
    gram = tl.load(values_ptr + j, mask=inside, other=0.0)
    reference_sq = tl.load(reference_sq_ptr + j, mask=inside, other=0.0)
    squared, near = squares_of(gram, anchor_sq, reference_sq, offset)
    near = near & inside & (j != own)
    if tl.max(near.to(tl.int32), axis=0) > 0:
        short = squared_distances(anchor_ptr, references_ptr, width, j, near, BLOCK)
        squared = tl.where(near, tl.where(offset > 0.0, short - anchor_sq, short), squared)
    value = metric_of(squared, anchor_sq, offset, METRIC)
    tl.store(values_ptr + j, value, mask=inside)


@triton.jit
def dissimilarity_backward(d, grad, offset, METRIC: tl.constexpr):
    """∂L/∂δ to V, with ∂L/∂anchor = Σ_j V_j (anchor − reference_j); a distance of 0 has gradient 0."""
    if METRIC == EUCLIDEAN:
        distance = d + offset
        grad = tl.where(distance == 0.0, 0.0, grad / tl.where(distance == 0.0, 1.0, distance))
    if METRIC == SQEUCLIDEAN:
        grad = 2.0 * grad
    return grad


@triton.jit
def dissimilarity_kernel(
    values_ptr,
    anchors_ptr,
    references_ptr,
    anchor_sq_ptr,
    reference_sq_ptr,
    offsets_ptr,
    width,
    count,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The stage standing alone: a program is a block of a row."""
    row = tl.cast(tl.program_id(0), tl.int64)
    dissimilarity_row(
        values_ptr + row * count,
        anchors_ptr + row * width,
        references_ptr,
        width,
        tl.load(anchor_sq_ptr + row),
        reference_sq_ptr,
        tl.load(offsets_ptr + row),
        tl.program_id(1) * BLOCK,
        count,
        -1,
        METRIC,
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
    rows,
    count,
    width,
    METRIC: tl.constexpr,
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
    tl.store(place, metric_of(squared, anchor_sq, offset, METRIC), mask=inside)
