"""The tables of formulas are the same in every language, name by name and value by value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tables import formula_tables
from torch import Tensor

from pc_kernels.formulas import HUBER_DELTA, PENALTIES, RELAXATIONS

U32, U64 = 2.0**-24, 2.0**-53
POINTS = torch.cat((torch.linspace(-40, 40, 801, dtype=torch.float64), torch.tensor([-0.0, 1e-9])))
RESIDUALS = torch.cat((torch.linspace(-1, 1, 401), HUBER_DELTA * torch.tensor([-1.0, 0.0, 1.0])))


@pytest.fixture(scope="module")
def csrc_relaxations() -> list[dict[str, Any]]:
    return csrc_table("relaxations", POINTS)


@pytest.fixture(scope="module")
def csrc_penalties() -> list[dict[str, Any]]:
    return csrc_table("penalties", RESIDUALS)


def csrc_table(name: str, points: Tensor) -> list[dict[str, Any]]:
    """A table of csrc/formulas.h with its functions at these points."""
    rows: list[dict[str, Any]] = getattr(formula_tables(), name)(points.tolist())
    return rows


def assert_equal_to_rounding(got: Tensor, wanted: Tensor, roundings: Tensor | float) -> None:
    """Relative, but for numbers too small to be normal."""
    tiny = torch.finfo(torch.float64).tiny
    assert ((got - wanted).abs() <= roundings * wanted.abs() + tiny).all()


def test_csrc_relaxations_have_the_same_rows(csrc_relaxations: list[dict[str, Any]]) -> None:
    described = ("name", "code", "grid")
    grids = {
        name: row.single and (row.single.inverse_step, row.single.support, row.single.reach)
        for name, row in RELAXATIONS.items()
    }
    wanted = [(name, row.code, grids[name]) for name, row in RELAXATIONS.items()]
    assert [tuple(row[field] for field in described) for row in csrc_relaxations] == wanted


def test_csrc_relaxations_have_the_same_values(csrc_relaxations: list[dict[str, Any]]) -> None:
    """Four operations round on either side.

    Φ and its integral are compared in absolute terms, since PyTorch computes the normal Φ from erf; of a
    density, the argument's rounding weighs up to x² in a tail.
    """
    for row in csrc_relaxations:
        mine = RELAXATIONS[row["name"]]
        cdf, pdf = (torch.tensor(row[f], dtype=torch.float64) for f in ("cdf", "pdf"))
        assert ((cdf - mine.cdf(POINTS)).abs() <= 8 * U64).all()
        assert_equal_to_rounding(pdf, mine.pdf(POINTS), (8 + 4 * POINTS.square()) * U64)
        integral = torch.tensor(row["integral"], dtype=torch.float64)
        assert mine.integral is not None
        assert ((integral - mine.integral(POINTS)).abs() <= 16 * U64 * (1 + POINTS.abs())).all()


def test_csrc_penalties_have_the_same_rows(csrc_penalties: list[dict[str, Any]]) -> None:
    wanted = [(row.name, row.code) for row in PENALTIES.values()]
    assert [(row["name"], row["code"]) for row in csrc_penalties] == wanted


def test_csrc_penalties_have_the_same_values(csrc_penalties: list[dict[str, Any]]) -> None:
    """In float32: three operations and the constant round, half of it up to twice in a difference."""
    for row in csrc_penalties:
        mine = PENALTIES[row["name"]]
        for function, formula in (("value", mine.value), ("slope", mine.slope)):
            got = torch.tensor(row[function], dtype=torch.float64)
            assert_equal_to_rounding(got, formula(RESIDUALS.double()), 6 * U32)
