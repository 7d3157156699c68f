"""Stage `coherence_rows`: the student's half of an anchor's chain, dissimilarity -> rank -> loss -> V.

The teacher's half, `hard_rank_kernel`, has put its ranks in the place of its row.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .dissimilarity import GIVEN, Gram, offset_of, row_extent
from .formulas import value_and_slope
from .grid import clear, scratch
from .row import Row, counted, store_undefined
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
def coherence_row(i, row, gram, grid, loss, options, READY: tl.constexpr):
    """The loss of anchor i; WITH_GRAD, its row becomes V."""
    push_ptr = grid.spare
    slope_ptr = push_ptr + (row.count + 15) // 16 * 16
    offset = offset_of(gram, i)
    PRODUCTS: tl.constexpr = gram.DISSIMILARITY != GIVEN and not READY
    extent = row_extent(row, gram, i, offset, PRODUCTS, options.BLOCK)
    any_target = tl.load(loss.target)  # undefined ranks are so throughout
    if extent.defined & extent.limited & (any_target == any_target):
        scale = row_scale(row, extent, grid, options)
        if scale.on_grid:
            clear(grid, scale.cells, options.BLOCK)
            spread_to_density(row, None, scale, grid, options)
        total = tl.zeros([options.BLOCK], tl.float64)
        others = tl.maximum(scale.number - 1, 1).to(tl.float32)
        for first in range(0, row.count, options.BLOCK):
            j = first + tl.arange(0, options.BLOCK)
            valid = counted(j, row)
            d = tl.load(row.x + j, mask=valid, other=0.0)
            target = tl.load(loss.target + j, mask=valid, other=0.0)
            sums, density = sums_at(row, d, valid, scale, grid, options)
            residual = tl.where(valid, (sums - 0.5) / others - target, 0.0)
            value, slope = value_and_slope(residual, loss.PENALTY)
            total += value.to(tl.float64)
            if loss.WITH_GRAD:
                tl.store(slope_ptr + j, slope, mask=j < row.count)
                tl.store(push_ptr + j, density, mask=valid)
        size = tl.maximum(scale.number, 1).to(tl.float64)
        mean = tl.sum(total, axis=0) / size
        tl.store(loss.losses + i, tl.where(scale.number > 1, mean, 0.0).to(tl.float32))
        if loss.WITH_GRAD:
            tl.debug_barrier()
            slopes = Slopes(slope_ptr, 1.0)
            if scale.on_grid:
                spread_to_density(row, slopes, scale, grid, options)
            pairs = tl.maximum(size * (size - 1.0), 1.0)
            factor = (tl.load(loss.weights + i).to(tl.float64) / pairs).to(tl.float32)
            out = Gradient(push_ptr, push_ptr, row.x, factor)
            rank_gradient(row, slopes, scale, grid, out, offset, gram.DISSIMILARITY, options)
    else:
        tl.store(loss.losses + i, float("nan"))
        if loss.WITH_GRAD:
            store_undefined(row.x, row, options.BLOCK)


@triton.jit(do_not_specialize=["self_start"])
def coherence_rows_kernel(
    values_ptr,
    anchors_ptr,
    references_ptr,
    anchor_sq_ptr,
    reference_sq_ptr,
    offsets_ptr,
    width,
    keep_ptr,
    self_start,
    target_ptr,
    weights_ptr,
    losses_ptr,
    tables_ptr,
    moments_ptr,
    floats_ptr,
    rows,
    count,
    capacity,
    floats_stride,
    temperature: tl.float64,
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
                width,
                DISSIMILARITY,
            ),
            grid,
            Loss(target_ptr + start, weights_ptr, losses_ptr, PENALTY, WITH_GRAD),
            Options(temperature, RELAXATION, SCALE_STD, GRID, BLOCK, PAIRS),
            READY,
        )
        tl.debug_barrier()
