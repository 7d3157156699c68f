"""The stencil that the compiler computes, against one from numpy's polynomials in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.polynomial import Chebyshev, Polynomial
from tables import formula_tables

from pc_kernels.backends import located

NODES, TERMS = 8, 4
POINTS = np.arange(NODES) - (NODES - 1) / 2


def economised_lagrange() -> np.ndarray:
    """[terms][nodes]: Lagrange polynomials of the nodes, their Chebyshev series on [−½, ½] cut."""
    columns = []
    for n, node in enumerate(POINTS):
        others = np.delete(POINTS, n)
        lagrange = Polynomial.fromroots(others) / np.prod(node - others)
        series = lagrange.convert(kind=Chebyshev, domain=[-0.5, 0.5], window=[-1, 1])
        cut = Chebyshev(series.coef[:TERMS], domain=[-0.5, 0.5], window=[-1, 1])
        columns.append(cut.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef)
    return np.array(columns).T


@pytest.fixture(scope="module")
def stencil() -> np.ndarray:
    return np.array(formula_tables().stencil())


def test_weights(stencil: np.ndarray) -> None:
    """Rounded once, from double: half a unit in the last place of a float."""
    wanted = economised_lagrange()
    assert stencil.shape == (TERMS, NODES)
    assert np.all(np.abs(stencil - wanted) <= 2.0**-24 * np.abs(wanted) + 1e-15)


def test_cubics_are_reproduced(stencil: np.ndarray) -> None:
    """Whatever is a cubic on the nodes comes back as that cubic: mass and moments are kept."""
    for degree in range(TERMS):
        coefficients = stencil @ POINTS**degree
        wanted = np.eye(TERMS)[degree]
        magnitude = np.abs(stencil) @ np.abs(POINTS) ** degree
        assert np.all(np.abs(coefficients - wanted) <= 2.0**-23 * magnitude)


@pytest.mark.parametrize("count", [8, 16])
def test_lagrange_weights_of_the_torch_backend(count: int) -> None:
    """Exact on polynomials of every degree that the nodes determine."""
    nodes = torch.arange(count, dtype=torch.float64) - (count - 1) / 2
    place = torch.linspace(-0.5, 0.5, 41, dtype=torch.float64)
    weights = torch.stack(located.lagrange_weights(place, count))
    for degree in range(count):
        got = (weights * nodes[:, None] ** degree).sum(0)
        magnitude = (weights.abs() * nodes.abs()[:, None] ** degree).sum(0)
        assert ((got - place**degree).abs() <= 1e-13 * magnitude).all()
