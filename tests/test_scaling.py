"""Features over their norms: the CPU's one pass, and PyTorch's operators, against float64."""

from __future__ import annotations

import pytest
import torch
from compare import own_leaf
from torch import Generator, Tensor

from pc_kernels.backends import extension_obstacle
from pc_kernels.losses import scaling

NEAR = 4 * 2.0**-24
"""A rounding of the factor's, and of each of three multiplications."""


@pytest.fixture(params=["operator", "PyTorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "PyTorch":
        monkeypatch.setattr(scaling, "_has_operator", lambda x: False)
    elif extension_obstacle() is not None:
        pytest.skip(str(extension_obstacle()))
    return request.param


def results(x: Tensor, s: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaf, scale = own_leaf(x), own_leaf(s)
    y = scaling.scaled(leaf, scale)
    return y.detach(), *torch.autograd.grad(y, [leaf, scale], upstream)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 2), (5, 8), (70, 37)])
def test_values_and_gradients(way: str, shape: tuple[int, int], rng: Generator) -> None:
    """Of any magnitude, and of rows that are no contiguous memory."""
    wide = torch.randn(shape[1], shape[0], generator=rng, dtype=torch.float64).T
    upstream, s = torch.randn(*shape, generator=rng), torch.tensor(14.0, dtype=torch.float64)
    for magnitude in (1.0, 1e-30, 1e30):
        x = (wide * magnitude).float()
        y, to_x, to_s = results(x, s, upstream)
        wanted = results(x.double(), s, upstream.double())
        assert torch.allclose(y.double(), wanted[0], rtol=NEAR, atol=0)
        sizes = upstream.norm(dim=1, keepdim=True) * (14 / x.double().norm(dim=1, keepdim=True))
        assert ((to_x - wanted[1]).abs() <= NEAR * sizes).all()
        assert (to_s - wanted[2]).abs() <= NEAR * upstream.norm(dim=1).sum() + 1e-30


def test_zeros_and_what_is_not_finite(way: str) -> None:
    """A row of zeros stays one, without a gradient; one that is not finite spreads to no other."""
    x = torch.ones(4, 3)
    x[1] = 0
    x[2, 1], x[3, 0] = torch.nan, torch.inf
    y, to_x, _ = results(x, torch.tensor(2.0, dtype=torch.float64), torch.ones(4, 3))
    assert (y[1] == 0).all() and (to_x[1] == 0).all()
    assert y[2:].isnan().any(1).all() and y[:2].isfinite().all() and to_x[:2].isfinite().all()
