"""The grid method inside a kernel: spread, convolve, integrate, gather (docs/method.md, Eq. 4).

One program works on one row at a time, in scratch memory of its own. Threads exchange data only
through that memory, with a barrier between writing and reading; what atomics have written is read past
the first-level cache (".cg"), which does not see them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import tables

NODES = tl.constexpr(tables.NODES)
TERMS = tl.constexpr(tables.TERMS)
TAP_BLOCK = tl.constexpr(tables.TAP_BLOCK)
SPREAD = tl.constexpr(tables.SPREAD)
EDGE = tl.constexpr(tables.EDGE)
EDGE_TAPS = tl.constexpr(tables.EDGE_TAPS)
TAPS = tl.constexpr(tables.TAPS)
GATHER = tl.constexpr(tables.GATHER)
INTEGRAL = tl.constexpr(tables.INTEGRAL)
HALF = tl.constexpr(tables.HALF)
MASS_PAD = tl.constexpr(tables.MASS_PAD)
DENSITY_PAD = tl.constexpr(tables.DENSITY_PAD)
INVERSE_STEPS = tl.constexpr(tables.INVERSE_STEPS)
BANDS = tl.constexpr(tables.BANDS)
FAR = tl.constexpr(tables.FAR)

FIXED = tl.constexpr(float(1 << 36))
"""Moments are whole multiples of 1/FIXED: integers add up the same in any order, and exactly."""

WHOLE = tl.constexpr(1.5 * 2**52)
"""Added to a float64 number below 2⁵¹, it leaves the nearest whole number in the lowest bits."""

WHOLE_BITS = tl.constexpr(0x4338 << 48)

LANES = tl.constexpr(1)
"""Threads that share a point when it is spread: side by side, they reach its cell's moments at once."""


class Grid(NamedTuple):
    """A program's scratch memory, all pointers but the capacity, and the constants of the method."""

    tables: tl.tensor
    moments: tl.tensor
    mass: tl.tensor
    density: tl.tensor
    """At the nodes."""
    cubic: tl.tensor
    """The density in every cell."""
    level: tl.tensor
    """The rank function in the middle of every cell; of weighted points first its largest weight."""
    capacity: tl.tensor
    """Cells there is room for."""


@triton.jit
def scratch(tables_ptr, moments_ptr, floats_ptr, stride, capacity):
    """This program's part of the scratch memory of all."""
    program = tl.cast(tl.program_id(0), tl.int64)
    moments = moments_ptr + program * capacity * TERMS
    mass = floats_ptr + program * stride
    density = mass + capacity + MASS_PAD
    cubic = density + capacity + DENSITY_PAD
    level = cubic + capacity * TERMS
    return Grid(tables_ptr, moments, mass, density, cubic, level, capacity)


@triton.constexpr_function
def entry(table, *places):
    """An entry of a table, known when the kernel is compiled."""
    for place in places:
        table = table[place]
    return table


@triton.jit
def whole(x):
    """The nearest whole numbers to |x| < 2⁵¹, as int64. Faster than a conversion."""
    return (x + WHOLE).to(tl.int64, bitcast=True) - WHOLE_BITS


@triton.jit
def place(x, valid, scale):
    """The cell of each point and its place in the cell, u in [−½, ½]; of what is not valid, the lowest.

    In float64: a small value beside a large one has digits that their float32 difference has not.
    """
    t = (tl.where(valid, x, scale.low).to(tl.float64) - scale.low) * scale.steps
    shifted = t + WHOLE
    return shifted.to(tl.int64, bitcast=True).to(tl.int32), (t - (shifted - WHOLE)).to(tl.float32)


@triton.jit
def clear(grid, cells, BLOCK: tl.constexpr):
    """Zero moments; ends with a barrier."""
    lane = tl.arange(0, BLOCK)
    for first in range(0, cells * TERMS, BLOCK):
        i = first + lane
        tl.store(grid.moments + i, tl.zeros([BLOCK], tl.int64), mask=i < cells * TERMS)
    tl.debug_barrier()


@triton.jit
def spread(grid, cell, u, weight, mask, part):
    """Adds weight · (1, u, u², u³) to the moments of the points' cells, |weight| ≤ 2.

    A point has LANES places in the block; `part` says which of them this is.
    """
    amount = tl.where(part % 2 == 1, weight * u, weight)
    step = u
    if LANES > 1:
        step = u * u
    if LANES == 4:
        amount = tl.where(part >= 2, amount * step, amount)
    for a in tl.static_range(0, TERMS, LANES):
        fixed = whole(amount.to(tl.float64) * FIXED)
        at = cell * TERMS + (part + a)
        tl.atomic_add(grid.moments + at, fixed, mask=mask, sem="relaxed")
        amount *= step


@triton.jit
def exponent_of(x):
    """That of x ≥ 0, as in its bits, within what has an inverse."""
    return tl.minimum(tl.maximum(x.to(tl.int32, bitcast=True) >> 23, 1), 253)


@triton.jit
def power_of_two(exponent):
    """Of an exponent as in the bits: 127 is 1."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def cell_units(grid, cell, mask):
    """What the weights of these points are multiplied by, to be 4 at most: by the largest of the cell."""
    largest = tl.load(grid.level + cell, mask=mask, other=1.0, cache_modifier=".cg")
    return power_of_two(254 - exponent_of(largest))


@triton.jit
def moments_to_floats(grid, cells, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Moments as float32 numbers where the cubics will be, and zeros in their place."""
    for first in range(0, cells * TERMS, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < cells * TERMS
        moment = tl.load(grid.moments + i, mask=inside, other=0, cache_modifier=".cg")
        value = moment.to(tl.float32) * (1.0 / FIXED)
        if WEIGHTED:
            largest = tl.load(grid.level + i // TERMS, mask=inside, other=1.0, cache_modifier=".cg")
            value *= power_of_two(exponent_of(largest))
        tl.store(grid.cubic + i, value, mask=inside)
        tl.store(grid.moments + i, tl.zeros([BLOCK], tl.int64), mask=inside)


@triton.jit
def spread_weight(term, k: tl.constexpr):
    """What a cell's moments of these terms weigh on the k-th node from its last on."""
    low = tl.where(term == 0, entry(SPREAD, k, 0), entry(SPREAD, k, 1))
    high = tl.where(term == 2, entry(SPREAD, k, 2), entry(SPREAD, k, 3))
    return tl.where(term < 2, low, high)


@triton.jit
def masses(grid, cells, BAND: tl.constexpr, BLOCK: tl.constexpr):
    """Cell moments to weights on the nodes, with a band of zeros on both sides.

    A node collects from the cells n − NODES + 1 … n.
    """
    term = tl.arange(0, TERMS)[None, :]
    nodes = cells + NODES - 1
    for first in range(0, nodes, BLOCK):
        n = first + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK, TERMS], tl.float32)
        for k in tl.static_range(NODES):
            cell = n + (k - (NODES - 1))
            inside = ((cell >= 0) & (cell < cells))[:, None]
            moment = tl.load(grid.cubic + cell[:, None] * TERMS + term, mask=inside, other=0.0)
            total += moment * spread_weight(term, k)
        tl.store(grid.mass + BAND + n, tl.sum(total, axis=1), mask=n < nodes)
    for first in range(0, 2 * BAND + TAP_BLOCK, BLOCK):
        i = first + tl.arange(0, BLOCK)
        at = tl.where(i < BAND, i, i + nodes)
        tl.store(grid.mass + at, tl.zeros([BLOCK], tl.float32), mask=i < 2 * BAND + TAP_BLOCK)


@triton.jit
def convolve(grid, cells, RELAXATION: tl.constexpr, BLOCK: tl.constexpr):
    """Density at the nodes: masses convolved with φ, whose table ends in zeros."""
    BAND: tl.constexpr = entry(BANDS, RELAXATION)
    nodes = cells + NODES - 1
    for first in range(0, nodes, BLOCK):
        n = first + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for tap in range(0, 2 * BAND + 1, TAP_BLOCK):
            t = tap + tl.arange(0, TAP_BLOCK)[:, None]
            phi = tl.load(grid.tables + entry(TAPS, RELAXATION) + t)
            mass = tl.load(grid.mass + n[None, :] + t)  # beyond the nodes, whatever lies there
            total += tl.sum(mass * phi, axis=0)
        tl.store(grid.density + n, total, mask=n < nodes)


@triton.jit
def cubics(grid, cells, RELAXATION: tl.constexpr, INTEGRATE: tl.constexpr, BLOCK: tl.constexpr):
    """Node densities to the cubic of every cell.

    INTEGRATE: also the constant that makes the cubic's integral the rank function. It starts from its
    value at the row's lower end, which depends on the first band alone.
    """
    BAND: tl.constexpr = entry(BANDS, RELAXATION)
    STEP: tl.constexpr = 1 / entry(INVERSE_STEPS, RELAXATION)
    term = tl.arange(0, TERMS)[None, :]
    rank = tl.full((), 0.0, tl.float64)
    if INTEGRATE:
        i = tl.arange(0, entry(EDGE_TAPS, RELAXATION))
        inside = i < cells + NODES - 1 + BAND
        mass = tl.load(grid.mass + BAND + i, mask=inside, other=0.0)
        rank += tl.sum((mass * tl.load(grid.tables + EDGE + i)).to(tl.float64), axis=0)
    for first in range(0, cells, BLOCK):
        c = first + tl.arange(0, BLOCK)
        valid = c < cells
        cubic = tl.zeros([BLOCK, TERMS], tl.float32)
        gain = tl.zeros([BLOCK], tl.float32)
        half = tl.zeros([BLOCK], tl.float32)
        for n in tl.static_range(NODES):
            density = tl.load(grid.density + c + n, mask=valid, other=0.0)
            cubic += density[:, None] * tl.load(grid.tables + GATHER + n * TERMS + term)
            if INTEGRATE:
                gain += density * (STEP * entry(INTEGRAL, n))
                half += density * (STEP * entry(HALF, n))
        tl.store(grid.cubic + c[:, None] * TERMS + term, cubic, mask=valid[:, None])
        if INTEGRATE:
            below = tl.cumsum(gain.to(tl.float64), axis=0) - gain
            tl.store(grid.level + c, (rank + below + half).to(tl.float32), mask=valid)
            if first + BLOCK < cells:
                rank += tl.sum(gain.to(tl.float64), axis=0)


@triton.jit
def integrate_twice(grid, cells, RELAXATION: tl.constexpr, BLOCK: tl.constexpr):
    """To `grid.mass`, after cubics: what makes the integral of the cubic's integral that of the ranks.

    It starts as `cubics` does. Ends with a barrier.
    """
    BAND: tl.constexpr = entry(BANDS, RELAXATION)
    TAPS_OF_EDGE: tl.constexpr = entry(EDGE_TAPS, RELAXATION)
    STEP: tl.constexpr = 1 / entry(INVERSE_STEPS, RELAXATION)
    i = tl.arange(0, TAPS_OF_EDGE)
    mass = tl.load(grid.mass + BAND + i, mask=i < cells + NODES - 1 + BAND, other=0.0)
    start = tl.load(grid.tables + EDGE + TAPS_OF_EDGE + i)
    total = tl.sum((mass * start).to(tl.float64), axis=0)
    tl.debug_barrier()
    term = tl.arange(0, TERMS)[None, :]
    for first in range(0, cells, BLOCK):
        c = first + tl.arange(0, BLOCK)
        valid = c < cells
        level = tl.load(grid.level + c, mask=valid, other=0.0)
        cubic = tl.load(grid.cubic + c[:, None] * TERMS + term, mask=valid[:, None], other=0.0)
        odd = tl.where(term == 1, 1.0 / 24, tl.where(term == 3, 1.0 / 320, 0.0))
        low = tl.where(term == 0, -1.0 / 8, 1.0 / 48)
        half = tl.where(term < 2, low, tl.where(term == 2, -1.0 / 192, 1.0 / 640))
        gain = (level + tl.sum(cubic * odd, axis=1) * STEP).to(tl.float64) * STEP
        to_middle = (level * 0.5 + tl.sum(cubic * half, axis=1) * STEP) * STEP
        below = tl.cumsum(gain, axis=0) - gain
        tl.store(grid.mass + c, (total + below + to_middle).to(tl.float32), mask=valid)
        total += tl.sum(gain, axis=0)
    tl.debug_barrier()


@triton.jit
def density_function(
    grid,
    cells,
    RELAXATION: tl.constexpr,
    INTEGRATE: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr = False,
):
    """From moments, all spread, to what `gather` and, with INTEGRATE, `gather_rank` read."""
    BAND: tl.constexpr = entry(BANDS, RELAXATION)
    tl.debug_barrier()
    moments_to_floats(grid, cells, WEIGHTED, BLOCK)
    tl.debug_barrier()
    masses(grid, cells, BAND, BLOCK)
    tl.debug_barrier()
    convolve(grid, cells, RELAXATION, BLOCK)
    tl.debug_barrier()
    cubics(grid, cells, RELAXATION, INTEGRATE, BLOCK)
    tl.debug_barrier()


@triton.jit
def terms(grid, cell, u):
    """The terms of the density's cubic at the points: [BLOCK, TERMS]."""
    term = tl.arange(0, TERMS)[None, :]
    v = u[:, None]
    low = tl.where(term == 0, 1.0, v)
    powers = tl.where(term < 2, low, tl.where(term == 2, v * v, v * v * v))
    return tl.load(grid.cubic + cell[:, None] * TERMS + term) * powers


@triton.jit
def gather(grid, cell, u):
    """The density at the points."""
    return tl.sum(terms(grid, cell, u), axis=1)


@triton.jit
def gather_rank(grid, cell, u, RELAXATION: tl.constexpr):
    """The rank function and the density at the points."""
    values = terms(grid, cell, u)
    order = tl.arange(0, TERMS)[None, :] + 1
    share = 1.0 / (order.to(tl.float32) * entry(INVERSE_STEPS, RELAXATION))
    level = tl.load(grid.level + cell)
    return level + u * tl.sum(values * share, axis=1), tl.sum(values, axis=1)


@triton.jit
def gather_integral(grid, cell, u, RELAXATION: tl.constexpr):
    """The integral of the rank function at the points."""
    STEP: tl.constexpr = 1 / entry(INVERSE_STEPS, RELAXATION)
    order = (tl.arange(0, TERMS)[None, :] + 1).to(tl.float32)
    twice = tl.sum(terms(grid, cell, u) / (order * (order + 1.0)), axis=1)
    level = tl.load(grid.level + cell)
    return tl.load(grid.mass + cell) + u * STEP * (level + u * STEP * twice)
