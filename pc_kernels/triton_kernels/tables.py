"""The constants of the grid method as one small tensor on the device: stencil and taps.

The maths is csrc/formulas.h and docs/method.md, "The stencil"; computed here in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial import chebyshev, polynomial
from torch import Tensor

from ..formulas import RELAXATIONS

NODES = 8
TERMS = 4
LEFT_NODE = NODES // 2 - 1
"""The node at a cell's left edge is this many after the cell's first node."""

FAR = 16
"""Added to a relaxation's code: the same with its reach as support (docs/method.md, "Small counts")."""

NEAR_GRIDS = {
    row.code: row.single
    for row in RELAXATIONS.values()
    if row.single is not None and row.code is not None
}
GRIDS = NEAR_GRIDS | {FAR + code: grid.far for code, grid in NEAR_GRIDS.items()}
INVERSE_STEPS = {code: grid.inverse_step for code, grid in GRIDS.items()}
BANDS = {code: grid.band for code, grid in GRIDS.items()}
assert all(grid.stencil == NODES for grid in GRIDS.values()), "the kernels' stencil has 8 nodes"


def padded(count: int) -> int:
    """The next multiple of 16."""
    return -(-count // 16) * 16


TAP_BLOCK = 16
"""Taps of φ at a time: its table and the masses are padded to whole blocks with 0."""

EDGE_TAPS = {code: 1 << (band + NODES - 1).bit_length() for code, band in BANDS.items()}
"""Φ seen from the row's lower end, from a band below it to the stencil's end above it, padded with 0."""

# Where each table starts in the tensor. With a reach, ∫Φ follows upon Φ.
GATHER, EDGE = 0, 32
TAPS = {code: EDGE + (1 + (code >= FAR)) * taps for code, taps in EDGE_TAPS.items()}

MOST_NODES = 512
"""A block of nodes is no longer: masses are read in whole blocks."""

# Room beyond the cells: a stencil, two bands, a block of taps and one of nodes; a stencil.
MASS_PAD = padded(NODES - 1 + 2 * max(BANDS.values()) + TAP_BLOCK + MOST_NODES)
DENSITY_PAD = padded(NODES - 1)


def stencil() -> tuple[np.ndarray, np.ndarray]:
    """K [TERMS, NODES], and the integrals over the cell [NODES] of the interpolant it cuts short."""
    weights, integrals = np.zeros((TERMS, NODES)), np.zeros(NODES)
    places = np.arange(NODES) - (NODES - 1) / 2
    for n in range(NODES):
        others = np.delete(places, n)
        lagrange = polynomial.polyfromroots(others) / np.prod(places[n] - others)
        area = polynomial.polyint(lagrange)
        integrals[n] = polynomial.polyval(0.5, area) - polynomial.polyval(-0.5, area)
        halves = 0.5 ** np.arange(NODES)  # from u in [-1/2, 1/2] to v in [-1, 1]
        series = chebyshev.poly2cheb(lagrange * halves)[:TERMS]
        weights[:, n] = chebyshev.cheb2poly(series) / halves[:TERMS]
    return weights, integrals


WEIGHTS, AREAS = stencil()

# What kernels know as constants, in steps: the integral over a cell of the whole interpolant, and that of
# the cubic from the cell's left edge to its middle.
INTEGRAL = tuple(map(float, AREAS))
# A node collects from the moments of the cells n - NODES + 1 ... n.
SPREAD = tuple(tuple(map(float, weights)) for weights in WEIGHTS.T[::-1])
HALF = tuple(map(float, np.array([1 / 2, -1 / 8, 1 / 24, -1 / 64]) @ WEIGHTS))


def fitted(f: Callable[[np.ndarray], np.ndarray], low: float) -> tuple[float, ...]:
    """The coefficients of the polynomial of degree 9 through f at the Chebyshev points of [low, 1]."""
    series = chebyshev.Chebyshev.interpolate(f, 9, domain=[low, 1])
    return tuple(map(float, series.convert(kind=polynomial.Polynomial).coef))


def _normal_tail(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances below 0, t = 1/(1 + NORMAL_RATE distance), and Φ exp(z²/2) there."""
    z = (1 / t - 1) / NORMAL_RATE
    return z, torch.special.erfcx(torch.from_numpy(z / np.sqrt(2))).numpy() / 2


# Tails in proportion to themselves: of `normal` Φ = exp(-z²/2) t p(t) and ∫Φ = exp(-z²/2) t² q(t), of
# `logistic` ∫Φ = e p(e), e = exp(z). Polynomials are off by FIT of themselves, in float32.
FIT = 3e-7
NORMAL_RATE = 0.3
_FARTHEST = 1 / (1 + NORMAL_RATE * (RELAXATIONS["normal"].grid(torch.float32).far.support + 1))
NORMAL_CDF = fitted(lambda t: _normal_tail(t)[1] / t, _FARTHEST)
NORMAL_INTEGRAL = fitted(
    lambda t: (1 / np.sqrt(2 * np.pi) - np.multiply(*_normal_tail(t))) / t**2, _FARTHEST
)
LOGISTIC_INTEGRAL = fitted(lambda e: np.log1p(e) / e, 0.0)


@lru_cache(maxsize=16)
def tables(relaxation: str, device: torch.device, far: bool = False) -> Tensor:
    """The larger ones, float32, kept for the device.

    Another thread makes them: while torch.compile warms up a CUDA graph, what this one allocates is the
    graph's, and must not outlive a call.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_tables, relaxation, device, far).result()


def _tables(relaxation: str, device: torch.device, far: bool) -> Tensor:
    row = RELAXATIONS[relaxation]
    assert row.code is not None, f"{relaxation!r} has no kernels"
    code = row.code + FAR * far
    band, step, taps = BANDS[code], 1 / INVERSE_STEPS[code], TAPS[code]
    values = np.zeros(taps + padded(2 * band + 1))
    values[GATHER:EDGE] = WEIGHTS.T.ravel()
    nodes = torch.arange(-band, band + 1, dtype=torch.float64) * step
    edge = torch.arange(LEFT_NODE, LEFT_NODE - band - NODES, -1, dtype=torch.float64) * step
    values[EDGE : EDGE + len(edge)] = row.cdf(edge)
    if far:
        start = EDGE + EDGE_TAPS[code]
        values[start : start + len(edge)] = row.kernel("integral")(edge)
    values[taps : taps + len(nodes)] = row.pdf(nodes)
    return torch.tensor(values, dtype=torch.float32, device=device)
