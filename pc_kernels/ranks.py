"""Stage `rank`, standing alone: differentiable soft ranks, and hard mid-ranks, along any dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops  # noqa: F401 - registers the operators
from .backends import BACKENDS, check_usable
from .checks import check_floating, one_of
from .recipe import Recipe


def check_values(x: Tensor, dim: int, backend: str) -> None:
    """Checks values to be ranked along `dim`, and the backend."""
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension; got a scalar")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int; got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"dim must be in [{-x.dim()}, {x.dim() - 1}] for shape {tuple(x.shape)}; got {dim}"
        )
    one_of("backend", backend, ("auto", *BACKENDS))
    check_usable(backend, x)


def _matrix(rows: Tensor) -> Tensor:
    """Rows of any batch shape as a matrix; an empty tensor as no rows."""
    return rows.reshape(-1 if rows.numel() else 0, max(rows.shape[-1], 1))


def soft_rank(
    x: Tensor,
    temperature: float = 0.1,
    relaxation: str = "logistic",
    scale: str | None = None,
    dim: int = -1,
    backend: str = "auto",
) -> Tensor:
    """Differentiable ranks in [0, 1]: r(j) = Σ_{k≠j} Φ((x_j − x_k)/τ) / (m − 1).

    O(m) a row, exact to rounding at every temperature.

    Args:
        x: values, of any shape; ranked along `dim`, of length m.
        temperature: τ, in units of x, or of its standard deviation under scale "std". > 0.
        relaxation: Φ: a row of `pc_kernels.formulas.RELAXATIONS`, "logistic" by default. Or, without a
            Φ, one of `pc_kernels.formulas.PROJECTIONS`: the projection onto the permutahedron of
            Blondel et al. (ICML 2020), scaled to [0, 1], with ε = τ/(m − 1) for "projection" and
            ε = τ for "projection_kl", in O(m log m).
        scale: "std": τ = temperature · σ, σ the population standard deviation of the m values, with
            the gradient through it; equal values all have rank ½ and no gradient.
            None: τ = temperature.
        dim: the dimension to rank along.
        backend: see `python -m pc_kernels.info`.

    Returns:
        Ranks, of the shape and dtype of x. m = 1 gives ½; a row with a NaN or an infinity is NaN.

    Raises:
        TypeError, ValueError: an argument is not what is said here, or the backend is not usable.
    """
    check_values(x, dim, backend)
    recipe = Recipe(relaxation=relaxation, temperature=temperature, scale=scale, backend=backend)
    rows = x.movedim(dim, -1)
    rank, _ = torch.ops.pc_kernels.soft_rank(
        _matrix(rows),
        recipe.temperature,
        relaxation,
        scale,
        backend,
        torch.is_grad_enabled() and x.requires_grad,
    )
    return rank.reshape(rows.shape).movedim(-1, dim)


def hard_rank(x: Tensor, dim: int = -1, backend: str = "auto") -> Tensor:
    """Mid-ranks in [0, 1]: r(j) = (#{k≠j: x_k < x_j} + ½ #{k≠j: x_k = x_j}) / (m − 1). No gradient.

    Args:
        x: values, of any shape; ranked along `dim`, of length m.
        dim: the dimension to rank along.
        backend: see `python -m pc_kernels.info`.

    Returns:
        Ranks, of the shape and dtype of x. m = 1 gives ½; a row with a NaN is NaN.

    Raises:
        TypeError, ValueError: an argument is not what is said here, or the backend is not usable.
    """
    check_values(x, dim, backend)
    rows = x.detach().movedim(dim, -1)
    rank = torch.ops.pc_kernels.hard_rank(_matrix(rows), backend)
    return rank.reshape(rows.shape).movedim(-1, dim)
