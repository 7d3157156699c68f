"""Features brought near the origin by Triton's kernels, in the interpreter.

`test_points_triton.py` runs this file. By hand:
TRITON_INTERPRET=1 python -m pytest tests/points_interpreted.py
"""

from __future__ import annotations

import points
import pytest
import tolerances
import torch
from compare import assert_norm_near, check_near_origin
from inputs import POINTS
from launches import OF_OPERATORS
from torch import Generator
from triton.runtime.interpreter import GridExecutor

from pc_kernels.backends import BACKENDS
from pc_kernels.dissimilarities.row_maker import CANCELLED

TRITON = BACKENDS["triton"]


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("name", POINTS)
def test_as_pytorch_does(name: str, rows: int, rng: Generator) -> None:
    given = [POINTS[name](rng, rows)]
    check_near_origin(TRITON, given if rows > 2 else [POINTS[name](rng, 7), *given])


@pytest.mark.parametrize("shapes", [(0, 0), (0, 4), (4, 0)])
def test_nothing_to_look_at(shapes: tuple[int, int]) -> None:
    points.check_nothing_to_look_at(TRITON, shapes)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_gradients_that_cancel(spread: float, turned: bool, rng: Generator) -> None:
    """Clumps far from the origin pull at their own as exactly as if they were there."""
    count, width = 45, 130
    centres = 10 * torch.randn(4, width, generator=rng)
    x, y = (
        centres[torch.arange(n) % 4] + spread * torch.randn(n, width, generator=rng)
        for n in (37, count)
    )
    own = torch.arange(37)[:, None] % 4 == torch.arange(count) % 4
    v = torch.where(own, torch.randn(37, count, generator=rng), 0.0)
    v[0] = torch.randn(count, generator=rng)  # a row in which nothing cancels
    v = v.T.contiguous().T if turned else v
    terms = v[:, :, None].double() * (x[:, None].double() - y)
    got = BACKENDS["triton"].pull(v, x, y)
    # One in 1/CANCELLED of a product's digits, and sums of differences in float32.
    rounding = (4 + count**0.5) * tolerances.U
    largest = terms.norm(dim=(1, 2)) / CANCELLED
    assert_norm_near("gradient", got, terms.sum(1), rounding * largest)


def test_quarantine(rng: Generator) -> None:
    points.check_quarantine(TRITON, rng)


def test_normalized(rng: Generator) -> None:
    points.check_normalized(TRITON, rng)


def test_what_operators_launch(rng: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `benchmarks/launches.py` counts them."""
    launched: list[object] = []
    run = GridExecutor.__call__

    def counted(self: GridExecutor, *arguments: object, **options: object) -> None:
        launched.append(self)
        run(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    x, v = torch.randn(33, 9, generator=rng), torch.randn(33, 33, generator=rng)
    for stage, call in {
        "near_origin": lambda: TRITON.near_origin([x, x[:7]]),
        "quarantine": lambda: TRITON.quarantine(x),
        "scaled": lambda: TRITON.normalized(x),
        "scaled_backward": lambda: TRITON.normalized_backward(x, x, torch.ones(33, 1).double()),
        "pull_": lambda: TRITON.pull(v, x, x),
    }.items():
        launched.clear()
        call()
        assert len(launched) == OF_OPERATORS[stage]


def test_ties(rng: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    points.check_ties("triton", rng, monkeypatch)


def test_a_zero_beside_poison(rng: Generator) -> None:
    points.check_a_zero_beside_poison("triton", rng)


def test_features_of_any_size(rng: Generator) -> None:
    points.check_features_of_any_size("triton", rng)


@pytest.mark.parametrize("count", [1, 2, 1025])
def test_who_is_far(count: int, rng: Generator) -> None:
    points.check_who_is_far(TRITON, count, rng)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shifted_features_stay_whole_in_their_parts(dtype: torch.dtype, rng: Generator) -> None:
    points.check_parts_stay_whole(TRITON, dtype, rng)
