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
        finite = all(p is None or _all_finite(p) for p in (x, y))
        return (_distances if finite else _with_infinities)(x, y, metric).to(x.dtype)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, y = ctx.saved_tensors
        side, rows, d = _matrix(x, y, ctx.metric)
        side.in_units = True
        with exact_arithmetic(x.device):
            own = grad.to(d.dtype, copy=True, memory_format=torch.contiguous_format)
            grad = dissimilarities_backward(rows, d, own)  # which the backend may overwrite
            side.accumulate(0, x.shape[0], grad)
            to_x, to_y = side.gradients()
        to_x = _times_unit(to_x, side, side.power - 1)
        to_y = None if to_y is None else _times_unit(to_y, side, side.power - 1)
        return to_x.to(x.dtype), None if y is None or to_y is None else to_y.to(y.dtype), None


def _matrix(x: Tensor, y: Tensor | None, metric: str) -> tuple[Side, Rows, Tensor]:
    """The side of x and y, its rows, and δ [A, M] in the compute dtype and the side's unit."""
    dtype = compute_dtype(x, y)
    with torch.no_grad(), exact_arithmetic(x.device):
        engine = select("auto", x.device, dtype)
        side = make_side(metric, Points.of(x, y, dtype), with_grad=True, maker=engine)
        rows = side.rows(0, x.shape[0])
        return side, rows, engine.true_dissimilarity(rows)


def _distances(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    """δ [A, M] in the compute dtype."""
    side, _, d = _matrix(x, y, metric)
    return _times_unit(d, side, side.power)


def _times_unit(x: Tensor, side: Side, times: int) -> Tensor:
    """X times the side's unit, so often: the unit to the power may leave the range."""
    known = isinstance(side.unit, float) and side.unit == 1.0
    for _ in range(0 if known else times):
        x = x * side.unit
    return x


def _all_finite(x: Tensor) -> bool:
    """Looks only where looking is free, on the CPU."""
    return x.device.type != "cpu" or bool(x.isfinite().all())


def _with_infinities(x: Tensor, y: Tensor | None, metric: str) -> Tensor:
    """δ in the compute dtype of points of which some are not finite: these would spread by products.

    They are put at the origin, and their pairs get what the differences give, infinity or NaN.
    """
    rows = ~x.isfinite().all(1)
    columns = rows if y is None else ~y.isfinite().all(1)
    finite_y = None if y is None else torch.where(columns[:, None], 0, y)
    d = _distances(torch.where(rows[:, None], 0, x), finite_y, metric)
    y = x if y is None else y

    def between(a: Tensor, b: Tensor) -> Tensor:
        if metric == "cosine":  # an infinite vector has no direction
            return d.new_full((len(a), len(b)), torch.nan)
        return torch.cdist(a.to(d.dtype), b.to(d.dtype), p=1.0)

    d[rows] = between(x[rows], y)
    d[:, columns] = between(x, y[columns])
    return d
