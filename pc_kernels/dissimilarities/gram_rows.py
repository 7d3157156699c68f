"""The stage `dissimilarity` of Gram rows in plain PyTorch: inner products to δ, and ∂L/∂δ to V.

V(i, j) = ∂L/∂δ(i, j) · c(i, j), scaled such that ∂L/∂a_i = Σ_j V(i, j) (a_i − b_j). The kernels do the
same: csrc/cpu/dissimilarity.h, csrc/cuda/dissimilarity.cuh, triton_kernels/dissimilarity.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import Gram, Rows

NEAR = 1 / 64
"""Squared distances below this share of |a|² + |b|² are summed again from the differences."""


class GramFormula:
    """How a squared distance becomes the dissimilarity; the identity, unless a method says otherwise."""

    power = 2
    """The dissimilarity grows with this power of the features' scale."""
    by_distance = False
    """Whether V depends on the dissimilarity."""

    def of_square(self, squared: Tensor) -> Tensor:
        """δ of |a − b|²."""
        return squared

    def of_excess(self, excess: Tensor, squared: Tensor, offset: Tensor) -> Tensor:
        """δ − offset^power of a far anchor, from |a − b|² − |a|² and |a − b|²; offset is |a|."""
        return excess

    def backward(self, d: Tensor, grad: Tensor) -> Tensor:
        """∂L/∂δ to V."""
        return grad * 2


class Euclidean(GramFormula):
    """|a − b|; a distance of 0 has gradient 0."""

    power = 1
    by_distance = True

    def of_square(self, squared: Tensor) -> Tensor:
        """See `GramFormula`."""
        return squared.clamp(min=0).sqrt()

    def of_excess(self, excess: Tensor, squared: Tensor, offset: Tensor) -> Tensor:
        """√(x + y) − √x = y/(√(x + y) + √x)."""
        return excess / (self.of_square(squared) + offset)

    def backward(self, d: Tensor, grad: Tensor) -> Tensor:
        """See `GramFormula`."""
        return torch.where(d == 0, 0, grad / d)


class Cosine(GramFormula):
    """1 − cos(a, b), which is half the squared distance of unit vectors; none of them is far out."""

    def of_square(self, squared: Tensor) -> Tensor:
        """See `GramFormula`."""
        return squared / 2

    def backward(self, d: Tensor, grad: Tensor) -> Tensor:
        """See `GramFormula`."""
        return grad


GRAM: dict[str, GramFormula] = {
    "euclidean": Euclidean(),
    "sqeuclidean": GramFormula(),
    "cosine": Cosine(),
}
"""The dissimilarities that are made of inner products."""


def tied(products: Tensor, gram: Gram) -> Tensor:
    """Inner products [C, M], those of equal references alike; see `Gram.twins`."""
    return products[:, gram.twins[:-1]] if gram.twins.numel() else products


def squared_distances(products: Tensor, gram: Gram) -> Tensor:
    """|a_i − b_j|² [C, M] of inner products; the short ones from the differences."""
    scale = gram.anchor_sq[:, None] + gram.reference_sq
    squared = torch.sub(scale, products, alpha=2)
    near = torch.nonzero(squared < NEAR * scale, as_tuple=True)
    squared[near] = _from_differences(gram, *near)
    return squared


def _from_differences(gram: Gram, anchors: Tensor, references: Tensor) -> Tensor:
    """|a_i − b_j|² [n] of pairs of these indices."""
    block = max(1, (1 << 20) // gram.anchors.shape[1])  # pairs whose differences are in memory
    squared = gram.anchors.new_empty(len(anchors))
    parts = zip(anchors.split(block), references.split(block), squared.split(block), strict=True)
    for i, j, part in parts:
        torch.sum((gram.anchors[i] - gram.references[j]).square_(), 1, out=part)
    return squared


def dissimilarities(rows: Rows) -> Tensor:
    """δ(i, j) [C, M], less the row's offset (see `Rows`)."""
    if rows.gram is None:
        return rows.values
    gram, formula = rows.gram, GRAM[rows.dissimilarity]
    products = tied(rows.values, gram)
    squared = squared_distances(products, gram)
    if squared.device.type == "cpu" and not gram.offsets.any():  # where looking is free
        return formula.of_square(squared)
    offset = gram.offsets[:, None]
    excess = torch.sub(gram.reference_sq, products, alpha=2)
    near = squared < NEAR * (gram.anchor_sq[:, None] + gram.reference_sq)
    excess = torch.where(near, squared - gram.anchor_sq[:, None], excess)
    far = formula.of_excess(excess, squared, offset)
    return torch.where(offset > 0, far, formula.of_square(squared))


def dissimilarities_backward(rows: Rows, d: Tensor, grad: Tensor) -> Tensor:
    """∂L/∂δ to V, for rows without a Gram matrix ∂L/∂δ itself; d are dissimilarities with the offset."""
    return grad if rows.gram is None else GRAM[rows.dissimilarity].backward(d, grad)
