"""Stage `coherence_rows`: the student's half of an anchor's chain, dissimilarity -> rank -> loss -> V.

The teacher's half, `hard_rank_kernel`, has put its ranks in the place of its row.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .dissimilarity import EUCLIDEAN, GIVEN, Gram, offset_of, row_extent
from .formulas import value_and_slope
from .grid import clear, scratch
from .row import SPECIALIZATION, Row, counted, finite, store_undefined
from .row_sums import (
    Gradient,
    Options,
    Slopes,
    rank_gradient,
    row_scale,
    spread_to_density,
    sums_at,
)


class Loss(NamedTuple):
    """Pointers to the teacher's ranks of a row, and to the weights and losses of all; the penalty."""

    target: tl.tensor
    weights: tl.tensor
    losses: tl.tensor
    PENALTY: tl.constexpr
    WITH_GRAD: tl.constexpr


@triton.jit
def row_loss(row, loss, push_ptr, slope_ptr, scale, grid, options, ON_GRID: tl.constexpr):
    """Σ_j ℓ of a row, by one of the two ways; WITH_GRAD also its slopes and densities."""
    total = tl.zeros([options.BLOCK], tl.float64)
    inverse_others = 1.0 / tl.maximum(scale.number - 1, 1).to(tl.float32)
    for first in range(0, row.count, options.BLOCK):
        j = first + tl.arange(0, options.BLOCK)
        valid = counted(j, row)
        d = tl.load(row.x + j, mask=valid, other=0.0)
        target = tl.load(loss.target + j, mask=valid, other=0.0)
        sums, density = sums_at(row, d, valid, scale, grid, options, ON_GRID)
        residual = tl.where(valid, (sums - 0.5) * inverse_others - target, 0.0)
        value, slope = value_and_slope(residual, loss.PENALTY)
        total += value.to(tl.float64)
        if loss.WITH_GRAD:
            tl.store(slope_ptr + j, slope, mask=j < row.count)
            tl.store(push_ptr + j, density, mask=valid)
    return tl.sum(total, axis=0)


@triton.jit
def coherence_row(i, row, gram, grid, loss, push_ptr, options, READY: tl.constexpr):
    """The loss of anchor i; WITH_GRAD, its row becomes V."""
    slope_ptr = push_ptr + row.count
    offset = offset_of(gram, i)
    PRODUCTS: tl.constexpr = gram.DISSIMILARITY != GIVEN and not READY
    extent = row_extent(row, gram, i, offset, PRODUCTS, options.BLOCK)
    any_target = tl.load(loss.target)  # undefined ranks are so throughout
    if finite(extent.total) & (any_target == any_target):
        scale = row_scale(row, extent, grid, options)
        if scale.on_grid:
            clear(grid, scale.cells, options.BLOCK)
            spread_to_density(row, None, scale, grid, options)
            total = row_loss(row, loss, push_ptr, slope_ptr, scale, grid, options, True)
        else:
            total = row_loss(row, loss, push_ptr, slope_ptr, scale, grid, options, False)
        mean = tl.where(scale.number > 1, total * scale.share, 0.0)
        tl.store(loss.losses + i, mean.to(tl.float32))
        if loss.WITH_GRAD:
            tl.debug_barrier()
            weight = tl.load(loss.weights + i).to(tl.float64) * scale.share
            factor = (weight / tl.maximum(scale.number - 1, 1).to(tl.float64)).to(tl.float32)
            slopes = Slopes(slope_ptr, 1.0)
            out = Gradient(push_ptr, push_ptr, row.x, factor)
            rank_gradient(row, slopes, scale, grid, out, gram, i, options)
    else:
        tl.store(loss.losses + i, float("nan"))
        if loss.WITH_GRAD:
            store_undefined(row.x, row, options.BLOCK)


@triton.jit
def in_units(temperature, unit_ptr, DISSIMILARITY: tl.constexpr, SCALE_STD: tl.constexpr):
    """The temperature for dissimilarities of features in a unit, which grow with a power of it."""
    if not SCALE_STD and DISSIMILARITY != GIVEN:
        unit = tl.load(unit_ptr).to(tl.float64)
        temperature = temperature / unit
        if DISSIMILARITY != EUCLIDEAN:
            temperature = temperature / unit
    return temperature


@triton.jit(**SPECIALIZATION)
def coherence_rows_kernel(
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
    target_ptr,
    weights_ptr,
    losses_ptr,
    tables_ptr,
    moments_ptr,
    floats_ptr,
    rows_ptr,
    count,
    capacity,
    floats_stride,
    temperature: tl.float64,
    rows,
    DISSIMILARITY: tl.constexpr,
    READY: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    PENALTY: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    RELAXATION: tl.constexpr,
    SCALE_STD: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Losses [rows]; WITH_GRAD, values become V. READY: they hold δ already, not inner products."""
    grid = scratch(tables_ptr, moments_ptr, floats_ptr, floats_stride, capacity)
    push_ptr = rows_ptr + tl.cast(tl.program_id(0), tl.int64) * 2 * count
    temperature = in_units(temperature, unit_ptr, DISSIMILARITY, SCALE_STD)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(i, tl.int64) * count
        own = tl.where(self_start >= 0, self_start + i, -1)
        coherence_row(
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
            grid,
            Loss(target_ptr + start, weights_ptr, losses_ptr, PENALTY, WITH_GRAD),
            push_ptr,
            Options(temperature, RELAXATION, SCALE_STD, GRID, BLOCK, PAIRS),
            READY,
        )
        tl.debug_barrier()
