"""The sides without inner products: cityblock, functions, given matrices; and any side with a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .row_maker import RowMaker
from .rows import Rows
from .side import Points, Side

CITYBLOCK_WIDTH = 32
"""Features summed at a time by `cityblock`."""


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

    def __init__(self, points: Points) -> None:
        """Takes the features."""
        self._shared = points.references is None
        self._anchors = points.anchors
        self._references = points.anchors if points.references is None else points.references
        self._grad_anchors = torch.zeros_like(self._anchors)
        self._grad_references = torch.zeros_like(self._references)
        self._on_gpu = self._anchors.device.type == "cuda"
        if self._on_gpu:  # a block of threads each in cdist, a 32-bit index in its backward
            self.most_pairs = (1 << 31) - 1

    def pair_bytes(self, with_grad: bool) -> int:
        """A term and its sum; going back Vᵀ, and in PyTorch's CUDA kernel gradients of all features."""
        width, size = self._anchors.shape[1], self._anchors.dtype.itemsize
        forth = size + 8 if width > CITYBLOCK_WIDTH else 0
        back = size + (size * width if self._on_gpu else 0)
        return max(forth, back) if with_grad else forth

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
        self, function: Callable[[Tensor, Tensor], Tensor], points: Points, with_grad: bool
    ) -> None:
        """Takes the function and the features it is given, chunk by chunk."""
        self._function = function
        self._with_grad = with_grad
        self._shared = points.references is None
        self._anchors = points.anchors.detach()
        references = points.references
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

    Features that are not finite count as 0, and the values of their pairs become NaN: an
    anchor that has such a pair has a loss of NaN, and the other anchors are not affected.
    """

    def __init__(self, side: Callable[[Points], Side], points: Points, maker: RowMaker) -> None:
        """Takes what makes the side of features, the features, and what makes Gram rows."""
        pairs = [maker.quarantine(x) for x in points[:2] if x is not None]
        finite, self._poison = zip(*pairs, strict=True)
        references = None if points.references is None else finite[-1]
        self._side = side(
            points._replace(anchors=finite[0], references=references, poison=self._poison)
        )
        self.unit = self._side.unit
        self.power = self._side.power
        self.most_pairs = self._side.most_pairs

    def pair_bytes(self, with_grad: bool) -> int:
        """The side's."""
        return self._side.pair_bytes(with_grad)

    def rows(self, start: int, stop: int) -> Rows:
        """The rows of the side, poisoned where they must be."""
        rows = self._side.rows(start, stop)
        if (
            rows.gram is None
        ):  # else it is in the squared norms; 0 times 0 is 0, and anything else is NaN
            rows.values.addr_(self._poison[0][start:stop], self._poison[-1])
        return rows

    def accumulate(self, start: int, stop: int, grad: Tensor) -> None:
        """Masked pairs have gradient 0: nothing is special about them."""
        self._side.accumulate(start, stop, grad)

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """The side's."""
        return self._side.gradients()
