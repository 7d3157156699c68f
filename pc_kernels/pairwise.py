"""Stage `dissimilarity`, standing alone: all pairs of two sets of features, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import select
from .checks import check_matrix, check_same_device, compute_dtype, first_order_only
from .dissimilarities import Dissimilarity, Points, Rows, Side, check_dissimilarity, make_side
from .dissimilarities.gram_rows import dissimilarities_backward
from .precision import exact_arithmetic


def pairwise_dissimilarity(
    x: Tensor, y: Tensor | None = None, metric: Dissimilarity = "euclidean"
) -> Tensor:
    """δ(i, j) of all rows of x and y, accurate for near-duplicates too, with gradients.

    Args:
        x: [A, D].
        y: [M, D]; by default x itself.
        metric: "euclidean", "sqeuclidean", "cosine", "cityblock" or a function ([A, D], [M, D]) ->
            [A, M]. A distance of 0 has gradient 0; a vector of zeros has cosine dissimilarity 1 to
            every vector.

    Returns:
        [A, M], in the dtype of x.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
    """
    check_matrix("x", x, "[rows, width]")
    check_dissimilarity("metric", metric)
    if y is not None:
        check_matrix("y", y, "[rows, width]")
        if x.shape[1] != y.shape[1]:
            raise ValueError(f"x and y must have the same width; got {x.shape[1]} and {y.shape[1]}")
        check_same_device(x=x, y=y)
    if callable(metric):
        return metric(x, x if y is None else y)
    return _Pairwise.apply(x, y, metric)


class _Pairwise(torch.autograd.Function):
    """All pairs through one Gram matrix; the backward through two products with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, metric: str) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.metric = metric
        side, _, d = _matrix(x, y, metric)
        return (d * side.unit).to(x.dtype)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, y = ctx.saved_tensors
        side, rows, d = _matrix(x, y, ctx.metric)
        with exact_arithmetic(x.device):
            grad = dissimilarities_backward(rows, d, grad.to(d.dtype) * side.unit)
            side.accumulate(0, x.shape[0], grad)
            to_x, to_y = side.gradients()
        return to_x.to(x.dtype), None if y is None or to_y is None else to_y.to(y.dtype), None


def _matrix(x: Tensor, y: Tensor | None, metric: str) -> tuple[Side, Rows, Tensor]:
    """The side of x and y, its rows, and δ [A, M] in the side's unit and the compute dtype."""
    dtype = compute_dtype(x, y)
    with torch.no_grad(), exact_arithmetic(x.device):
        points = Points.of(x, y, dtype)
        side = make_side(metric, points, with_grad=True)
        rows = side.rows(0, x.shape[0])
        if rows.gram is not None:  # distances themselves are wanted, not their differences
            rows.gram = rows.gram._replace(offsets=torch.zeros_like(rows.gram.offsets))
        return side, rows, select("auto", x.device, dtype).dissimilarity(rows)
