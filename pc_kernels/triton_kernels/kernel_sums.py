# mypy: ignore-errors
"""Stage `kernel_sums`: weighted sums of φ, Φ and ∫Φ of a row's sources at its queries.

Each row chooses its way: a grid, as wide as the relaxation's reach asks for and with a unit of weight in
every cell, so that small sums have their digits (docs/method.md, "Small counts"); or all pairs.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .dissimilarity import row_extent
from .formulas import kernels_at
from .grid import (
    FAR,
    INVERSE_STEPS,
    LANES,
    cell_units,
    clear,
    density_function,
    entry,
    gather_integral,
    gather_rank,
    integrate_twice,
    place,
    scratch,
    spread,
)
from .row import SPECIALIZATION, Row, counted, finite
from .row_sums import factors_of

PAIRS_PER_POINT = tl.constexpr(16)
PAIRS_PER_CELL = tl.constexpr(32)
"""What a point on a grid costs, and a cell."""


class Wanted(NamedTuple):
    """Where a row's sums go, by channel, and which of them are wanted."""

    density: tl.tensor
    cdf: tl.tensor
    integral: tl.tensor
    channel_stride: tl.tensor
    DENSITY: tl.constexpr
    CDF: tl.constexpr
    INTEGRAL: tl.constexpr


class Weights(NamedTuple):
    """Of a row's sources: a pointer to those of the first channel, or 1 each."""

    ptr: tl.tensor
    channel_stride: tl.tensor
    GIVEN: tl.constexpr


class Options(NamedTuple):
    """What is summed, and the sizes of blocks."""

    temperature: tl.tensor
    RELAXATION: tl.constexpr
    """That of a grid with a reach, see tables.FAR."""
    GRID: tl.constexpr
    BLOCK: tl.constexpr
    PAIRS: tl.constexpr


class Span(NamedTuple):
    """Where sources and queries lie, together; see `row_sums.Scale`."""

    low: tl.tensor
    high: tl.tensor
    inverse_tau: tl.tensor
    steps: tl.tensor
    cells: tl.tensor
    on_grid: tl.tensor


@triton.jit
def span_of(low, high, sources, queries, grid, options):
    """The `Span` of points between low and high."""
    inverse_tau = 1.0 / tl.maximum(options.temperature, 1e-300)
    steps = inverse_tau * entry(INVERSE_STEPS, options.RELAXATION)
    span = (high.to(tl.float64) - low) * steps
    room = tl.cast(grid.capacity - 2, tl.float64)
    pairs = tl.cast(sources, tl.float64) * queries
    worth = tl.cast(sources + queries, tl.float64) * PAIRS_PER_POINT
    worth += tl.minimum(span, room) * PAIRS_PER_CELL
    on_grid = (span <= room) & (pairs > worth)
    if not options.GRID:
        on_grid = tl.full((), False, tl.int1)
    cells = tl.where(on_grid, span, 0.0).to(tl.int32) + 2
    return Span(low, high, inverse_tau, steps, cells, on_grid)


@triton.jit
def weight_of(weights, channel, j, valid):
    """Weights of the sources at j in a channel, 0 where none counts."""
    if weights.GIVEN:
        at = tl.cast(channel, tl.int64) * weights.channel_stride + j
        weight = tl.load(weights.ptr + at, mask=valid, other=0.0)
    else:
        weight = tl.where(valid, 1.0, 0.0)
    return weight


@triton.jit
def weights_are_finite(sources, weights, channel, BLOCK: tl.constexpr):
    """Whether all that count in a channel are."""
    poison = tl.zeros([BLOCK], tl.float32)
    if weights.GIVEN:
        for first in range(0, sources.count, BLOCK):
            j = first + tl.arange(0, BLOCK)
            weight = weight_of(weights, channel, j, counted(j, sources))
            poison += weight - weight  # 0, or NaN
    return tl.sum(poison, axis=0) == 0.0


@triton.jit
def spread_weights(sources, weights, channel, span, grid, options):
    """The sources' weights in a channel to moments, which are 0, in units of each cell's largest."""
    for first in range(0, span.cells, options.BLOCK):
        c = first + tl.arange(0, options.BLOCK)
        tl.store(grid.level + c, tl.zeros([options.BLOCK], tl.float32), mask=c < span.cells)
    tl.debug_barrier()
    for first in range(0, sources.count, options.BLOCK):
        j = first + tl.arange(0, options.BLOCK)
        valid = counted(j, sources)
        cell, _u = place(tl.load(sources.x + j, mask=valid, other=0.0), valid, span)
        size = tl.abs(weight_of(weights, channel, j, valid))
        tl.atomic_max(grid.level + cell, size, mask=size > 0.0, sem="relaxed")
    tl.debug_barrier()
    for first in range(0, sources.count * LANES, options.BLOCK):
        lane = first + tl.arange(0, options.BLOCK)
        j = lane // LANES
        valid = counted(j, sources)
        cell, u = place(tl.load(sources.x + j, mask=valid, other=0.0), valid, span)
        weight = weight_of(weights, channel, j, valid) * cell_units(grid, cell, valid)
        spread(grid, cell, u, weight, valid, lane % LANES)


@triton.jit
def store(out, channel, j, sums, asked, inside):
    """Stores the sums at the queries j of a channel, 0 where they are not asked for."""
    density, cdf, integral = sums
    at = tl.cast(channel, tl.int64) * out.channel_stride + j
    if out.DENSITY:
        tl.store(out.density + at, tl.where(asked, density, 0.0), mask=inside)
    if out.CDF:
        tl.store(out.cdf + at, tl.where(asked, cdf, 0.0), mask=inside)
    if out.INTEGRAL:
        tl.store(out.integral + at, tl.where(asked, integral, 0.0), mask=inside)


@triton.jit
def sums_on_grid(sources, queries, weights, channel, out, span, grid, options):
    """One channel's sums by the grid, whose moments are 0 before and after."""
    LEVELS: tl.constexpr = out.CDF or out.INTEGRAL
    spread_weights(sources, weights, channel, span, grid, options)
    density_function(grid, span.cells, options.RELAXATION, LEVELS, options.BLOCK, True)
    if out.INTEGRAL:
        integrate_twice(grid, span.cells, options.RELAXATION, options.BLOCK)
    for first in range(0, queries.count, options.BLOCK):
        j = first + tl.arange(0, options.BLOCK)
        asked = counted(j, queries)
        cell, u = place(tl.load(queries.x + j, mask=asked, other=0.0), asked, span)
        cdf, density = gather_rank(grid, cell, u, options.RELAXATION)
        integral = cdf
        if out.INTEGRAL:
            integral = gather_integral(grid, cell, u, options.RELAXATION)
        store(out, channel, j, (density, cdf, integral), asked, j < queries.count)
    tl.debug_barrier()


@triton.jit
def sums_by_pairs(sources, queries, weights, channel, out, span, options):
    """One channel's sums over all pairs."""
    factors = factors_of(span.inverse_tau, span.low, span.high)
    for first in range(0, queries.count, options.BLOCK):
        j = first + tl.arange(0, options.BLOCK)
        asked = counted(j, queries)
        y = tl.load(queries.x + j, mask=asked, other=0.0) * factors.half
        densities = tl.zeros([options.BLOCK], tl.float64)
        cdfs = tl.zeros([options.BLOCK], tl.float64)
        integrals = tl.zeros([options.BLOCK], tl.float64)
        for first_source in range(0, sources.count, options.PAIRS):
            k = first_source + tl.arange(0, options.PAIRS)
            valid = counted(k, sources)
            # What does not count lies infinitely far above.
            x = tl.load(sources.x + k, mask=valid, other=float("inf")) * factors.half
            w = weight_of(weights, channel, k, valid)[:, None]
            z = (y[None, :] - x[:, None]) * factors.first * factors.second
            density, cdf, integral = kernels_at(z, options.RELAXATION - FAR)
            if out.DENSITY:
                densities += tl.sum(w * density, axis=0).to(tl.float64)
            if out.CDF:
                cdfs += tl.sum(w * cdf, axis=0).to(tl.float64)
            if out.INTEGRAL:
                integrals += tl.sum((w * integral).to(tl.float64), axis=0)
        sums = densities.to(tl.float32), cdfs.to(tl.float32), integrals.to(tl.float32)
        store(out, channel, j, sums, asked, j < queries.count)


@triton.jit
def store_undefined(queries, channels, out, BLOCK: tl.constexpr):
    """NaN where a query is asked for."""
    for channel in range(channels):
        for first in range(0, queries.count, BLOCK):
            j = first + tl.arange(0, BLOCK)
            nan = tl.full([BLOCK], float("nan"), tl.float32)
            store(out, channel, j, (nan, nan, nan), counted(j, queries), j < queries.count)


@triton.jit(**SPECIALIZATION)
def kernel_sums_kernel(
    x_ptr,
    y_ptr,
    weights_ptr,
    source_keep_ptr,
    query_keep_ptr,
    density_ptr,
    cdf_ptr,
    integral_ptr,
    tables_ptr,
    moments_ptr,
    floats_ptr,
    source_count,
    query_count,
    capacity,
    floats_stride,
    temperature: tl.float64,
    all_rows,
    channels,
    rows,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SOURCE_KEEP: tl.constexpr,
    HAS_QUERY_KEEP: tl.constexpr,
    DENSITY: tl.constexpr,
    CDF: tl.constexpr,
    INTEGRAL: tl.constexpr,
    RELAXATION: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Sums [channels, all_rows, query_count] of the kernels that are wanted, of the first `rows` rows."""
    grid = scratch(tables_ptr, moments_ptr, floats_ptr, floats_stride, capacity)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(i, tl.int64) * source_count
        to = tl.cast(i, tl.int64) * query_count
        sums_of_row(
            Row(x_ptr + at, source_count, -1, source_keep_ptr + at, HAS_SOURCE_KEEP),
            Row(y_ptr + to, query_count, -1, query_keep_ptr + to, HAS_QUERY_KEEP),
            Weights(weights_ptr + at, tl.cast(all_rows, tl.int64) * source_count, HAS_WEIGHTS),
            channels,
            Wanted(
                density_ptr + to,
                cdf_ptr + to,
                integral_ptr + to,
                tl.cast(all_rows, tl.int64) * query_count,
                DENSITY,
                CDF,
                INTEGRAL,
            ),
            grid,
            Options(temperature, RELAXATION, GRID, BLOCK, PAIRS),
        )


@triton.jit
def sums_of_row(sources, queries, weights, channels, out, grid, options):
    """The sums of a row in every channel."""
    of_sources = row_extent(sources, None, 0, 0.0, False, options.BLOCK)
    of_queries = row_extent(queries, None, 0, 0.0, False, options.BLOCK)
    low = tl.minimum(of_sources.low, of_queries.low)
    high = tl.maximum(of_sources.high, of_queries.high)
    defined = finite(of_sources.total) & finite(of_queries.total)
    for channel in range(channels):
        defined = defined & weights_are_finite(sources, weights, channel, options.BLOCK)
    if defined:
        empty = low > high
        low = tl.where(empty, 0.0, low)
        high = tl.where(empty, 0.0, high)
        span = span_of(low, high, sources.count, queries.count, grid, options)
        if span.on_grid:
            clear(grid, span.cells, options.BLOCK)
            for channel in range(channels):
                sums_on_grid(sources, queries, weights, channel, out, span, grid, options)
        else:
            for channel in range(channels):
                sums_by_pairs(sources, queries, weights, channel, out, span, options)
    else:
        store_undefined(queries, channels, out, options.BLOCK)
