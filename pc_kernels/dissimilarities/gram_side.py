"""The sides of the Gram dissimilarities: one product of matrices a chunk, and two for its gradient.

`euclidean`, `sqeuclidean` and `cosine` are made of inner products and leave as Gram rows: the backend
turns them into dissimilarities where it ranks them, and hands back V(i, j) (gram_rows.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .gram_rows import GRAM
from .rows import PLAIN, Gram, RowMaker, Rows
from .side import Points, Side

FAR = 64
"""An anchor is far out if its |a|² is this many times the median of the references'."""

FEW_PAIRS = 1024
"""Pairs of a chunk up to which a gradient is summed from differences, as torch.cdist does for few."""

MIRROR_WIDTH = 256
"""Features as wide as this make an inner product dearer than a copy from the mirrored place."""

SMALLEST_BLOCK = 256
"""Rows of a block below which a GEMM is too small to be efficient."""


def centre(points: list[Tensor]) -> list[Tensor]:
    """The points [·, D] shifted near the origin, where that costs no digit.

    Distances do not change under a shift, but |a|² + |b|² − 2ab loses what |a|² has more digits than
    |a − b|². The mean of each feature is rounded to a multiple of a power of two about as large as
    the feature's spread, and a feature is shifted only if the subtraction is exact for every point.
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
    exact = torch.stack([((x - shift) + shift == x).all(dim=0) for x in points]).all(dim=0)
    shift = torch.where(exact, shift, 0)
    return [x - shift for x in points]


def power_of_two(points: list[Tensor]) -> float:
    """A unit 2^k in which the squares of features [·, D] neither over- nor underflow; mostly 1.

    Looks only where looking is free, on the CPU; elsewhere extreme features over- and underflow.
    """
    if points[0].device.type != "cpu" or points[-1].numel() == 0:
        return 1.0
    extremes = [bound for x in points if x.numel() for bound in x.aminmax()]
    largest = max(abs(float(bound)) for bound in extremes)
    if largest == 0.0 or not math.isfinite(largest):
        return 1.0
    safe = (
        -math.log2(torch.finfo(points[0].dtype).tiny) / 4
    )  # squares then have half the range left
    exponent = math.frexp(largest)[1]
    return 1.0 if abs(exponent) < safe else math.ldexp(1.0, exponent)


def symmetric_product(x: Tensor, out: Tensor) -> None:
    """Writes x xᵀ [n, n] for x [n, D], computing half of it and mirroring the other."""
    n = x.shape[0]
    if n < 2 * SMALLEST_BLOCK:
        torch.mm(x, x.T, out=out)
        return
    half = n // 2
    symmetric_product(x[:half], out[:half, :half])
    symmetric_product(x[half:], out[half:, half:])
    torch.mm(x[:half], x[half:].T, out=out[:half, half:])
    out[half:, :half] = out[:half, half:].T


class GramSide(Side):
    """`euclidean` and `sqeuclidean`."""

    def __init__(self, name: str, points: Points, maker: RowMaker = PLAIN) -> None:
        """Takes the dissimilarity's name, the features, and what makes the Gram rows."""
        self.name = name
        self._maker = maker
        self._shared = points.references is None
        given = [x for x in points if x is not None]
        self._scale = 1.0
        shifted, squares = self._near_origin(given)
        self.unit = self._scale ** GRAM[name].power
        self._anchors, self._references = shifted[0], shifted[-1]
        self._anchor_sq, self._reference_sq = squares[0], squares[-1]
        self._offsets = self._far_out()
        wide = self._anchors.shape[1] >= MIRROR_WIDTH
        self._halves = self._shared and wide and self._anchors.device.type == "cpu"
        self._products: Tensor | None = None
        self._grad_anchors: Tensor | None = None
        self._grad_references: Tensor | None = None
        self._column_sum: Tensor | None = None

    def _near_origin(self, points: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The points that the products are of, and their squared norms."""
        self._scale = power_of_two(points)
        if self._scale != 1.0:
            points = [x / self._scale for x in points]
        points = centre(points)
        return points, [x.square().sum(1) for x in points]

    def _far_out(self) -> Tensor:
        """|a| of the anchors that are far out, 0 for the others (see `Rows`)."""
        none = torch.zeros_like(self._anchor_sq)
        if self._reference_sq.numel() == 0:
            return none
        far = self._anchor_sq > FAR * self._reference_sq.median()
        return torch.where(far, self._anchor_sq.sqrt(), none)

    def rows(self, start: int, stop: int) -> Rows:
        """Inner products, or what goes straight to δ, in a buffer that the next chunk reuses."""
        anchors = self._anchors[start:stop]
        if self._products is None or self._products.shape[0] < stop - start:
            columns = self._references.shape[0]
            self._products = self._maker.empty_rows(stop - start, columns, anchors)
        gram = Gram(
            anchors,
            self._references,
            self._anchor_sq[start:stop],
            self._reference_sq,
            self._offsets[start:stop],
        )
        rows = Rows(self._products[: stop - start], self.name, gram)
        rows.ready = self._maker.straight(rows)
        if not rows.ready:
            self._product(start, stop, rows.values)
        return rows

    def _product(self, start: int, stop: int, products: Tensor) -> None:
        anchors = self._anchors[start:stop]
        if not self._halves:
            torch.mm(anchors, self._references.T, out=products)
            return
        if start > 0:
            torch.mm(anchors, self._references[:start].T, out=products[:, :start])
        if stop < products.shape[1]:
            torch.mm(anchors, self._references[stop:].T, out=products[:, stop:])
        symmetric_product(anchors, products[:, start:stop])  # the anchors among themselves

    def accumulate(self, start: int, stop: int, grad: Tensor) -> None:
        """∂a_i += Σ_j V (a_i − b_j), ∂b_j −= Σ_i V (a_i − b_j)."""
        if self._grad_anchors is None or self._grad_references is None:
            self._grad_anchors = torch.empty_like(self._anchors)
            self._grad_references = torch.zeros_like(self._references)
            self._column_sum = self._reference_sq.new_zeros(self._references.shape[0])
        assert self._column_sum is not None
        anchors = self._anchors[start:stop]
        own = self._grad_anchors[start:stop]
        if grad.numel() <= FEW_PAIRS:  # the differences themselves: nothing cancels
            pulls = grad[:, :, None] * (anchors[:, None] - self._references)
            torch.sum(pulls, 1, out=own)
            self._grad_references -= pulls.sum(0)
            return
        torch.mul(anchors, grad.sum(1, keepdim=True), out=own)
        own.addmm_(grad, self._references, alpha=-1)
        self._column_sum += grad.sum(0)
        self._grad_references.addmm_(grad.T, anchors, alpha=-1)

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """Sums up, and goes back to the features."""
        if self._grad_anchors is None:  # no chunk: no anchors
            zeros = torch.zeros_like(self._anchors)
            return zeros, None if self._shared else torch.zeros_like(self._references)
        assert self._grad_references is not None and self._column_sum is not None
        to_anchors = self._grad_anchors
        to_references = self._grad_references.addcmul_(self._references, self._column_sum[:, None])
        if self._shared:
            return self._to_features(to_anchors.add_(to_references), 0), None
        return self._to_features(to_anchors, 0), self._to_features(to_references, -1)

    def _to_features(self, grad: Tensor, which: int) -> Tensor:
        """From the points that the products are of to the features: 0 the anchors, -1 the references."""
        return grad if self._scale == 1.0 else grad / self._scale


class CosineSide(GramSide):
    """`cosine`: the products of unit vectors."""

    def _near_origin(self, points: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """See `GramSide`.

        A vector of zeros has no direction and is 1 from everything, exactly, as orthogonal ones are:
        (1 + 1)/2 - 0. Where there is one, nothing is shifted and all norms count as 1.
        """
        self._lifts = [_lift(x) for x in points]
        points = [x * lift for x, lift in zip(points, self._lifts, strict=True)]
        self._lengths = [_length(x) for x in points]
        self._units = [_divide(x, n) for x, n in zip(points, self._lengths, strict=True)]
        shifted = centre(self._units)
        squares = [x.square().sum(1) for x in shifted]
        zeros = torch.cat([length == 0 for length in self._lengths]).any()
        shifted = [torch.where(zeros, x, y) for x, y in zip(self._units, shifted, strict=True)]
        return shifted, [torch.where(zeros, 1, sq) for sq in squares]

    def _far_out(self) -> Tensor:
        """No unit vector is."""
        return torch.zeros_like(self._anchor_sq)

    def _to_features(self, grad: Tensor, which: int) -> Tensor:
        """Back through the normalisation."""
        unit = self._units[which]
        across = grad - unit * (grad * unit).sum(1, keepdim=True)
        return _divide(across, self._lengths[which]) * self._lifts[which]


def _lift(x: Tensor) -> Tensor:
    """2^100 for rows [n, 1] so small that their lengths may be subnormal, of few digits; else 1."""
    small = x.abs().amax(dim=1, keepdim=True) < 2.0**-100
    return torch.where(small, 2.0**100, 1.0).to(x.dtype)


def _length(x: Tensor) -> Tensor:
    """Euclidean norms [n, 1] of rows of any size, extreme ones too."""
    largest = x.abs().amax(dim=1, keepdim=True)
    return largest * _divide(x, largest).norm(dim=1, keepdim=True)


def _divide(x: Tensor, length: Tensor) -> Tensor:
    """Rows of x over their lengths, 0 where the length is 0."""
    return torch.where(length == 0, 0, x / length)
