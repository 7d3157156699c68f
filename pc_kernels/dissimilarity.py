"""Stage `dissimilarity`: features in, chunks of δ(i, j) rows out, and gradients back.

The metrics built on inner products (`euclidean`, `sqeuclidean`, `cosine`) leave the stage as Gram
rows: the backend turns them into dissimilarities where it ranks them, and hands back
V(i, j) = ∂L/∂δ(i, j) · c(i, j), scaled such that ∂L/∂a_i = Σ_j V(i, j) (a_i − b_j). Any other metric
leaves as dissimilarities, and its own backward takes ∂L/∂δ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .options import Metric
from .rows import PLAIN, RowMaker, Rows

GRAM_METRICS = ("euclidean", "sqeuclidean", "cosine")

FAR = 64
"""An anchor is far out if its |a|² is this many times the median of the references'."""

FEW_PAIRS = 1024
"""Pairs of a chunk up to which a gradient is summed from differences, as torch.cdist does for few."""

MIRROR_WIDTH = 256
"""Features as wide as this make an inner product dearer than a copy from the mirrored place."""

CITYBLOCK_WIDTH = 32
"""Features summed at a time by `cityblock`."""

SMALLEST_BLOCK = 256
"""Rows of a block below which a GEMM is too small to be efficient."""


class Side:
    """The student's or the teacher's half of a sweep over chunks of anchors."""

    unit = 1.0
    """What the dissimilarities of `rows` are to be multiplied by: 1 but for extreme features."""

    def rows(self, start: int, stop: int) -> Rows:
        """The rows of anchors start … stop−1."""
        raise NotImplementedError

    def accumulate(self, start: int, stop: int, grad: Tensor) -> None:
        """Takes what the backend left in `rows(start, stop).values`."""
        raise NotImplementedError

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """∂L/∂anchors [A, D] and ∂L/∂references [M, D]: None if the anchors are the references."""
        raise NotImplementedError


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
    """`euclidean`, `sqeuclidean` and `cosine`: one GEMM a chunk, and two for its gradient."""

    def __init__(
        self, metric: str, anchors: Tensor, references: Tensor | None, maker: RowMaker
    ) -> None:
        """Takes anchors [A, D] and references [M, D], None for the anchors themselves."""
        self.metric = metric
        self._maker = maker
        self._shared = references is None
        points = [anchors] if references is None else [anchors, references]
        self._lengths: list[Tensor] = []
        self._units: list[Tensor] = []
        self._scale = 1.0
        if metric == "cosine":
            self._lengths = [_length(x) for x in points]
            points = self._units = [
                _divide(x, n) for x, n in zip(points, self._lengths, strict=True)
            ]
        else:
            self._scale = power_of_two(points)
            if self._scale != 1.0:
                points = [x / self._scale for x in points]
        self.unit = self._scale**2 if metric == "sqeuclidean" else self._scale
        points, squares = self._near_origin(points)
        self._anchors, self._references = points[0], points[-1]
        self._anchor_sq, self._reference_sq = squares[0], squares[-1]
        self._offsets = torch.zeros_like(self._anchor_sq)
        if metric != "cosine" and self._reference_sq.numel() > 0:
            far = self._anchor_sq > FAR * self._reference_sq.median()
            self._offsets = torch.where(far, self._anchor_sq.sqrt(), 0)
        wide = anchors.shape[1] >= MIRROR_WIDTH
        self._halves = self._shared and wide and anchors.device.type == "cpu"
        self._gram: Tensor | None = None
        self._grad_anchors: Tensor | None = None
        self._grad_references: Tensor | None = None
        self._column_sum: Tensor | None = None

    def _near_origin(self, points: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The points centred, and their squared norms."""
        shifted = centre(points)
        squares = [x.square().sum(1) for x in shifted]
        if self.metric != "cosine":
            return shifted, squares
        # A vector of zeros has no direction and is 1 from everything, exactly, as orthogonal ones are:
        # (1 + 1)/2 - 0. Where there is one, nothing is shifted and all norms count as 1.
        zeros = torch.cat([length == 0 for length in self._lengths]).any()
        shifted = [torch.where(zeros, x, y) for x, y in zip(points, shifted, strict=True)]
        return shifted, [torch.where(zeros, 1, sq) for sq in squares]

    def rows(self, start: int, stop: int) -> Rows:
        """Inner products, or what goes straight to δ, in a buffer that the next chunk reuses."""
        anchors = self._anchors[start:stop]
        if self._gram is None or self._gram.shape[0] < stop - start:
            self._gram = self._maker.empty_rows(stop - start, self._references.shape[0], anchors)
        rows = Rows(
            self._gram[: stop - start],
            self.metric,
            anchors,
            self._references,
            self._anchor_sq[start:stop],
            self._reference_sq,
            self._offsets[start:stop],
        )
        rows.ready = self._maker.straight(rows)
        if not rows.ready:
            self._product(start, stop, rows.values)
        return rows

    def _product(self, start: int, stop: int, gram: Tensor) -> None:
        anchors = self._anchors[start:stop]
        if not self._halves:
            torch.mm(anchors, self._references.T, out=gram)
            return
        if start > 0:
            torch.mm(anchors, self._references[:start].T, out=gram[:, :start])
        if stop < gram.shape[1]:
            torch.mm(anchors, self._references[stop:].T, out=gram[:, stop:])
        symmetric_product(anchors, gram[:, start:stop])  # the anchors among themselves

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
        """Sums up; for cosine, goes back through the normalisation."""
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
        """From the points that the Gram matrix is made of, back to the features."""
        if self.metric != "cosine":
            return grad if self._scale == 1.0 else grad / self._scale
        unit = self._units[which]
        return _divide(grad - unit * (grad * unit).sum(1, keepdim=True), self._lengths[which])


def _length(x: Tensor) -> Tensor:
    """Euclidean norms [n, 1] of rows of any size, extreme ones too."""
    largest = x.abs().amax(dim=1, keepdim=True)
    return largest * _divide(x, largest).norm(dim=1, keepdim=True)


def _divide(x: Tensor, length: Tensor) -> Tensor:
    """Rows of x over their lengths, 0 where the length is 0."""
    return torch.where(length == 0, 0, x / length)


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor, in float64 on the way where the device has it."""
    first, *others = terms
    if not others or first.device.type == "mps":
        return sum(others, first)
    total = first.double()
    for term in others:
        total += term
    return total.to(first.dtype)


class CityblockSide(Side):
    """`cityblock`: no inner products; PyTorch's own forward and backward."""

    def __init__(self, anchors: Tensor, references: Tensor | None) -> None:
        """Takes anchors [A, D] and references [M, D], None for the anchors themselves."""
        self._shared = references is None
        self._anchors = anchors.contiguous()
        self._references = self._anchors if references is None else references.contiguous()
        self._grad_anchors = torch.zeros_like(self._anchors)
        self._grad_references = torch.zeros_like(self._references)

    def rows(self, start: int, stop: int) -> Rows:
        """Σ_d |a_d − b_d|, in blocks of features: cdist sums one by one, and roundings add up."""
        blocks = zip(
            self._anchors[start:stop].split(CITYBLOCK_WIDTH, dim=1),
            self._references.split(CITYBLOCK_WIDTH, dim=1),
            strict=True,
        )
        return Rows(sum_of(torch.cdist(a, b, p=1.0) for a, b in blocks))

    def accumulate(self, start: int, stop: int, grad: Tensor) -> None:
        """∂|a_d − b_d|/∂a_d = sign(a_d − b_d)."""
        backward = torch.ops.aten._cdist_backward
        anchors = self._anchors[start:stop]
        self._grad_anchors[start:stop] = backward(grad, anchors, self._references, 1.0, grad)
        transposed = grad.T.contiguous()
        self._grad_references += backward(transposed, self._references, anchors, 1.0, transposed)

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """The sums so far."""
        if self._shared:
            return self._grad_anchors + self._grad_references, None
        return self._grad_anchors, self._grad_references


class CallableSide(Side):
    """Any function (anchors [C, D], references [M, D]) -> [C, M] that autograd can go through."""

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        anchors: Tensor,
        references: Tensor | None,
        with_grad: bool,
    ) -> None:
        """Takes the function and the features it is given, chunk by chunk."""
        self._function = function
        self._with_grad = with_grad
        self._shared = references is None
        self._anchors = anchors.detach()
        self._references = self._anchors if references is None else references.detach()
        self._grad_anchors = torch.zeros_like(self._anchors)
        self._grad_references = torch.zeros_like(self._references)
        self._graph: tuple[Tensor, Tensor, Tensor] | None = None

    def rows(self, start: int, stop: int) -> Rows:
        """Calls the function, keeping its graph until `accumulate`."""
        anchors, references = self._anchors[start:stop].clone(), self._references
        with torch.set_grad_enabled(self._with_grad):
            if self._with_grad:
                anchors.requires_grad_()
                references = references.detach().requires_grad_()
            d = self._function(anchors, references)
        expected = (stop - start, references.shape[0])
        if not isinstance(d, Tensor) or tuple(d.shape) != expected:
            came = f"shape {tuple(d.shape)}" if isinstance(d, Tensor) else type(d).__name__
            raise ValueError(
                f"a dissimilarity callable must return a tensor of shape {expected}; got {came}"
            )
        if self._with_grad and not d.requires_grad:
            raise ValueError(
                "a dissimilarity callable must be differentiable; its result has no graph"
            )
        self._graph = (d, anchors, references)
        values = d.detach().to(self._anchors.dtype)
        return Rows(values.clone(memory_format=torch.contiguous_format))

    def accumulate(self, start: int, stop: int, grad: Tensor) -> None:
        """Goes back through the function's graph."""
        assert self._graph is not None
        d, anchors, references = self._graph
        to_anchors, to_references = torch.autograd.grad(
            d, (anchors, references), grad.to(d.dtype), allow_unused=True
        )
        if to_anchors is not None:
            self._grad_anchors[start:stop] = to_anchors
        if to_references is not None:
            self._grad_references += to_references
        self._graph = None

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """The sums so far."""
        if self._shared:
            return self._grad_anchors + self._grad_references, None
        return self._grad_anchors, self._grad_references


class GivenSide(Side):
    """Dissimilarities that the caller has: matrices [A, M]."""

    def __init__(self, matrix: Tensor, with_grad: bool) -> None:
        """Takes the matrix; its rows are copied, since backends write over them."""
        self._matrix = matrix
        self._grad = torch.empty_like(matrix) if with_grad else None

    def rows(self, start: int, stop: int) -> Rows:
        """A copy of the rows."""
        return Rows(self._matrix[start:stop].clone(memory_format=torch.contiguous_format))

    def accumulate(self, start: int, stop: int, grad: Tensor) -> None:
        """Stores the rows' gradient."""
        assert self._grad is not None
        self._grad[start:stop] = grad

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """∂L/∂matrix, and None."""
        assert self._grad is not None
        return self._grad, None


class MaskedSide(Side):
    """A side of which some pairs are masked: NaN and infinity must not spread through the products.

    Features that are not finite count as 0, and the values of their pairs become NaN: whoever sees
    such a pair has a loss of NaN, and whoever does not is none the wiser.
    """

    def __init__(
        self,
        metric: Metric,
        anchors: Tensor,
        references: Tensor | None,
        with_grad: bool,
        maker: RowMaker = PLAIN,
    ) -> None:
        """Takes anchors [A, D] and references [M, D], None for the anchors themselves."""
        anchors, self._anchor_poison = _quarantine(anchors)
        self._reference_poison = self._anchor_poison
        if references is not None:
            references, self._reference_poison = _quarantine(references)
        self._side = make_side(metric, anchors, references, with_grad, maker)
        self.unit = self._side.unit

    def rows(self, start: int, stop: int) -> Rows:
        """The rows of the side, poisoned where they must be."""
        rows = self._side.rows(start, stop)
        rows.values.add_(self._anchor_poison[start:stop, None]).add_(self._reference_poison)
        return rows

    def accumulate(self, start: int, stop: int, grad: Tensor) -> None:
        """Masked pairs have gradient 0: nothing is special about them."""
        self._side.accumulate(start, stop, grad)

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """The side's."""
        return self._side.gradients()


def _quarantine(x: Tensor) -> tuple[Tensor, Tensor]:
    """X [n, D] with rows that are not finite set to 0, and [n]: NaN for these, 0 for the others."""
    finite = x.isfinite().all(1)
    return torch.where(finite[:, None], x, 0), torch.where(finite, 0, torch.nan).to(x.dtype)


def make_side(
    metric: Metric,
    anchors: Tensor,
    references: Tensor | None,
    with_grad: bool,
    maker: RowMaker = PLAIN,
) -> Side:
    """The side that computes `metric` for anchors [A, D] and references [M, D] or None."""
    if callable(metric):
        return CallableSide(metric, anchors, references, with_grad)
    if metric == "cityblock":
        return CityblockSide(anchors, references)
    return GramSide(metric, anchors, references, maker)
