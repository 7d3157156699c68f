"""Stage `soft_rank`, standing alone: ranks of the rows of a matrix, and their gradient."""

from typing import NamedTuple

import triton
import triton.language as tl

from .dissimilarity import row_extent
from .grid import clear, scratch
from .row import SPECIALIZATION, Row, counted, finite, present, store_undefined
from .row_sums import (
    Gradient,
    Options,
    Slopes,
    rank_gradient,
    row_scale,
    spread_to_density,
    sums_at,
)


class Ranked(NamedTuple):
    """Where ranks and, WITH_GRAD, densities of a row go."""

    rank: tl.tensor
    density: tl.tensor
    WITH_GRAD: tl.constexpr


@triton.jit
def store_ranks(row, out, scale, grid, options, ON_GRID: tl.constexpr):
    """Ranks of a row, by one of the two ways; 0 where nothing counts."""
    inverse_others = 1.0 / tl.maximum(scale.number - 1, 1).to(tl.float32)
    for first in range(0, row.count, options.BLOCK):
        j = first + tl.arange(0, options.BLOCK)
        valid = counted(j, row)
        x = tl.load(row.x + j, mask=valid, other=0.0)
        sums, density = sums_at(row, x, valid, scale, grid, options, ON_GRID)
        rank = tl.where(scale.number > 1, (sums - 0.5) * inverse_others, 0.5)
        tl.store(out.rank + j, present(rank, valid, row), mask=j < row.count)
        if out.WITH_GRAD:
            tl.store(out.density + j, present(density, valid, row), mask=j < row.count)


@triton.jit
def soft_rank_row(row, out, grid, options):
    """Ranks and, WITH_GRAD, densities of a row; 0 where nothing counts."""
    extent = row_extent(row, None, 0, 0.0, False, options.BLOCK)
    if finite(extent.total):
        scale = row_scale(row, extent, grid, options)
        if scale.on_grid:
            clear(grid, scale.cells, options.BLOCK)
            spread_to_density(row, None, scale, grid, options)
            store_ranks(row, out, scale, grid, options, True)
        else:
            store_ranks(row, out, scale, grid, options, False)
    else:
        store_undefined(out.rank, row, options.BLOCK)
        if out.WITH_GRAD:
            store_undefined(out.density, row, options.BLOCK)


@triton.jit(**SPECIALIZATION)
def soft_rank_kernel(
    x_ptr,
    keep_ptr,
    rank_ptr,
    density_ptr,
    tables_ptr,
    moments_ptr,
    floats_ptr,
    count,
    capacity,
    floats_stride,
    temperature: tl.float64,
    rows,
    HAS_KEEP: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    RELAXATION: tl.constexpr,
    SCALE_STD: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Ranks [rows, count] and, WITH_GRAD, the density that the backward needs."""
    grid = scratch(tables_ptr, moments_ptr, floats_ptr, floats_stride, capacity)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(i, tl.int64) * count
        soft_rank_row(
            Row(x_ptr + start, count, -1, keep_ptr + start, HAS_KEEP),
            Ranked(rank_ptr + start, density_ptr + start, WITH_GRAD),
            grid,
            Options(temperature, RELAXATION, SCALE_STD, GRID, BLOCK, PAIRS),
        )
        tl.debug_barrier()


@triton.jit
def largest_slope(row, slope_ptr, BLOCK: tl.constexpr):
    """The largest |slope| where a value counts; infinity if one is not finite."""
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, row.count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        slope = tl.abs(tl.load(slope_ptr + j, mask=counted(j, row), other=0.0))
        largest = tl.maximum(largest, tl.where(slope == slope, slope, float("inf")))
    return tl.max(largest, axis=0)


@triton.jit
def soft_rank_row_backward(row, start, slope_ptr, density_ptr, grad_ptr, grid, options):
    """The gradient of the row that starts there, from ∂L/∂rank and the density of the forward."""
    extent = row_extent(row, None, 0, 0.0, False, options.BLOCK)
    slope_ptr += start
    largest = largest_slope(row, slope_ptr, options.BLOCK)
    if finite(extent.total) & finite(largest):
        scale = row_scale(row, extent, grid, options)
        # Moments are fixed-point numbers: slopes enter them as parts of the row's largest.
        largest = tl.maximum(largest, 1e-37)
        slopes = Slopes(slope_ptr, 1.0 / largest)
        if scale.on_grid:
            clear(grid, scale.cells, options.BLOCK)
        factor = largest / tl.maximum(scale.number - 1, 1).to(tl.float32)
        grad_row = grad_ptr + start
        out = Gradient(density_ptr + start, grad_row, grad_row, factor)
        rank_gradient(row, slopes, scale, grid, out, None, 0, options)
    else:
        store_undefined(grad_ptr + start, row, options.BLOCK)


@triton.jit(**SPECIALIZATION)
def soft_rank_backward_kernel(
    x_ptr,
    keep_ptr,
    grad_rank_ptr,
    density_ptr,
    grad_ptr,
    tables_ptr,
    moments_ptr,
    floats_ptr,
    count,
    capacity,
    floats_stride,
    temperature: tl.float64,
    rows,
    HAS_KEEP: tl.constexpr,
    RELAXATION: tl.constexpr,
    SCALE_STD: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Σ_j grad_rank_j ∂r_j/∂x [rows, count]."""
    grid = scratch(tables_ptr, moments_ptr, floats_ptr, floats_stride, capacity)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(i, tl.int64) * count
        soft_rank_row_backward(
            Row(x_ptr + start, count, -1, keep_ptr + start, HAS_KEEP),
            start,
            grad_rank_ptr,
            density_ptr,
            grad_ptr,
            grid,
            Options(temperature, RELAXATION, SCALE_STD, GRID, BLOCK, PAIRS),
        )
        tl.debug_barrier()
