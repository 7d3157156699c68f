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
SPREAD = tl.constexpr(tables.SPREAD)
GATHER = tl.constexpr(tables.GATHER)
INTEGRAL = tl.constexpr(tables.INTEGRAL)
HALF = tl.constexpr(tables.HALF)
EDGE = tl.constexpr(tables.EDGE)
EDGE_TAPS = tl.constexpr(tables.EDGE_TAPS)
TAPS = tl.constexpr(tables.TAPS)
MASS_PAD = tl.constexpr(tables.MASS_PAD)
DENSITY_PAD = tl.constexpr(tables.DENSITY_PAD)
INVERSE_STEPS = tl.constexpr(tables.INVERSE_STEPS)
BANDS = tl.constexpr(tables.BANDS)

FIXED = tl.constexpr(float(1 << 36))
"""Moments are whole multiples of 1/FIXED: integers add up the same in any order, and exactly."""

TAP_BLOCK = tl.constexpr(16)

NODE_BLOCK = tl.constexpr(128)
"""Nodes, or cells, at a time."""


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
    """The rank function in the middle of every cell."""
    spare: tl.tensor
    """What comes behind, for the kernel to use."""
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
    return Grid(tables_ptr, moments, mass, density, cubic, level, level + capacity, capacity)


@triton.constexpr_function
def of_relaxation(table, code):
    """A relaxation's entry in a table by code."""
    return table[code]


@triton.jit
def place(x, valid, scale):
    """The cell of each point and its place in the cell, u in [−½, ½].

    In float64: a small value beside a large one has digits that their float32 difference has not.
    """
    t = (tl.where(valid, x, scale.low).to(tl.float64) - scale.low) * scale.steps
    cell = t.to(tl.int32)
    return cell, (t - (cell.to(tl.float64) + 0.5)).to(tl.float32)


@triton.jit
def powers(u):
    """1, u, u², u³ of each point: [BLOCK, TERMS]."""
    term = tl.arange(0, TERMS)[None, :]
    v = u[:, None]
    low = tl.where(term == 0, 1.0, v)
    return tl.where(term < 2, low, tl.where(term == 2, v * v, v * v * v))


@triton.jit
def clear(grid, cells, BLOCK: tl.constexpr):
    """Zero moments; ends with a barrier."""
    lane = tl.arange(0, BLOCK)
    for first in range(0, cells * TERMS, BLOCK):
        i = first + lane
        tl.store(grid.moments + i, tl.zeros([BLOCK], tl.int64), mask=i < cells * TERMS)
    tl.debug_barrier()


@triton.jit
def spread(grid, cell, u, weight, valid):
    """Adds the points' weight · (1, u, u², u³) to the moments of their cells; |weight| ≤ 2."""
    amount = (powers(u) * weight[:, None]).to(tl.float64) * FIXED
    at = cell[:, None] * TERMS + tl.arange(0, TERMS)[None, :]
    mask = valid[:, None] & (at >= 0)
    tl.atomic_add(grid.moments + at, amount.to(tl.int64), mask=mask, sem="relaxed")


@triton.jit
def masses(grid, cells, BAND: tl.constexpr):
    """Cell moments to weights on the nodes, with a band of zeros on both sides.

    A node collects from the cells n − NODES + 1 … n, whose moments lie side by side.
    """
    WIDTH: tl.constexpr = NODES * TERMS
    lane = tl.arange(0, WIDTH)
    weight = tl.load(grid.tables + SPREAD + lane)[None, :]
    padded = cells + NODES - 1 + 2 * BAND
    for first in range(0, padded, NODE_BLOCK):
        i = first + tl.arange(0, NODE_BLOCK)
        at = (i - BAND - (NODES - 1))[:, None] * TERMS + lane[None, :]
        inside = (at >= 0) & (at < cells * TERMS)
        moment = tl.load(grid.moments + at, mask=inside, other=0, cache_modifier=".cg")
        value = (moment.to(tl.float64) * (1.0 / FIXED)).to(tl.float32)
        tl.store(grid.mass + i, tl.sum(value * weight, axis=1), mask=i < padded)


@triton.jit
def convolve(grid, cells, BAND: tl.constexpr):
    """Density at the nodes: masses convolved with φ."""
    lane = tl.arange(0, TAP_BLOCK)
    nodes = cells + NODES - 1
    for first in range(0, nodes, NODE_BLOCK):
        n = first + tl.arange(0, NODE_BLOCK)
        total = tl.zeros([NODE_BLOCK], tl.float32)
        for tap in range(0, 2 * BAND + 1, TAP_BLOCK):
            t = tap + lane
            inside = t <= 2 * BAND
            phi = tl.load(grid.tables + TAPS + t, mask=inside, other=0.0)[None, :]
            at = n[:, None] + t[None, :]
            mask = (n < nodes)[:, None] & inside[None, :]
            total += tl.sum(tl.load(grid.mass + at, mask=mask, other=0.0) * phi, axis=1)
        tl.store(grid.density + n, total, mask=n < nodes)


@triton.jit
def cubics(grid, cells, BAND: tl.constexpr, INTEGRATE: tl.constexpr):
    """Node densities to the cubic of every cell.

    INTEGRATE: also the constant that makes the cubic's integral the rank function. It starts from its
    value at the row's lower end, which depends on the first band alone.
    """
    lane = tl.arange(0, NODES)
    rank = tl.full((), 0.0, tl.float64)
    if INTEGRATE:
        i = tl.arange(0, EDGE_TAPS)
        inside = i < cells + NODES - 1 + BAND
        mass = tl.load(grid.mass + BAND + i, mask=inside, other=0.0)
        rank += tl.sum((mass * tl.load(grid.tables + EDGE + i)).to(tl.float64), axis=0)
    for first in range(0, cells, NODE_BLOCK):
        c = first + tl.arange(0, NODE_BLOCK)
        valid = c < cells
        density = tl.load(grid.density + c[:, None] + lane[None, :], mask=valid[:, None], other=0.0)
        for a in tl.static_range(TERMS):
            weight = tl.load(grid.tables + GATHER + a * NODES + lane)[None, :]
            tl.store(grid.cubic + c * TERMS + a, tl.sum(density * weight, axis=1), mask=valid)
        if INTEGRATE:
            gain = tl.sum(density * tl.load(grid.tables + INTEGRAL + lane)[None, :], axis=1)
            half = tl.sum(density * tl.load(grid.tables + HALF + lane)[None, :], axis=1)
            gain = gain.to(tl.float64)
            level = rank + (tl.cumsum(gain, axis=0) - gain) + half.to(tl.float64)
            tl.store(grid.level + c, level.to(tl.float32), mask=valid)
            rank += tl.sum(gain, axis=0)


@triton.jit
def density_function(grid, cells, RELAXATION: tl.constexpr, INTEGRATE: tl.constexpr):
    """From moments, all spread, to what `gather` and, with INTEGRATE, `gather_rank` read."""
    BAND: tl.constexpr = of_relaxation(BANDS, RELAXATION)
    tl.debug_barrier()
    masses(grid, cells, BAND)
    tl.debug_barrier()
    convolve(grid, cells, BAND)
    tl.debug_barrier()
    cubics(grid, cells, BAND, INTEGRATE)
    tl.debug_barrier()


@triton.jit
def gather(grid, cell, u, valid):
    """The density at the points."""
    at = cell[:, None] * TERMS + tl.arange(0, TERMS)[None, :]
    cubic = tl.load(grid.cubic + at, mask=valid[:, None], other=0.0)
    return tl.sum(cubic * powers(u), axis=1)


@triton.jit
def gather_rank(grid, cell, u, valid, RELAXATION: tl.constexpr):
    """The rank function and the density at the points."""
    INVERSE_STEP: tl.constexpr = of_relaxation(INVERSE_STEPS, RELAXATION)
    term = tl.arange(0, TERMS)[None, :]
    cubic = tl.load(grid.cubic + cell[:, None] * TERMS + term, mask=valid[:, None], other=0.0)
    values = cubic * powers(u)
    share = 1.0 / ((term + 1).to(tl.float32) * INVERSE_STEP)
    level = tl.load(grid.level + cell, mask=valid, other=0.0)
    return level + u * tl.sum(values * share, axis=1), tl.sum(values, axis=1)
