"""Stage `coherence_rows`: the student's half of an anchor's chain, dissimilarity -> rank -> loss -> V.

The teacher's half, `hard_rank_kernel`, has put its ranks in the place of its row.
"""

import triton
import triton.language as tl

from .dissimilarity import GIVEN, dissimilarity_row
from .formulas import counted, penalty_slope, penalty_value
from .grid import TERMS, clear, density_function, place, scratch, spread
from .row_sums import (
    grid_cells,
    inverse_step,
    pair_scale,
    rank_gradient,
    row_range,
    row_scale,
    spread_to_density,
    sums_at,
)


@triton.jit(do_not_specialize=["self_start"])
def coherence_rows_kernel(
    values_ptr,
    anchors_ptr,
    references_ptr,
    anchor_sq_ptr,
    reference_sq_ptr,
    offsets_ptr,
    width,
    target_ptr,
    keep_ptr,
    weights_ptr,
    losses_ptr,
    tables_ptr,
    moments_ptr,
    floats_ptr,
    rows,
    count,
    capacity,
    floats_stride,
    self_start,
    temperature: tl.float64,
    METRIC: tl.constexpr,
    READY: tl.constexpr,
    RELAXATION: tl.constexpr,
    SCALE_STD: tl.constexpr,
    PENALTY: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Losses [rows]; WITH_GRAD, values become V. READY: they hold δ already, not inner products."""
    moments_ptr += tl.cast(tl.program_id(0), tl.int64) * capacity * TERMS
    mass_ptr, nodes_ptr, cubic_ptr, level_ptr, push_ptr = scratch(
        floats_ptr, floats_stride, capacity
    )
    slope_ptr = push_ptr + (count + 15) // 16 * 16
    lane = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * count
        d_row, target_row, keep_row = values_ptr + start, target_ptr + start, keep_ptr + start
        own = tl.where(self_start >= 0, self_start + row, -1)
        offset = tl.full((), 0.0, tl.float32)
        if METRIC != GIVEN:
            offset = tl.load(offsets_ptr + row)
        if METRIC != GIVEN and not READY:
            for first in range(0, count, BLOCK):
                dissimilarity_row(
                    d_row,
                    anchors_ptr + tl.cast(row, tl.int64) * width,
                    references_ptr,
                    width,
                    tl.load(anchor_sq_ptr + row),
                    reference_sq_ptr,
                    offset,
                    first,
                    count,
                    own,
                    METRIC,
                    BLOCK,
                )
            tl.debug_barrier()
        number, total, low, high, fit = row_range(d_row, count, own, keep_row, HAS_KEEP, BLOCK)
        any_target = tl.load(target_row)  # undefined ranks are so throughout
        if fit & (any_target == any_target):
            mean = total / tl.maximum(number, 1).to(tl.float64)
            low = tl.where(number > 0, low, 0.0)
            high = tl.where(number > 0, high, 0.0)
            inverse_tau, unit = row_scale(
                d_row,
                count,
                own,
                keep_row,
                number,
                mean,
                low,
                high,
                temperature,
                SCALE_STD,
                HAS_KEEP,
                BLOCK,
            )
            steps = inverse_tau * inverse_step(RELAXATION)
            cells, on_grid = grid_cells(low, high, steps, capacity, GRID)
            half, first_factor, second_factor = pair_scale(inverse_tau, low, high)
            if on_grid:
                spread_to_density(
                    d_row,
                    d_row,
                    1.0,
                    moments_ptr,
                    mass_ptr,
                    nodes_ptr,
                    cubic_ptr,
                    level_ptr,
                    tables_ptr,
                    count,
                    own,
                    keep_row,
                    cells,
                    low,
                    steps,
                    RELAXATION,
                    False,
                    HAS_KEEP,
                    BLOCK,
                )
                if WITH_GRAD:
                    clear(moments_ptr, cells, BLOCK)
                    tl.debug_barrier()
            # Ranks, loss and slopes.
            loss = tl.full((), 0.0, tl.float64)
            others = tl.maximum(number - 1, 1).to(tl.float32)
            for first in range(0, count, BLOCK):
                j = first + lane
                valid = counted(j, count, own, keep_row, HAS_KEEP)
                d = tl.load(d_row + j, mask=valid, other=0.0)
                target = tl.load(target_row + j, mask=valid, other=0.0)
                sums, density = sums_at(
                    d_row,
                    d,
                    valid,
                    count,
                    own,
                    keep_row,
                    cubic_ptr,
                    level_ptr,
                    on_grid,
                    low,
                    steps,
                    half,
                    first_factor,
                    second_factor,
                    RELAXATION,
                    HAS_KEEP,
                    BLOCK,
                    PAIRS,
                )
                residual = tl.where(valid, (sums - 0.5) / others - target, 0.0)
                loss += tl.sum(penalty_value(residual, PENALTY).to(tl.float64), axis=0)
                if WITH_GRAD:
                    slope = penalty_slope(residual, PENALTY)
                    tl.store(slope_ptr + j, slope, mask=j < count)
                    tl.store(push_ptr + j, density, mask=valid)
                    if on_grid:
                        cell, u = place(tl.where(valid, d, low), low, steps)
                        spread(moments_ptr, cell, u, slope, valid)
            ranked = number > 1
            size = tl.maximum(number, 1).to(tl.float64)
            tl.store(losses_ptr + row, tl.where(ranked, loss / size, 0.0).to(tl.float32))
            if WITH_GRAD:
                tl.debug_barrier()
                if on_grid:
                    density_function(
                        moments_ptr,
                        mass_ptr,
                        nodes_ptr,
                        cubic_ptr,
                        level_ptr,
                        tables_ptr,
                        cells,
                        RELAXATION,
                        False,
                    )
                pairs = tl.maximum(size * (size - 1.0), 1.0)
                factor = (tl.load(weights_ptr + row).to(tl.float64) / pairs).to(tl.float32)
                rank_gradient(
                    d_row,
                    slope_ptr,
                    1.0,
                    push_ptr,
                    push_ptr,
                    d_row,
                    tl.where(ranked, factor, 0.0),
                    offset,
                    count,
                    own,
                    keep_row,
                    number,
                    mean,
                    unit,
                    inverse_tau,
                    cubic_ptr,
                    on_grid,
                    low,
                    steps,
                    half,
                    first_factor,
                    second_factor,
                    METRIC,
                    RELAXATION,
                    SCALE_STD,
                    HAS_KEEP,
                    BLOCK,
                    PAIRS,
                )
        else:
            tl.store(losses_ptr + row, float("nan"))
            if WITH_GRAD:
                for first in range(0, count, BLOCK):
                    j = first + lane
                    valid = counted(j, count, own, keep_row, HAS_KEEP)
                    undefined = tl.where(valid, float("nan"), 0.0)
                    tl.store(d_row + j, undefined, mask=j < count)
        tl.debug_barrier()
