"""The constants of the grid method as one small tensor on the device: stencil and taps.

The maths is csrc/formulas.h and docs/method.md, "The stencil"; computed here in float64.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial import chebyshev, polynomial
from torch import Tensor

NODES = 8
TERMS = 4
LEFT_NODE = NODES // 2 - 1
"""The node at a cell's left edge is this many after the cell's first node."""

INVERSE_STEP = {"logistic": 4, "normal": 6}
SUPPORT = {"logistic": 17, "normal": 6}

# Where each table starts in the tensor.
SPREAD, GATHER, INTEGRAL, HALF, EDGE, TAPS = 0, 32, 64, 72, 80, 208
EDGE_TAPS = 128
"""Φ seen from the row's lower end, from a band below it to the stencil's end above it, padded with 0."""

# Room beyond the cells, in multiples of 16: a stencil and two bands, and a stencil.
MASS_PAD, DENSITY_PAD = 144, 16


def band(relaxation: str) -> int:
    """Nodes on either side that a node's convolution needs."""
    return INVERSE_STEP[relaxation] * SUPPORT[relaxation]


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


def _cdf(x: float, relaxation: str) -> float:
    return 1 / (1 + math.exp(-x)) if relaxation == "logistic" else math.erfc(-x / 2**0.5) / 2


def _pdf(x: float, relaxation: str) -> float:
    if relaxation == "logistic":
        return _cdf(x, relaxation) * _cdf(-x, relaxation)
    return math.exp(-x * x / 2) / (2 * math.pi) ** 0.5


@lru_cache(maxsize=16)
def tables(relaxation: str, device: torch.device) -> Tensor:
    """All of them, float32, kept for the device."""
    weights, integrals = stencil()
    step, width = 1 / INVERSE_STEP[relaxation], band(relaxation)
    values = np.zeros(TAPS + 2 * width + 1)
    # A node collects from the moments of the cells n - NODES + 1 ... n, as they lie in memory.
    values[SPREAD:GATHER] = weights.T[::-1].ravel()
    values[GATHER:INTEGRAL] = weights.ravel()
    values[INTEGRAL:HALF] = step * integrals
    # Of the cubic, from the cell's left edge to its middle.
    values[HALF:EDGE] = step * np.array([1 / 2, -1 / 8, 1 / 24, -1 / 64]) @ weights
    for n in range(width + NODES):
        values[EDGE + n] = _cdf((LEFT_NODE - n) * step, relaxation)
    for n in range(2 * width + 1):
        values[TAPS + n] = _pdf((n - width) * step, relaxation)
    return torch.tensor(values, dtype=torch.float32, device=device)
