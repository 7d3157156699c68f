"""The weighted smooth CDF: soft counts of sources at queries, what smooth ranking losses are made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import ops  # noqa: F401 - registers the operators
from .backends import check_usable
from .cdf_rows import CDF_OPTIONS, CdfKeywords, CdfOptions, CdfRows, check_mask, make_options
from .checks import check_floating, check_same_device
from .recipe import shows_options


@shows_options(CDF_OPTIONS, of=CdfOptions)
def smooth_cdf(
    sources: Tensor,
    queries: Tensor,
    weights: Tensor | None = None,
    **options: Unpack[CdfKeywords],
) -> Tensor:
    """F(y) = Σ_k w_k Φ((y − x_k)/τ): how many sources x lie below each query y, smoothly.

    O(m + n) a row, forward and backward, at every temperature; with gradients to sources, queries and
    weights. Counts are not normalised. With the sources as queries, F(x_j) − ½ = (m − 1) `soft_rank`.

    In float32 the error is relative to the count, for weights ≥ 0: under 2·10⁻⁶ of F(y), for "normal" of
    F(y + 1.5 τ), and 2·10⁻¹⁵ for every source beyond the reach (34 τ above the query, for "normal" 8 τ).
    Hence two tails: "upper" counts from the top, Σ_k w_k Φ((x_k − y)/τ), and keeps the digits that the
    total less the "lower" has lost where little lies above. With weights of both signs the error is
    relative to Σ_k |w_k| Φ.

    Args:
        sources: x, [..., m]; or [S] with offsets.
        queries: y, [..., n], of the same batch shape; or [Q] with offsets.
        weights: w, like the sources; or channels, [..., W, m] or [W, S]: W sums at the price of less.
        options: by keyword, `CdfOptions` says what each is, with its default: temperature, relaxation,
            tail, integral (Σ_k w_k ∫Φ up to (y − x_k)/τ, the softplus for "logistic"; its derivative
            in y is F/τ), source_offsets and query_offsets (lists of different lengths in one call),
            source_mask and query_mask, backend.

    Returns:
        [..., n], [Q], or with channels [..., W, n], [W, Q]; in the dtype that the tensors promote to
        (computed in float32 at least). 0 where a query is masked; without sources 0; NaN in a row with a
        NaN or an infinity.

    Raises:
        TypeError, ValueError: an argument is not what is said here, or the backend is not usable.
    """
    chosen = make_options(options)
    rows, channelled = _rows(sources, queries, weights, chosen)
    check_usable(chosen.backend, *rows[:3])
    sums, _ = torch.ops.pc_kernels.smooth_cdf(
        *rows[:7],
        chosen.recipe.temperature,
        chosen.relaxation,
        chosen.tail,
        chosen.kernel,
        chosen.backend,
        True,
        torch.is_grad_enabled() and queries.requires_grad,
    )
    if chosen.source_offsets is None:
        sums = sums.reshape(len(sums), *queries.shape).movedim(0, -2)
    return sums if channelled else sums.squeeze(-2)


def _rows(sources: Any, queries: Any, weights: Any, options: CdfOptions) -> tuple[CdfRows, bool]:
    """The rows as matrices or lists, checked, and whether there are channels."""
    x, y = check_floating("sources", sources), check_floating("queries", queries)
    lists = options.source_offsets is not None or options.query_offsets is not None
    if lists or x.dim() == 0 or x.shape[:-1] != y.shape[:-1]:
        _check_dimensions(x, y, lists)
    channelled = False
    if weights is not None:
        w = check_floating("weights", weights)
        channelled = w.dim() == x.dim() + 1
        if w.shape != (*x.shape[:-1], *w.shape[-2 : -1 if channelled else -2], x.shape[-1]):
            raise ValueError(
                f"weights must have the shape of the sources, {tuple(x.shape)}, or channels before "
                f"its last dimension; got {tuple(w.shape)}"
            )
        weights = w.movedim(-2, 0) if channelled else w[None]
    check_mask("source_mask", options.source_mask, "sources", x)
    check_mask("query_mask", options.query_mask, "queries", y)
    rows = CdfRows(x, y, weights, *(getattr(options, name) for name in CdfRows._fields[3:7]))
    check_same_device(**dict(zip(CdfRows._fields[:7], rows[:7], strict=True)))
    return rows if lists else _matrices(rows), channelled


def _check_dimensions(x: Tensor, y: Tensor, lists: bool) -> None:
    shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
    if not lists:
        raise ValueError(
            f"sources and queries must be [..., m] and [..., n] with the same batch shape; got {shapes}"
        )
    if x.dim() != 1 or y.dim() != 1:
        raise ValueError(f"sources and queries must have 1 dimension with offsets; got {shapes}")


def _matrices(rows: CdfRows) -> CdfRows:
    """All batch dimensions as one."""
    count = math.prod(rows.sources.shape[:-1])

    def matrix(x: Tensor) -> Tensor:
        return x.reshape(count, x.shape[-1])

    w, source_mask, query_mask = rows.weights, rows.source_mask, rows.query_mask
    return CdfRows(
        matrix(rows.sources),
        matrix(rows.queries),
        None if w is None else w.reshape(len(w), count, w.shape[-1]),
        source_mask=None if source_mask is None else matrix(source_mask),
        query_mask=None if query_mask is None else matrix(query_mask),
    )
