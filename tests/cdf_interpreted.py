"""The smooth CDF by Triton's kernels, in the interpreter.

`test_smooth_cdf_triton.py` runs this file. By hand:
TRITON_INTERPRET=1 python -m pytest tests/cdf_interpreted.py
"""

from __future__ import annotations

import cdf
import pytest
import test_smooth_cdf
import torch
from compare import check_smooth_cdf
from torch import Generator

import pc_kernels
from pc_kernels.triton_kernels import kernel_sums, kernel_sums_launch

ON_GRIDS = 60, 50
"""Sources and queries beyond what all pairs serve, if a cell costs nothing."""


@pytest.fixture
def cheap_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small rows go to grids, too."""
    monkeypatch.setattr(kernel_sums, "PAIRS_PER_CELL", kernel_sums.tl.constexpr(0))


def check_rows(name: str, sizes: tuple[int, int], rng: Generator, temperature: float) -> None:
    x, y = test_smooth_cdf.sources_and_queries(name, rng, 1, *sizes)
    cdf.check_rows("triton", x, y, rng, (temperature,))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (1, 1), (131, 6)])
def test_sizes(sizes: tuple[int, int], rng: Generator) -> None:
    x, y = (torch.randn(2, size, generator=rng) for size in sizes)
    check_smooth_cdf("triton", (x, y, None), rng, temperature=0.2, tail="upper")


def test_rows_on_grids(cheap_cells: None, rng: Generator) -> None:
    check_rows("normal", ON_GRIDS, rng, 0.1)


def test_rows_by_pairs(rng: Generator) -> None:
    check_rows("heavy tails", (37, 21), rng, 0.01)


def test_light_beside_heavy(cheap_cells: None, rng: Generator) -> None:
    cdf.check_light_beside_heavy("triton", ON_GRIDS, rng)


def test_losses(rng: Generator) -> None:
    cdf.check_losses("triton", rng, few=True)


def test_masked_lists(rng: Generator) -> None:
    """In channels, of sums and integrals."""
    x, y = torch.randn(50, generator=rng), torch.randn(30, generator=rng)
    w = torch.randn(2, 50, generator=rng)
    options = {
        "source_offsets": torch.tensor([0, 9, 9, 50]),
        "query_offsets": torch.tensor([0, 8, 10, 30]),
        "source_mask": torch.rand(50, generator=rng) < 0.7,
        "query_mask": torch.rand(30, generator=rng) < 0.7,
    }
    check_smooth_cdf("triton", (x, y, w), rng, temperature=0.2, integral=True, **options)


def test_nan(rng: Generator) -> None:
    test_smooth_cdf.test_only_rows_with_a_nan_or_infinity_are_nan(
        "triton", torch.nan, "weights", rng
    )


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_extreme_temperatures(temperature: float, rng: Generator) -> None:
    x, y = torch.randint(5, (2, 2, 30), generator=rng).float()
    counts = pc_kernels.smooth_cdf(x, y, temperature=temperature, backend="triton")
    below, equal = (y[:, :, None] > x[:, None]).sum(2), (y[:, :, None] == x[:, None]).sum(2)
    assert torch.equal(counts, below + equal / 2 if temperature < 1 else torch.full_like(y, 15.0))


def test_long_rows_go_in_pytorch(monkeypatch: pytest.MonkeyPatch, rng: Generator) -> None:
    monkeypatch.setattr(kernel_sums_launch, "MOST_PAIRS", 1000)
    monkeypatch.setattr(kernel_sums_launch, "kernel_sums", None)
    check_rows("heavy tails", (67, 41), rng, 0.1)
