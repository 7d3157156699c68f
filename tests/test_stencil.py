"""The stencil that the compiler computes, against one from numpy's polynomials in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.polynomial import Chebyshev, Polynomial
from tables import formula_tables

from pc_kernels.backends import located
from pc_kernels.formulas import RELAXATIONS

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


def test_torch_backend(stencil: np.ndarray) -> None:
    """The same in float32, and in float64 what is a polynomial of its terms comes back as that."""
    for name in ("logistic", "normal"):
        single, double = (
            RELAXATIONS[name].grid(torch.float32),
            RELAXATIONS[name].grid(torch.float64),
        )
        own = located.stencil_of(single, torch.float32, torch.device("cpu")).numpy()
        assert np.all(np.abs(own - stencil) <= 2.0**-23 * np.abs(stencil) + 1e-15)
        own = located.stencil_of(double, torch.float64, torch.device("cpu")).numpy()
        nodes = np.arange(double.stencil) - (double.stencil - 1) / 2
        for degree in range(double.terms):
            magnitude = np.abs(own) @ np.abs(nodes) ** degree
            wanted = np.eye(double.terms)[degree]
            assert np.all(np.abs(own @ nodes**degree - wanted) <= 1e-13 * magnitude)
