"""Soft sorting and soft top-k, by projection onto a permutahedron.

Blondel, Teboul, Berthet and Djolonga, "Fast differentiable sorting and ranking", ICML 2020. The soft
ranks of the same kind are `soft_rank(x, relaxation="projection")`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops  # noqa: F401 - registers the operators
from .backends.located import in_double
from .backends.projected import project
from .checks import check_positive, one_of
from .ranks import check_values

REGULARIZATIONS = ("l2", "kl")


class SoftTopK(NamedTuple):
    """What `soft_topk` returns."""

    values: Tensor
    """[..., k]: the k largest values, softly, the largest first."""
    mask: Tensor
    """[..., m]: how far each value is among the k largest, in [0, 1]; the sum is k."""


def soft_sort(
    x: Tensor,
    temperature: float = 0.1,
    regularization: str = "l2",
    descending: bool = False,
    dim: int = -1,
    backend: str = "auto",
) -> Tensor:
    """Differentiable sorting: the projection of (m, …, 1)/ε onto the permutahedron of x.

    Neighbours in order that are further apart than 1/ε are drawn together; as ε → 0 nothing is left of it
    but the sorted values. O(m log m) a row, with gradients.

    Args:
        x: values, of any shape; sorted along `dim`.
        temperature: ε, the strength of regularisation, in units of 1/x. > 0.
        regularization: "l2": of the smallest Euclidean distance; "kl": of exponentials, by the
            Kullback-Leibler divergence.
        descending: the largest first.
        dim: the dimension to sort along.
        backend: see `python -m pc_kernels.info`.

    Returns:
        Of the shape and dtype of x. A row with a NaN or an infinity is NaN.

    Raises:
        TypeError, ValueError: an argument is not what is said here, or the backend is not usable.
    """
    check_values(x, dim, backend)
    epsilon = check_positive("temperature", temperature)
    one_of("regularization", regularization, REGULARIZATIONS)
    one_of("descending", descending, (False, True))
    sign = 1 if descending else -1
    rows, finite = _finite_rows(x, dim)
    w = (sign * rows).sort(dim=-1, descending=True).values
    places = torch.arange(w.shape[-1], 0, -1, dtype=w.dtype, device=w.device)
    projected = _projected((places / epsilon).expand_as(w), w, regularization == "kl", backend)
    sorted_rows = torch.where(finite, sign * projected, torch.nan)
    return sorted_rows.to(x.dtype).movedim(-1, dim)


def soft_topk(
    x: Tensor, k: int, temperature: float = 0.1, dim: int = -1, backend: str = "auto"
) -> SoftTopK:
    """Differentiable top-k: which values are among the k largest, and these values.

    The mask is the projection of x/ε onto the vectors in [0, 1] with the sum k, exact where the k-th
    value is ε above the next; the values are the first of `soft_sort(x, ε, descending=True)`.
    O(m log m) a row, with gradients.

    Args:
        x: values, of any shape; chosen from along `dim`, of length m.
        k: how many, from 0 to m.
        temperature: ε, the strength of regularisation: in units of x for the mask, of 1/x for the
            values. > 0.
        dim: the dimension to choose along.
        backend: see `python -m pc_kernels.info`.

    Returns:
        Values and mask, in the dtype of x. A row with a NaN or an infinity is NaN.

    Raises:
        TypeError, ValueError: an argument is not what is said here, or the backend is not usable.
    """
    check_values(x, dim, backend)
    epsilon = check_positive("temperature", temperature)
    count = x.shape[dim]
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int; got {type(k).__name__}")
    if not 0 <= k <= count:
        raise ValueError(f"k must be in [0, {count}] for shape {tuple(x.shape)}; got {k}")
    rows, finite = _finite_rows(x, dim)
    s, order = (rows / epsilon).sort(dim=-1, descending=True)
    chosen = (torch.arange(count, device=s.device) < k).to(s.dtype).expand_as(s)
    mask = _projected(s, chosen, False, backend)
    mask = torch.zeros_like(mask).scatter(-1, order, mask)
    mask = torch.where(finite, mask, torch.nan).to(x.dtype).movedim(-1, dim)
    values = soft_sort(x, epsilon, descending=True, dim=dim, backend=backend)
    return SoftTopK(values.narrow(dim, 0, k), mask)


def _finite_rows(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The rows along `dim` in float64, 0 where one is not finite, and which are [..., 1]."""
    rows = in_double(x.movedim(dim, -1))
    finite = rows.isfinite().all(-1, keepdim=True)
    return torch.where(finite, rows, 0), finite


def _projected(s: Tensor, w: Tensor, kl: bool, backend: str) -> Tensor:
    """The projection of s onto the permutahedron of w, [..., m], both descending; differentiable."""
    shape = -1 if s.numel() else 0, max(s.shape[-1], 1)
    rows, weights = s.reshape(shape), w.reshape(shape)
    blocks = torch.ops.pc_kernels.isotonic_blocks(rows.detach(), weights.detach(), kl, backend)
    return project(rows, weights, blocks, kl).reshape(s.shape)
