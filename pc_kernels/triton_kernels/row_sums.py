"""Sums over a row's pairs, Σ_k Φ((x_j − x_k)/τ) and what the gradient needs, by two ways.

Each row chooses for itself: the grid (grid.py) where the scratch memory has room for the row's range,
else all pairs, as they stand. The second serves short rows, for which kernels are built without GRID,
and nearly hard ones.
"""

import triton
import triton.language as tl

from . import tables
from .dissimilarity import dissimilarity_backward
from .formulas import LOGISTIC, counted, finite, step_and_density
from .grid import clear, density_function, gather, gather_rank, place, spread

LOGISTIC_STEP = tl.constexpr(tables.INVERSE_STEP["logistic"])
NORMAL_STEP = tl.constexpr(tables.INVERSE_STEP["normal"])


@triton.jit
def inverse_step(RELAXATION: tl.constexpr):
    """Grid nodes per unit of temperature."""
    return LOGISTIC_STEP if RELAXATION == LOGISTIC else NORMAL_STEP


@triton.jit
def row_range(x_ptr, count, own, keep_ptr, HAS_KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """Of the references that count: how many, their sum, the lowest, the highest; are all finite?"""
    number = tl.full((), 0, tl.int32)
    unfit = tl.full((), 0, tl.int32)
    total = tl.full((), 0.0, tl.float64)
    low = tl.full((), float("inf"), tl.float32)
    high = tl.full((), float("-inf"), tl.float32)
    for first in range(0, count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        valid = counted(j, count, own, keep_ptr, HAS_KEEP)
        x = tl.load(x_ptr + j, mask=valid, other=0.0)
        fit = valid & finite(x)
        number += tl.sum(valid.to(tl.int32), axis=0)
        unfit += tl.sum((valid & (fit == 0)).to(tl.int32), axis=0)
        total += tl.sum(tl.where(fit, x, 0.0).to(tl.float64), axis=0)
        low = tl.minimum(low, tl.min(tl.where(fit, x, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(fit, x, float("-inf")), axis=0))
    return number, total, low, high, unfit == 0


@triton.jit
def row_scale(
    x_ptr,
    count,
    own,
    keep_ptr,
    number,
    mean,
    low,
    high,
    temperature,
    SCALE_STD: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1/τ, and 1/σ for scale="std": 0 for equal values, whose ranks are ½ at any τ."""
    unit = tl.full((), 0.0, tl.float64)
    tau = unit + temperature
    if SCALE_STD:
        squares = tl.full((), 0.0, tl.float64)
        for first in range(0, count, BLOCK):
            j = first + tl.arange(0, BLOCK)
            valid = counted(j, count, own, keep_ptr, HAS_KEEP)
            x = tl.load(x_ptr + j, mask=valid, other=0.0).to(tl.float64)
            squares += tl.sum(tl.where(valid, (x - mean) * (x - mean), 0.0), axis=0)
        if high > low:
            sigma = tl.sqrt(squares / tl.maximum(number, 1).to(tl.float64))
            unit = 1.0 / sigma
            tau = tau * sigma
    return 1.0 / tl.maximum(tau, 1e-300), unit


@triton.jit
def standard_score(x, mean, unit):
    """(x − mean)/σ."""
    return ((x.to(tl.float64) - mean) * unit).to(tl.float32)


@triton.jit
def pair_scale(inverse_tau, low, high):
    """Three float32 factors whose product is 1/τ, such that no difference over- or underflows.

    A difference of float32 numbers is rounded once; it is only its size that needs care.
    """
    half = tl.where(tl.maximum(high, -low) > 1e38, 0.5, 1.0)
    # At these limits whatever differs is far apart, or whatever is finite is close together.
    inverse = tl.minimum(tl.maximum(inverse_tau, 1e-76), 1e76)
    first = tl.sqrt(inverse).to(tl.float32)
    return half, first, (inverse / (first.to(tl.float64) * half)).to(tl.float32)


@triton.jit
def pair_sums(
    x_ptr,
    x,
    count,
    own,
    keep_ptr,
    half,
    first_factor,
    second_factor,
    RELAXATION: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Σ_k Φ and Σ_k φ at the points x, over all references that count. O(count) a point."""
    ranks = tl.zeros([BLOCK], tl.float64)
    densities = tl.zeros([BLOCK], tl.float64)
    scaled = (x * half)[:, None]
    for first in range(0, count, PAIRS):
        k = first + tl.arange(0, PAIRS)
        valid = counted(k, count, own, keep_ptr, HAS_KEEP)
        # What does not count lies infinitely far above.
        other = tl.load(x_ptr + k, mask=valid, other=float("inf")) * half
        z = (scaled - other[None, :]) * first_factor * second_factor
        step, density = step_and_density(z, RELAXATION)
        ranks += tl.sum(step, axis=1).to(tl.float64)
        densities += tl.sum(density, axis=1).to(tl.float64)
    return ranks.to(tl.float32), densities.to(tl.float32)


@triton.jit
def pair_slopes(
    x_ptr,
    slope_ptr,
    slope_unit,
    x,
    slope,
    count,
    own,
    keep_ptr,
    half,
    first_factor,
    second_factor,
    RELAXATION: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Σ_k (slope_j − slope_k) φ at the points x; slopes in memory are to be multiplied by the unit."""
    total = tl.zeros([BLOCK], tl.float64)
    scaled = (x * half)[:, None]
    for first in range(0, count, PAIRS):
        k = first + tl.arange(0, PAIRS)
        valid = counted(k, count, own, keep_ptr, HAS_KEEP)
        other = tl.load(x_ptr + k, mask=valid, other=float("inf")) * half
        other_slope = tl.load(slope_ptr + k, mask=valid, other=0.0) * slope_unit
        z = (scaled - other[None, :]) * first_factor * second_factor
        _step, density = step_and_density(z, RELAXATION)
        push = (slope[:, None] - other_slope[None, :]) * density
        total += tl.sum(push, axis=1).to(tl.float64)
    return total.to(tl.float32)


@triton.jit
def grid_cells(low, high, steps, capacity, GRID: tl.constexpr):
    """Cells that a row needs, and whether the scratch memory has them."""
    span = (high.to(tl.float64) - low) * steps
    fits = span <= tl.cast(capacity - 2, tl.float64)
    if not GRID:
        fits = tl.full((), False, tl.int1)
    return tl.where(fits, span, 0.0).to(tl.int32) + 2, fits


@triton.jit
def spread_to_density(
    x_ptr,
    weight_ptr,
    weight_unit,
    moments_ptr,
    mass_ptr,
    nodes_ptr,
    cubic_ptr,
    level_ptr,
    tables_ptr,
    count,
    own,
    keep_ptr,
    cells,
    low,
    steps,
    RELAXATION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the row's points to cubics: of weight 1, and to levels; or WEIGHTED, of weight · unit."""
    clear(moments_ptr, cells, BLOCK)
    tl.debug_barrier()
    for first in range(0, count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        valid = counted(j, count, own, keep_ptr, HAS_KEEP)
        x = tl.load(x_ptr + j, mask=valid, other=0.0)
        weight = tl.full([BLOCK], 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.load(weight_ptr + j, mask=valid, other=0.0) * weight_unit
        cell, u = place(tl.where(valid, x, low), low, steps)
        spread(moments_ptr, cell, u, weight, valid)
    density_function(
        moments_ptr,
        mass_ptr,
        nodes_ptr,
        cubic_ptr,
        level_ptr,
        tables_ptr,
        cells,
        RELAXATION,
        not WEIGHTED,
    )


@triton.jit
def sums_at(
    x_ptr,
    x,
    valid,
    count,
    own,
    keep_ptr,
    cubic_ptr,
    level_ptr,
    on_grid,
    low,
    steps,
    half,
    first_factor,
    second_factor,
    RELAXATION: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Σ_k Φ and Σ_k φ at a block of points, k = j included."""
    if on_grid:
        cell, u = place(tl.where(valid, x, low), low, steps)
        ranks, densities = gather_rank(
            cubic_ptr, level_ptr, cell, u, valid, inverse_step(RELAXATION)
        )
    else:
        ranks, densities = pair_sums(
            x_ptr,
            x,
            count,
            own,
            keep_ptr,
            half,
            first_factor,
            second_factor,
            RELAXATION,
            HAS_KEEP,
            BLOCK,
            PAIRS,
        )
    return ranks, densities


@triton.jit
def slopes_at(
    x_ptr,
    slope_ptr,
    slope_unit,
    x,
    slope,
    density,
    valid,
    count,
    own,
    keep_ptr,
    cubic_ptr,
    on_grid,
    low,
    steps,
    half,
    first_factor,
    second_factor,
    RELAXATION: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Σ_k (slope_j − slope_k) φ at a block of points; `density` is `sums_at`'s, for the grid."""
    if on_grid:
        cell, u = place(tl.where(valid, x, low), low, steps)
        push = slope * density - gather(cubic_ptr, cell, u, valid)
    else:
        push = pair_slopes(
            x_ptr,
            slope_ptr,
            slope_unit,
            x,
            slope,
            count,
            own,
            keep_ptr,
            half,
            first_factor,
            second_factor,
            RELAXATION,
            HAS_KEEP,
            BLOCK,
            PAIRS,
        )
    return push


@triton.jit
def rank_gradient(
    x_ptr,
    slope_ptr,
    slope_unit,
    density_ptr,
    push_ptr,
    grad_ptr,
    factor,
    offset,
    count,
    own,
    keep_ptr,
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
    METRIC: tl.constexpr,
    RELAXATION: tl.constexpr,
    SCALE_STD: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Grad <- factor · Σ_k (slope_j − slope_k) φ/τ, through σ and the metric too; 0 where nothing counts.

    `push` keeps what pushes each point in between; it may be `density`, and `grad` x or `push`.
    """
    lane = tl.arange(0, BLOCK)
    pull = tl.full((), 0.0, tl.float64)
    for first in range(0, count, BLOCK):
        j = first + lane
        valid = counted(j, count, own, keep_ptr, HAS_KEEP)
        x = tl.load(x_ptr + j, mask=valid, other=0.0)
        slope = tl.load(slope_ptr + j, mask=valid, other=0.0) * slope_unit
        density = tl.load(density_ptr + j, mask=valid, other=0.0)
        push = slopes_at(
            x_ptr,
            slope_ptr,
            slope_unit,
            x,
            slope,
            density,
            valid,
            count,
            own,
            keep_ptr,
            cubic_ptr,
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
        push = tl.where(valid, push, 0.0)
        if SCALE_STD:
            score = tl.where(valid, standard_score(x, mean, unit), 0.0)
            pull += tl.sum((push * score).to(tl.float64), axis=0)
        tl.store(push_ptr + j, push, mask=j < count)
    tl.debug_barrier()
    # Ranks are functions of x/τ: dL/dτ = −Σ_k push_k (x_k − mean)/τ.
    share = (pull / tl.maximum(number, 1).to(tl.float64)).to(tl.float32)
    if SCALE_STD:  # equal values have no gradient
        factor = tl.where(unit > 0.0, factor, 0.0)
    # In two steps: either product may leave float32's normal numbers.
    inverse_scale = tl.minimum(inverse_tau, 3.4e38).to(tl.float32)
    for first in range(0, count, BLOCK):
        j = first + lane
        valid = counted(j, count, own, keep_ptr, HAS_KEEP)
        x = tl.load(x_ptr + j, mask=valid, other=0.0)
        push = tl.load(push_ptr + j, mask=valid, other=0.0)
        if SCALE_STD:
            push -= share * standard_score(x, mean, unit)
        grad = dissimilarity_backward(x, push, offset, METRIC) * factor * inverse_scale
        tl.store(grad_ptr + j, tl.where(valid, grad, 0.0), mask=j < count)
