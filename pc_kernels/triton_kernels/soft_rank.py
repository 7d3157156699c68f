"""Stage `soft_rank`, standing alone: ranks of the rows of a matrix, and their gradient."""

import triton
import triton.language as tl

from .dissimilarity import GIVEN
from .formulas import finite
from .grid import TERMS, scratch
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


@triton.jit
def soft_rank_kernel(
    x_ptr,
    rank_ptr,
    density_ptr,
    tables_ptr,
    moments_ptr,
    floats_ptr,
    rows,
    count,
    capacity,
    floats_stride,
    temperature: tl.float64,
    RELAXATION: tl.constexpr,
    SCALE_STD: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Ranks [rows, count] and, WITH_GRAD, the density that the backward needs."""
    moments_ptr += tl.cast(tl.program_id(0), tl.int64) * capacity * TERMS
    mass_ptr, nodes_ptr, cubic_ptr, level_ptr, _spare = scratch(floats_ptr, floats_stride, capacity)
    lane = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * count
        x_row = x_ptr + start
        number, total, low, high, fit = row_range(x_row, count, -1, x_row, False, BLOCK)
        if fit:
            mean = total / number.to(tl.float64)
            inverse_tau, _unit = row_scale(
                x_row,
                count,
                -1,
                x_row,
                number,
                mean,
                low,
                high,
                temperature,
                SCALE_STD,
                False,
                BLOCK,
            )
            steps = inverse_tau * inverse_step(RELAXATION)
            cells, on_grid = grid_cells(low, high, steps, capacity, GRID)
            half, first_factor, second_factor = pair_scale(inverse_tau, low, high)
            if on_grid:
                spread_to_density(
                    x_row,
                    x_row,
                    1.0,
                    moments_ptr,
                    mass_ptr,
                    nodes_ptr,
                    cubic_ptr,
                    level_ptr,
                    tables_ptr,
                    count,
                    -1,
                    x_row,
                    cells,
                    low,
                    steps,
                    RELAXATION,
                    False,
                    False,
                    BLOCK,
                )
            others = tl.maximum(number - 1, 1).to(tl.float32)
            for first in range(0, count, BLOCK):
                j = first + lane
                valid = j < count
                x = tl.load(x_row + j, mask=valid, other=0.0)
                sums, density = sums_at(
                    x_row,
                    x,
                    valid,
                    count,
                    -1,
                    x_row,
                    cubic_ptr,
                    level_ptr,
                    on_grid,
                    low,
                    steps,
                    half,
                    first_factor,
                    second_factor,
                    RELAXATION,
                    False,
                    BLOCK,
                    PAIRS,
                )
                rank = tl.where(number > 1, (sums - 0.5) / others, 0.5)
                tl.store(rank_ptr + start + j, rank, mask=valid)
                if WITH_GRAD:
                    tl.store(density_ptr + start + j, density, mask=valid)
        else:
            for first in range(0, count, BLOCK):
                j = first + lane
                undefined = tl.full([BLOCK], float("nan"), tl.float32)
                tl.store(rank_ptr + start + j, undefined, mask=j < count)
                if WITH_GRAD:
                    tl.store(density_ptr + start + j, undefined, mask=j < count)
        tl.debug_barrier()


@triton.jit
def soft_rank_backward_kernel(
    grad_rank_ptr,
    x_ptr,
    density_ptr,
    grad_ptr,
    tables_ptr,
    moments_ptr,
    floats_ptr,
    rows,
    count,
    capacity,
    floats_stride,
    temperature: tl.float64,
    RELAXATION: tl.constexpr,
    SCALE_STD: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Σ_j grad_rank_j ∂r_j/∂x [rows, count]."""
    moments_ptr += tl.cast(tl.program_id(0), tl.int64) * capacity * TERMS
    mass_ptr, nodes_ptr, cubic_ptr, level_ptr, _spare = scratch(floats_ptr, floats_stride, capacity)
    lane = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * count
        x_row = x_ptr + start
        slope_row = grad_rank_ptr + start
        number, total, low, high, fit = row_range(x_row, count, -1, x_row, False, BLOCK)
        largest = tl.full((), 0.0, tl.float32)
        for first in range(0, count, BLOCK):
            slope = tl.load(slope_row + first + lane, mask=first + lane < count, other=0.0)
            slope = tl.where(finite(slope), tl.abs(slope), float("inf"))
            largest = tl.maximum(largest, tl.max(slope, axis=0))
        if fit & finite(largest):
            mean = total / number.to(tl.float64)
            inverse_tau, unit = row_scale(
                x_row,
                count,
                -1,
                x_row,
                number,
                mean,
                low,
                high,
                temperature,
                SCALE_STD,
                False,
                BLOCK,
            )
            steps = inverse_tau * inverse_step(RELAXATION)
            cells, on_grid = grid_cells(low, high, steps, capacity, GRID)
            half, first_factor, second_factor = pair_scale(inverse_tau, low, high)
            # Moments are fixed-point numbers: slopes enter them as parts of the row's largest.
            largest = tl.maximum(largest, 1e-37)
            slope_unit = 1.0 / largest
            if on_grid:
                spread_to_density(
                    x_row,
                    slope_row,
                    slope_unit,
                    moments_ptr,
                    mass_ptr,
                    nodes_ptr,
                    cubic_ptr,
                    level_ptr,
                    tables_ptr,
                    count,
                    -1,
                    x_row,
                    cells,
                    low,
                    steps,
                    RELAXATION,
                    True,
                    False,
                    BLOCK,
                )
            rank_gradient(
                x_row,
                slope_row,
                slope_unit,
                density_ptr + start,
                grad_ptr + start,
                grad_ptr + start,
                largest / tl.maximum(number - 1, 1).to(tl.float32),
                0.0,
                count,
                -1,
                x_row,
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
                GIVEN,
                RELAXATION,
                SCALE_STD,
                False,
                BLOCK,
                PAIRS,
            )
        else:
            for first in range(0, count, BLOCK):
                j = first + lane
                undefined = tl.full([BLOCK], float("nan"), tl.float32)
                tl.store(grad_ptr + start + j, undefined, mask=j < count)
        tl.debug_barrier()
