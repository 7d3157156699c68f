"""The grid method inside a kernel: spread, convolve, integrate, gather (docs/method.md, Eq. 4).

One program works on one row at a time, in scratch memory of its own. Threads exchange data only
through that memory, with a barrier between writing and reading; what atomics have written is read past
the first-level cache (".cg"), which does not see them.
"""

import triton
import triton.language as tl

from . import tables
from .formulas import LOGISTIC

NODES = tl.constexpr(tables.NODES)
TERMS = tl.constexpr(tables.TERMS)
SPREAD = tl.constexpr(tables.SPREAD)
GATHER = tl.constexpr(tables.GATHER)
INTEGRAL = tl.constexpr(tables.INTEGRAL)
HALF = tl.constexpr(tables.HALF)
EDGE = tl.constexpr(tables.EDGE)
EDGE_TAPS = tl.constexpr(tables.EDGE_TAPS)
TAPS = tl.constexpr(tables.TAPS)

FIXED = tl.constexpr(float(1 << 36))
"""Moments are whole multiples of 1/FIXED: integers add up the same in any order, and exactly."""

TAP_BLOCK = tl.constexpr(16)

NODE_BLOCK = tl.constexpr(128)
"""Nodes, or cells, at a time."""

LOGISTIC_BAND = tl.constexpr(tables.band("logistic"))
NORMAL_BAND = tl.constexpr(tables.band("normal"))

MASS_PAD = tl.constexpr(tables.MASS_PAD)
DENSITY_PAD = tl.constexpr(tables.DENSITY_PAD)


@triton.jit
def scratch(floats_ptr, stride, capacity):
    """Where this program keeps masses, densities, cubics and levels; and what comes behind them."""
    mass_ptr = floats_ptr + tl.cast(tl.program_id(0), tl.int64) * stride
    density_ptr = mass_ptr + capacity + MASS_PAD
    cubic_ptr = density_ptr + capacity + DENSITY_PAD
    level_ptr = cubic_ptr + capacity * TERMS
    return mass_ptr, density_ptr, cubic_ptr, level_ptr, level_ptr + capacity


@triton.jit
def place(x, low, inverse_step):
    """The cell of each point and its place in the cell, u in [−½, ½].

    In float64: a small value beside a large one has digits that their float32 difference has not.
    """
    t = (x.to(tl.float64) - low) * inverse_step
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
def clear(moments_ptr, cells, BLOCK: tl.constexpr):
    """Zero moments."""
    lane = tl.arange(0, BLOCK)
    for first in range(0, cells * TERMS, BLOCK):
        i = first + lane
        tl.store(moments_ptr + i, tl.zeros([BLOCK], tl.int64), mask=i < cells * TERMS)


@triton.jit
def spread(moments_ptr, cell, u, weight, valid):
    """Adds the points' weight · (1, u, u², u³) to the moments of their cells; |weight| ≤ 2."""
    amount = (powers(u) * weight[:, None]).to(tl.float64) * FIXED
    at = cell[:, None] * TERMS + tl.arange(0, TERMS)[None, :]
    mask = valid[:, None] & (at >= 0)
    tl.atomic_add(moments_ptr + at, amount.to(tl.int64), mask=mask, sem="relaxed")


@triton.jit
def masses(moments_ptr, mass_ptr, tables_ptr, cells, BAND: tl.constexpr):
    """Cell moments to weights on the nodes, with a band of zeros on both sides.

    A node collects from the cells n − NODES + 1 … n, whose moments lie side by side.
    """
    WIDTH: tl.constexpr = NODES * TERMS
    lane = tl.arange(0, WIDTH)
    weight = tl.load(tables_ptr + SPREAD + lane)[None, :]
    padded = cells + NODES - 1 + 2 * BAND
    for first in range(0, padded, NODE_BLOCK):
        i = first + tl.arange(0, NODE_BLOCK)
        at = (i - BAND - (NODES - 1))[:, None] * TERMS + lane[None, :]
        inside = (at >= 0) & (at < cells * TERMS)
        moment = tl.load(moments_ptr + at, mask=inside, other=0, cache_modifier=".cg")
        value = (moment.to(tl.float64) * (1.0 / FIXED)).to(tl.float32)
        tl.store(mass_ptr + i, tl.sum(value * weight, axis=1), mask=i < padded)


@triton.jit
def convolve(mass_ptr, density_ptr, tables_ptr, cells, BAND: tl.constexpr):
    """Density at the nodes: masses convolved with φ."""
    lane = tl.arange(0, TAP_BLOCK)
    nodes = cells + NODES - 1
    for first in range(0, nodes, NODE_BLOCK):
        n = first + tl.arange(0, NODE_BLOCK)
        total = tl.zeros([NODE_BLOCK], tl.float32)
        for tap in range(0, 2 * BAND + 1, TAP_BLOCK):
            t = tap + lane
            inside = t <= 2 * BAND
            phi = tl.load(tables_ptr + TAPS + t, mask=inside, other=0.0)[None, :]
            at = n[:, None] + t[None, :]
            mask = (n < nodes)[:, None] & inside[None, :]
            total += tl.sum(tl.load(mass_ptr + at, mask=mask, other=0.0) * phi, axis=1)
        tl.store(density_ptr + n, total, mask=n < nodes)


@triton.jit
def cubics(
    mass_ptr,
    density_ptr,
    cubic_ptr,
    level_ptr,
    tables_ptr,
    cells,
    BAND: tl.constexpr,
    INTEGRATE: tl.constexpr,
):
    """Node densities to the cubic of every cell.

    INTEGRATE: also the constant that makes the cubic's integral the rank function. It starts from its
    value at the row's lower end, where only the first band has a say.
    """
    lane = tl.arange(0, NODES)
    rank = tl.full((), 0.0, tl.float64)
    if INTEGRATE:
        i = tl.arange(0, EDGE_TAPS)
        inside = i < cells + NODES - 1 + BAND
        mass = tl.load(mass_ptr + BAND + i, mask=inside, other=0.0)
        rank += tl.sum((mass * tl.load(tables_ptr + EDGE + i)).to(tl.float64), axis=0)
    for first in range(0, cells, NODE_BLOCK):
        c = first + tl.arange(0, NODE_BLOCK)
        valid = c < cells
        density = tl.load(density_ptr + c[:, None] + lane[None, :], mask=valid[:, None], other=0.0)
        for a in tl.static_range(TERMS):
            weight = tl.load(tables_ptr + GATHER + a * NODES + lane)[None, :]
            tl.store(cubic_ptr + c * TERMS + a, tl.sum(density * weight, axis=1), mask=valid)
        if INTEGRATE:
            gain = tl.sum(density * tl.load(tables_ptr + INTEGRAL + lane)[None, :], axis=1)
            half = tl.sum(density * tl.load(tables_ptr + HALF + lane)[None, :], axis=1)
            gain = gain.to(tl.float64)
            level = rank + (tl.cumsum(gain, axis=0) - gain) + half.to(tl.float64)
            tl.store(level_ptr + c, level.to(tl.float32), mask=valid)
            rank += tl.sum(gain, axis=0)


@triton.jit
def density_function(
    moments_ptr,
    mass_ptr,
    density_ptr,
    cubic_ptr,
    level_ptr,
    tables_ptr,
    cells,
    RELAXATION: tl.constexpr,
    INTEGRATE: tl.constexpr,
):
    """From moments, all spread, to what `gather` and, with INTEGRATE, `gather_rank` read."""
    BAND: tl.constexpr = LOGISTIC_BAND if RELAXATION == LOGISTIC else NORMAL_BAND
    tl.debug_barrier()
    masses(moments_ptr, mass_ptr, tables_ptr, cells, BAND)
    tl.debug_barrier()
    convolve(mass_ptr, density_ptr, tables_ptr, cells, BAND)
    tl.debug_barrier()
    cubics(mass_ptr, density_ptr, cubic_ptr, level_ptr, tables_ptr, cells, BAND, INTEGRATE)
    tl.debug_barrier()


@triton.jit
def gather(cubic_ptr, cell, u, valid):
    """The density at the points."""
    at = cell[:, None] * TERMS + tl.arange(0, TERMS)[None, :]
    cubic = tl.load(cubic_ptr + at, mask=valid[:, None], other=0.0)
    return tl.sum(cubic * powers(u), axis=1)


@triton.jit
def gather_rank(cubic_ptr, level_ptr, cell, u, valid, INVERSE_STEP: tl.constexpr):
    """The rank function and the density at the points."""
    term = tl.arange(0, TERMS)[None, :]
    cubic = tl.load(cubic_ptr + cell[:, None] * TERMS + term, mask=valid[:, None], other=0.0)
    values = cubic * powers(u)
    share = 1.0 / ((term + 1).to(tl.float32) * INVERSE_STEP)
    level = tl.load(level_ptr + cell, mask=valid, other=0.0)
    return level + u * tl.sum(values * share, axis=1), tl.sum(values, axis=1)
