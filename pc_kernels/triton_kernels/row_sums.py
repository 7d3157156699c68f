"""Sums over a row's pairs, Σ_k Φ((x_j − x_k)/τ) and what the gradient needs, by two ways.

Each row chooses for itself: the grid (grid.py) where the scratch memory has room for the row's range,
else all pairs, as they stand. The second serves short rows, for which kernels are built without GRID,
and nearly hard ones.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .dissimilarity import dissimilarity_backward, offset_of
from .formulas import step_and_density
from .grid import (
    INVERSE_STEPS,
    LANES,
    density_function,
    entry,
    gather,
    gather_rank,
    place,
    spread,
)
from .row import counted


class Options(NamedTuple):
    """How rows are ranked, and the sizes of blocks."""

    temperature: tl.tensor
    RELAXATION: tl.constexpr
    SCALE_STD: tl.constexpr
    GRID: tl.constexpr
    BLOCK: tl.constexpr
    PAIRS: tl.constexpr


class Scale(NamedTuple):
    """What turns a row's values into places on the grid, and differences into units of τ."""

    number: tl.tensor
    """Values that count."""
    share: tl.tensor
    """One of them in all: 1/number."""
    mean: tl.tensor
    unit: tl.tensor
    """1/σ under scale="std"; 0 for equal values."""
    inverse_tau: tl.tensor
    low: tl.tensor
    """The lowest value: where the grid starts."""
    high: tl.tensor
    steps: tl.tensor
    """Grid nodes per unit of x."""
    cells: tl.tensor
    on_grid: tl.tensor
    """Whether the row goes the grid's way: there is room for its cells."""


class Slopes(NamedTuple):
    """∂L/∂rank of a row in memory, to be multiplied by a unit."""

    ptr: tl.tensor
    unit: tl.tensor


class Gradient(NamedTuple):
    """Where a row's gradient is made of its density: pointers, and the factor of the whole.

    `push` holds what pushes each point in between; it may be `density`, and `grad` the row or `push`.
    """

    density: tl.tensor
    push: tl.tensor
    grad: tl.tensor
    factor: tl.tensor


@triton.jit
def row_scale(row, extent, grid, options):
    """The `Scale` of a row; equal values have τ = 0 under scale="std" and ranks ½."""
    unit = tl.full((), 0.0, tl.float64)
    tau = unit + options.temperature
    share = 1.0 / tl.maximum(extent.number, 1).to(tl.float64)
    mean = extent.total * share
    low = tl.where(extent.number > 0, extent.low, 0.0)
    high = tl.where(extent.number > 0, extent.high, 0.0)
    if options.SCALE_STD:
        squares = tl.zeros([options.BLOCK], tl.float64)
        for first in range(0, row.count, options.BLOCK):
            j = first + tl.arange(0, options.BLOCK)
            valid = counted(j, row)
            x = tl.load(row.x + j, mask=valid, other=0.0).to(tl.float64)
            squares += tl.where(valid, (x - mean) * (x - mean), 0.0)
        if high > low:
            sigma = tl.sqrt(tl.sum(squares, axis=0) * share)
            unit = 1.0 / sigma
            tau = tau * sigma
    inverse_tau = 1.0 / tl.maximum(tau, 1e-300)
    steps = inverse_tau * entry(INVERSE_STEPS, options.RELAXATION)
    span = (high.to(tl.float64) - low) * steps
    on_grid = span <= tl.cast(grid.capacity - 2, tl.float64)
    if not options.GRID:
        on_grid = tl.full((), False, tl.int1)
    cells = tl.where(on_grid, span, 0.0).to(tl.int32) + 2  # the lowest value's to the highest's
    return Scale(extent.number, share, mean, unit, inverse_tau, low, high, steps, cells, on_grid)


@triton.jit
def standard_score(x, scale):
    """(x − mean)/σ."""
    return ((x.to(tl.float64) - scale.mean) * scale.unit).to(tl.float32)


class Factors(NamedTuple):
    """Float32 numbers whose product is one of float64, such that no difference over- or underflows.

    A difference of float32 numbers is rounded once; it is only its size that needs care.
    """

    half: tl.tensor
    first: tl.tensor
    second: tl.tensor


@triton.jit
def factors_of(inverse, low, high):
    """`Factors` of 1/τ for values between low and high."""
    half = tl.where(tl.maximum(high, -low) > 1e38, 0.5, 1.0)
    # At these limits whatever differs is far apart, or whatever is finite is close together.
    inverse = tl.minimum(tl.maximum(inverse, 1e-76), 1e76)
    first = tl.sqrt(inverse).to(tl.float32)
    return Factors(half, first, (inverse / (first.to(tl.float64) * half)).to(tl.float32))


@triton.jit
def pair_sums(row, x, factors, options):
    """Σ_k Φ and Σ_k φ at the points x, over all references that count. O(count) a point."""
    ranks = tl.zeros([options.BLOCK], tl.float64)
    densities = tl.zeros([options.BLOCK], tl.float64)
    scaled = (x * factors.half)[None, :]
    for first in range(0, row.count, options.PAIRS):
        k = first + tl.arange(0, options.PAIRS)
        # What does not count lies infinitely far above.
        other = tl.load(row.x + k, mask=counted(k, row), other=float("inf")) * factors.half
        z = (scaled - other[:, None]) * factors.first * factors.second
        step, density = step_and_density(z, options.RELAXATION)
        ranks += tl.sum(step, axis=0).to(tl.float64)
        densities += tl.sum(density, axis=0).to(tl.float64)
    return ranks.to(tl.float32), densities.to(tl.float32)


@triton.jit
def pair_slopes(row, slopes, x, slope, factors, options):
    """Σ_k (slope_j − slope_k) φ at the points x, over all references that count."""
    total = tl.zeros([options.BLOCK], tl.float64)
    scaled = (x * factors.half)[None, :]
    for first in range(0, row.count, options.PAIRS):
        k = first + tl.arange(0, options.PAIRS)
        valid = counted(k, row)
        other = tl.load(row.x + k, mask=valid, other=float("inf")) * factors.half
        other_slope = tl.load(slopes.ptr + k, mask=valid, other=0.0) * slopes.unit
        z = (scaled - other[:, None]) * factors.first * factors.second
        _step, density = step_and_density(z, options.RELAXATION)
        push = (slope[None, :] - other_slope[:, None]) * density
        total += tl.sum(push, axis=0).to(tl.float64)
    return total.to(tl.float32)


@triton.jit
def spread_to_density(row, slopes, scale, grid, options):
    """From the row's points to cubics: of weight 1, with levels; or of their slopes, if not None.

    Moments are 0 before and after.
    """
    for first in range(0, row.count * LANES, options.BLOCK):
        lane = first + tl.arange(0, options.BLOCK)
        j = lane // LANES
        valid = counted(j, row)
        x = tl.load(row.x + j, mask=valid, other=0.0)
        cell, u = place(x, valid, scale)
        if slopes is None:
            weight = tl.where(valid, 1.0, 0.0)
        else:
            weight = tl.load(slopes.ptr + j, mask=valid, other=0.0) * slopes.unit
        # To add 0 to the lowest cell is cheaper than a branch, unless many do.
        if row.HAS_KEEP:
            spread(grid, cell, u, weight, valid, lane % LANES)
        else:
            spread(grid, cell, u, weight, None, lane % LANES)
    density_function(grid, scale.cells, options.RELAXATION, slopes is None, options.BLOCK)


@triton.jit
def sums_at(row, x, valid, scale, grid, options, ON_GRID: tl.constexpr):
    """Σ_k Φ and Σ_k φ at a block of points, k = j included."""
    if ON_GRID:
        cell, u = place(x, valid, scale)
        ranks, densities = gather_rank(grid, cell, u, options.RELAXATION)
    else:
        factors = factors_of(scale.inverse_tau, scale.low, scale.high)
        ranks, densities = pair_sums(row, x, factors, options)
    return ranks, densities


@triton.jit
def pushes(row, slopes, scale, grid, out, options, ON_GRID: tl.constexpr):
    """Σ_k (slope_j − slope_k) φ of each point to `out.push`; their product with the standard scores."""
    pulls = tl.zeros([options.BLOCK], tl.float64)
    for first in range(0, row.count, options.BLOCK):
        j = first + tl.arange(0, options.BLOCK)
        valid = counted(j, row)
        x = tl.load(row.x + j, mask=valid, other=0.0)
        slope = tl.load(slopes.ptr + j, mask=valid, other=0.0) * slopes.unit
        if ON_GRID:
            density = tl.load(out.density + j, mask=valid, other=0.0)
            cell, u = place(x, valid, scale)
            push = slope * density - gather(grid, cell, u)
        else:
            factors = factors_of(scale.inverse_tau, scale.low, scale.high)
            push = pair_slopes(row, slopes, x, slope, factors, options)
        push = tl.where(valid, push, 0.0)
        if options.SCALE_STD:
            score = tl.where(valid, standard_score(x, scale), 0.0)
            pulls += (push * score).to(tl.float64)
        tl.store(out.push + j, push, mask=j < row.count)
    return tl.sum(pulls, axis=0)


@triton.jit
def rank_gradient(row, slopes, scale, grid, out, gram, i, options):
    """Σ_k (slope_j − slope_k) φ/τ times the factor, through σ and δ too; 0 where nothing counts.

    `out` is a `Gradient`, whose density is `sums_at`'s. Overwrites the moments.
    """
    if scale.on_grid:
        spread_to_density(row, slopes, scale, grid, options)
        pull = pushes(row, slopes, scale, grid, out, options, True)
    else:
        pull = pushes(row, slopes, scale, grid, out, options, False)
    tl.debug_barrier()
    # Ranks are functions of x/τ: dL/dτ = −Σ_k push_k (x_k − mean)/τ.
    share = (pull * scale.share).to(tl.float32)
    if gram is None:
        store_gradient(row, scale, share, out, gram, i, options, False)
    elif offset_of(gram, i) > 0.0:
        store_gradient(row, scale, share, out, gram, i, options, True)
    else:
        store_gradient(row, scale, share, out, gram, i, options, False)


@triton.jit
def store_gradient(row, scale, share, out, gram, i, options, FAR: tl.constexpr):
    """Pushes to `out.grad`, of which the row's standard scores have their share."""
    factor = tl.where(scale.number > 1, out.factor, 0.0)
    if options.SCALE_STD:  # equal values have no gradient
        factor = tl.where(scale.unit > 0.0, factor, 0.0)
    # In two steps: either product may leave float32's normal numbers.
    inverse_scale = tl.minimum(scale.inverse_tau, 3.4e38).to(tl.float32)
    for first in range(0, row.count, options.BLOCK):
        j = first + tl.arange(0, options.BLOCK)
        valid = counted(j, row)
        x = tl.load(row.x + j, mask=valid, other=0.0)
        push = tl.load(out.push + j, mask=valid, other=0.0)
        if options.SCALE_STD:
            push -= share * standard_score(x, scale)
        grad = dissimilarity_backward(gram, i, j, x, push, valid, FAR, options.BLOCK)
        grad = grad * factor * inverse_scale
        tl.store(out.grad + j, tl.where(valid, grad, 0.0), mask=j < row.count)
