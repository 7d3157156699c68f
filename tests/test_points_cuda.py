"""The CUDA kernels on points, on the CPU (tests/cuda_shim): near the origin, and pulled by each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import points
import pytest
import tolerances
import torch
from compare import assert_near, check_near_origin
from inputs import POINTS, two_clumps
from launches import OF_OPERATORS
from shim import ShimBackend
from torch import Generator, Tensor

from pc_kernels.dissimilarities.row_maker import pull_by_differences
from pc_kernels.products import Products

DEVICES: dict[str, dict[str, int]] = {
    "narrow warps": {"threads": 16, "warp": 8, "side_by_side": 3},
    "whole warps": {"threads": 64, "warp": 32},
}


@pytest.fixture(params=["narrow warps"])
def maker(request: pytest.FixtureRequest) -> ShimBackend:
    """The kernels on a device of DEVICES."""
    return ShimBackend(**DEVICES[request.param])


on_every_device = pytest.mark.parametrize("maker", DEVICES, indirect=True)


@on_every_device
@pytest.mark.parametrize("name", POINTS)
def test_as_pytorch_does(maker: ShimBackend, name: str, rng: Generator) -> None:
    for rows in (2, 150):
        given = POINTS[name](rng, rows)
        check_near_origin(maker, [given])
        check_near_origin(maker, [POINTS[name](rng, 7), given])
        first, again = (maker.near_origin([given]) for _ in range(2))
        for a, b in zip(first[:2], again[:2], strict=True):
            assert all(
                torch.equal(x.nan_to_num(9), y.nan_to_num(9)) for x, y in zip(a, b, strict=True)
            )


@pytest.mark.parametrize("shapes", [(0, 0), (0, 4), (4, 0)])
def test_nothing_to_look_at(maker: ShimBackend, shapes: tuple[int, int]) -> None:
    points.check_nothing_to_look_at(maker, shapes)


@pytest.mark.parametrize("count", [1, 2, 1025])
def test_who_is_far(maker: ShimBackend, count: int, rng: Generator) -> None:
    points.check_who_is_far(maker, count, rng)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shifted_features_stay_whole_in_their_parts(
    maker: ShimBackend, dtype: torch.dtype, rng: Generator
) -> None:
    points.check_parts_stay_whole(maker, dtype, rng)


def test_quarantine(maker: ShimBackend, rng: Generator) -> None:
    points.check_quarantine(maker, rng)


def test_normalized(maker: ShimBackend, rng: Generator) -> None:
    points.check_normalized(maker, rng)


def pulls(rng: Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Weights, points and references: few, many, as they lie and turned."""
    for n, m, width in ((1, 1, 1), (0, 5, 3), (5, 0, 3), (30, 40, 5), (33, 70, 37), (5, 300, 1)):
        x, y = torch.randn(n, width, generator=rng), torch.randn(m, width, generator=rng)
        yield torch.randn(n, m, generator=rng), x, y
        yield torch.randn(m, n, generator=rng).T, x, y


@on_every_device
@pytest.mark.parametrize("parts", [0, 3])
def test_pull(maker: ShimBackend, parts: int, rng: Generator) -> None:
    """Σ_j v_ij (x_i − y_j), to the roundings of its terms (docs/method.md, "Distances")."""
    for v, x, y in pulls(rng):
        got = maker.pull(v, x, y, Products("bf16x6", 3) if parts else Products())
        wide = v.double(), x.double(), y.double()
        terms = wide[0].abs().sum(1, keepdim=True) * wide[1].abs() + wide[0].abs() @ wide[2].abs()
        roundings = (8 if parts else 4) + v.shape[1] ** 0.5
        assert_near("pull", got, pull_by_differences(*wide), roundings * tolerances.U * terms)


def test_what_cancels_is_summed_from_differences(maker: ShimBackend, rng: Generator) -> None:
    """Of a clump far from the origin; a row that does not cancel, and one of NaN, are left."""
    x = two_clumps(rng, 60, 9, 40)
    v = torch.randn(60, 60, generator=rng)
    v[:40, 40:] = v[40:, :40] = 0  # the clumps do not pull at each other
    x[50] = torch.nan
    v[:50, 50] = v[51:, 50] = 0
    finite = torch.arange(60) != 50
    for weights in (v, v.T.contiguous().T):
        got = maker.pull(weights, x.nan_to_num(0), x.nan_to_num(0))[finite]
        wanted = pull_by_differences(v.double(), x.double().nan_to_num(0), x.double().nan_to_num(0))
        assert (got - wanted[finite]).norm() <= 1e-6 * wanted[finite].norm()
    assert maker.pull(v, x, x.nan_to_num(0))[50].isnan().all()


def test_what_operators_launch(maker: ShimBackend, rng: Generator) -> None:
    """As `benchmarks/launches.py` counts them."""
    x, launched = torch.randn(40, 9, generator=rng), maker.library.launches
    calls: dict[str, Callable[[], object]] = {
        "near_origin": lambda: maker.near_origin([x, x[:7]]),
        "quarantine": lambda: maker.quarantine(x),
        "scaled": lambda: maker.normalized(x),
        "scaled_backward": lambda: maker.normalized_backward(x, x, torch.ones(40, 1).double()),
        "pull_": lambda: maker.pull(torch.randn(40, 40, generator=rng), x, x),
    }
    for stage, call in calls.items():
        before = launched()
        call()
        assert launched() - before == OF_OPERATORS[stage]
