"""What Gram sides need beside products, in plain PyTorch; backends may do it better.

Features are brought near the origin before their products are taken, since |a|² + |b|² − 2ab loses what
|a|² has more digits than |a − b|²: docs/method.md, "Distances".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import wide_dtype
from ..products import IN_FLOAT32, Products
from .rows import Rows

FAR = 64
"""An anchor is far out if its |a|² is this many times the median of the references'."""

FEW_PAIRS = 1024
"""Pairs of a chunk up to which a gradient is summed from differences, as torch.cdist does for few."""

CANCELLED = 1 / 8
"""A gradient that is this much smaller than its terms has lost as much to rounding."""

MIRROR_WIDTH = 256
"""Features as wide as this make an inner product dearer than a copy from the mirrored place."""

SMALLEST_BLOCK = 256
"""Rows of a block below which a GEMM is too small to be efficient."""


def centre(points: list[Tensor], products: Products = IN_FLOAT32) -> list[Tensor]:
    """The points [·, D] shifted near the origin, where that costs no digit.

    Distances do not change under a shift, but |a|² + |b|² − 2ab loses what |a|² has more digits than
    |a − b|². The mean of each feature is rounded to a multiple of a power of two about as large as
    the feature's spread, and a feature is shifted only if the subtraction is exact for every point, and
    its products can be taken as before.
    Features that are centred already stay as they are, bit for bit.
    """
    references = points[-1]
    if references.shape[0] == 0:
        return points
    mean = references.mean(dim=0)
    if points[0].device.type == "cpu":  # where looking is free: is any mean as large as the spread?
        power = references.square().mean(dim=0)
        if not (mean.square() * 2 >= power).any():
            return points
    deviation = (references - mean).square_().mean(dim=0).sqrt_()
    quantum = torch.exp2(torch.ceil(torch.log2(deviation)) + 1)
    shift = torch.where(quantum > 0, torch.round(mean / quantum) * quantum, mean)
    shift = torch.where(shift.isfinite(), shift, 0)
    moved = [x - shift for x in points]
    exact = [
        ((to + shift == x) & products.hold(to)).all(0) for x, to in zip(points, moved, strict=True)
    ]
    shift = torch.where(torch.stack(exact).all(0), shift, 0)
    return [x - shift for x in points]


def power_of_two(points: list[Tensor]) -> float:
    """A unit 2^k in which the squares of features [·, D] neither over- nor underflow; mostly 1."""
    if points[-1].numel() == 0:
        return 1.0
    extremes = [bound for x in points if x.numel() for bound in x.aminmax()]
    largest = max(abs(float(bound)) for bound in extremes)
    if largest == 0.0 or not math.isfinite(largest):
        return 1.0
    # Squares then have half the range left.
    limits = torch.finfo(points[0].dtype)
    safe = -math.log2(limits.tiny) // 4
    exponent = min(
        math.frexp(largest)[1], math.frexp(limits.max)[1] - 1
    )  # the unit is a number, too
    return 1.0 if abs(exponent) < safe else math.ldexp(1.0, exponent)


def far_offsets(anchor_sq: Tensor, reference_sq: Tensor) -> Tensor:
    """|a| of the anchors that are far out, 0 for the others (see `Rows`)."""
    if reference_sq.numel() == 0:
        return torch.zeros_like(anchor_sq)
    far = anchor_sq > FAR * reference_sq.nanmedian()
    return torch.where(far, anchor_sq.sqrt(), 0)


def twins(points: Tensor, squares: Tensor) -> Tensor:
    """See `NearOrigin.twins`."""
    if len(squares.unique()) == len(squares):
        return torch.empty(0, dtype=torch.int32, device=points.device)
    place = torch.arange(len(points), dtype=torch.int32, device=points.device)
    _, group = points.unique(dim=0, return_inverse=True)
    first = place.new_full((len(points),), len(points)).scatter_reduce(0, group, place, "amin")
    own = first[group]
    return torch.cat([own, (own != place).sum(dtype=torch.int32)[None]])


def upper_product(x: Tensor, out: Tensor) -> None:
    """Writes what is on and above the diagonal of x xᵀ [n, n] for x [n, D], in blocks."""
    n = x.shape[0]
    if n < 2 * SMALLEST_BLOCK:
        torch.mm(x, x.T, out=out)
        return
    half = n // 2
    upper_product(x[:half], out[:half, :half])
    upper_product(x[half:], out[half:, half:])
    torch.mm(x[:half], x[half:].T, out=out[:half, half:])


def pull_by_differences(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Σ_j v_ij (x_i − y_j) [n, D], from the differences: nothing cancels."""
    return (v[:, :, None] * (x[:, None] - y)).sum(1)


def in_unit(x: Tensor, unit: float | Tensor) -> Tensor:
    """What features, or gradients in them, are over the unit."""
    return x if isinstance(unit, float) and unit == 1.0 else x / unit


class NearOrigin(NamedTuple):
    """Points [anchors], or [anchors, references], as their products are taken."""

    points: list[Tensor]
    """Shifted, and divided by the unit."""
    squares: list[Tensor]
    """Their squared norms; NaN of what is poisoned."""
    offsets: Tensor
    """|a| [A] of the anchors that are far out, 0 for the others (see `Rows`)."""
    twins: Tensor
    """Int32 [M + 1]: the first reference that equals each bit for bit, then how many are not that
    themselves; [0] where it is known that none are. A product of matrices may round equal columns
    differently, which would break ties."""
    unit: float | Tensor
    """What features were divided by, lest squares over- or underflow: mostly 1; [1] where the kernels do
    not wait for a host that asks."""


class Marks(NamedTuple):
    """What is known of points before they are brought near the origin."""

    poison: Sequence[Tensor] = ()
    """[n] of each: NaN for points that count as 0 and whose pairs are NaN, 0 for the others."""
    inverse: Sequence[Tensor] = ()
    """[n, 1] of each, of points of length 1: what they were multiplied by, 0 of zeros."""


NO_MARKS = Marks()


class RowMaker:
    """How Gram rows come about, and how V goes back to the points."""

    def empty_rows(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """A matrix of anything, of the dtype and on the device of `like`."""
        return like.new_empty(rows, columns)

    def straight(self, rows: Rows) -> bool:
        """Fills the values with δ straight from the features, if that beats a product of matrices.

        Returns whether it did: the rows are then `ready`, and this backend's stages take them as δ.
        """
        return False

    def near_origin(
        self, points: list[Tensor], products: Products = IN_FLOAT32, marks: Marks = NO_MARKS
    ) -> NearOrigin:
        """Points [·, D], the references last, made ready for products.

        A vector of zeros has no direction and is 1 from every point of length 1, exactly, as orthogonal
        ones are: (1 + 1)/2 − 0. Where there is one, nothing is shifted and all norms count as 1. No point
        of length 1 is far out.
        """
        unit = power_of_two(points)
        points = [in_unit(x, unit) for x in points]
        moved = centre(points, products)
        squares = [x.square().sum(1) for x in moved]
        if marks.inverse:
            zeros = (torch.cat(tuple(marks.inverse)) == 0).any()
            moved = [torch.where(zeros, x, y) for x, y in zip(points, moved, strict=True)]
            squares = [torch.where(zeros, 1, sq) for sq in squares]
        if marks.poison:
            squares = [sq + poison for sq, poison in zip(squares, marks.poison, strict=True)]
        offsets = far_offsets(squares[0], squares[-1])
        offsets = torch.zeros_like(offsets) if marks.inverse else offsets
        return NearOrigin(moved, squares, offsets, twins(moved[-1], squares[-1]), unit)

    def normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X/|x| of points [n, D] of any size, and 1/|x| [n, 1], in float64 if need be; 0 where x is."""
        largest = x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)
        limits, wide = torch.finfo(x.dtype), wide_dtype(x.device)
        exponents = math.log2(limits.tiny), math.frexp(limits.max)[1] - 1
        unit = torch.exp2(torch.floor(torch.log2(largest)).clamp(*exponents))
        x = x / unit  # squares are in range
        length = x.norm(dim=1, keepdim=True)
        return _divide(x, length), _divide(1 / unit.to(wide), length.to(wide))

    def normalized_backward(self, grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
        """The gradient in x [n, D] of that in x/|x|."""
        across = grad - unit * (grad * unit).sum(1, keepdim=True)
        return (across * inverse).to(grad.dtype)

    def quarantine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X [n, D] with rows that are not finite set to 0, and [n]: NaN for these, 0 for the others."""
        finite = x.isfinite().all(1)
        return torch.where(finite[:, None], x, 0), torch.where(finite, 0, torch.nan).to(x.dtype)

    def mirror(self, values: Tensor, start: int) -> None:
        """Copies what is above the diagonal of a square to below it.

        Args:
            values: [n, M] of which the square is n columns.
            start: the first of these.
        """
        square = values[:, start : start + len(values)]
        for first in range(0, len(square), SMALLEST_BLOCK):
            past = first + SMALLEST_BLOCK
            block = square[first:past, first:past]
            block.copy_(block.triu() + block.triu(1).T)
            square[past:, first:past] = square[first:past, past:].T

    def with_mirror(self, v: Tensor) -> Tensor:
        """V + Vᵀ; V may be overwritten."""
        if v.device.type != "cpu":
            return v + v.T
        return v.T.contiguous().add_(
            v
        )  # there a transpose is copied by tiles, but added by columns

    def pull(
        self,
        v: Tensor,
        x: Tensor,
        y: Tensor,
        products: Products = IN_FLOAT32,
        unit: float | Tensor = 1.0,
    ) -> Tensor:
        """Σ_j v_ij (x_i − y_j) over the unit [n, D] of v [n, m], contiguous or a transpose that is.

        By a product of matrices. As a difference of two sums it cancels where what pulls at x_i is much
        nearer to it than the origin: near duplicates, and what no shift could bring near. Such rows are
        summed again from the differences.
        """
        if v.numel() <= FEW_PAIRS:
            return in_unit(pull_by_differences(v, x, y), unit)
        grad = products.add(x * v.sum(1, keepdim=True), v, y, -1.0)
        terms = v.norm(dim=1) * x.norm(dim=1)
        rows = torch.nonzero(grad.norm(dim=1) < CANCELLED * terms)[:, 0]
        block = max(1, (1 << 20) // y.numel())  # rows whose differences are in memory
        for part in rows.split(block):
            grad[part] = pull_by_differences(v[part], x[part], y)
        return in_unit(grad, unit)


def _divide(x: Tensor, by: Tensor) -> Tensor:
    """Rows of x by numbers, 0 where these are 0."""
    return torch.where(by == 0, 0, x / by)


PLAIN = RowMaker()
