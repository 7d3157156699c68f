"""The smooth CDF by Triton's kernels, in the interpreter.

`test_smooth_cdf_triton.py` runs this file. By hand:
TRITON_INTERPRET=1 python -m pytest tests/cdf_interpreted.py
"""

from __future__ import annotations

import cdf
import pytest
import test_smooth_cdf
import torch
from torch import Generator

from pc_kernels.triton_kernels import kernel_sums_launch

ON_GRIDS = 150, 120
"""Sources and queries beyond what all pairs serve, if a cell costs nothing."""


@pytest.fixture
def cheap_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small rows go to grids, too."""
    from pc_kernels.triton_kernels import kernel_sums

    monkeypatch.setattr(kernel_sums, "PAIRS_PER_CELL", kernel_sums.tl.constexpr(0))


def test_sizes(rng: Generator) -> None:
    cdf.check_sizes("triton", rng)


@pytest.mark.parametrize(
    "name", ["normal", "outlier of -1e9", "up to the largest number", "three values"]
)
def test_rows_on_grids(name: str, cheap_cells: None, rng: Generator) -> None:
    cdf.check_rows("triton", name, ON_GRIDS, rng)


@pytest.mark.parametrize("name", ["normal", "times 1e-30", "lopsided and huge"])
def test_rows_by_pairs(name: str, rng: Generator) -> None:
    cdf.check_rows("triton", name, (67, 41), rng)
    cdf.check_rows("triton", name, (131, 6), rng)


@pytest.mark.parametrize("sizes", [ON_GRIDS, (300, 4)])
def test_light_beside_heavy(sizes: tuple[int, int], cheap_cells: None, rng: Generator) -> None:
    cdf.check_light_beside_heavy("triton", sizes, rng)


def test_losses(rng: Generator) -> None:
    cdf.check_losses("triton", rng)


def test_masks(rng: Generator) -> None:
    test_smooth_cdf.test_masks("triton", rng)


def test_lists(rng: Generator) -> None:
    test_smooth_cdf.test_lists("triton", True, rng)


@pytest.mark.parametrize("where", ["sources", "queries", "weights"])
def test_nan(where: str, rng: Generator) -> None:
    test_smooth_cdf.test_only_rows_with_a_nan_or_infinity_are_nan("triton", torch.nan, where, rng)


def test_temperatures(rng: Generator) -> None:
    test_smooth_cdf.test_extreme_temperatures("triton", rng)
    test_smooth_cdf.test_temperatures_whose_inverse_leaves_float32("triton", -140, rng)


def test_long_rows_go_in_pytorch(monkeypatch: pytest.MonkeyPatch, rng: Generator) -> None:
    monkeypatch.setattr(kernel_sums_launch, "MOST_PAIRS", 1000)
    cdf.check_rows("triton", "heavy tails", (67, 41), rng)
