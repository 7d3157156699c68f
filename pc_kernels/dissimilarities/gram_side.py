"""The sides of the Gram dissimilarities: one product of matrices a chunk, and two for its gradient.

`euclidean`, `sqeuclidean` and `cosine` are made of inner products and leave as Gram rows: the backend
turns them into dissimilarities where it ranks them, and hands back V(i, j) (gram_rows.py).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .gram_rows import GRAM
from .row_maker import (
    MIRROR_WIDTH,
    PLAIN,
    Marks,
    NearOrigin,
    RowMaker,
    upper_product,
)
from .rows import Gram, Rows
from .side import Points, Side


class GramSide(Side):
    """`euclidean` and `sqeuclidean`."""

    def __init__(self, name: str, points: Points, maker: RowMaker = PLAIN) -> None:
        """Takes the dissimilarity's name, the features, and what makes the Gram rows."""
        self.name = name
        self.power = GRAM[name].power
        self._maker = maker
        self._shared = points.references is None
        self._products = points.products
        near = self._near_origin([x for x in points[:2] if x is not None], points.poison)
        self.unit = near.unit
        self._anchors, self._references = near.points[0], near.points[-1]
        self._anchor_sq, self._reference_sq = near.squares[0], near.squares[-1]
        self._offsets = near.offsets
        self._twins = near.twins
        nothing = near.squares[0].new_empty(0)
        self._unit = near.unit if isinstance(near.unit, Tensor) else nothing
        wide = self._anchors.shape[1] >= MIRROR_WIDTH
        on_cpu = self._anchors.device.type == "cpu" and not self._products.parts
        self._halves = self._shared and wide and on_cpu
        self._values: Tensor | None = None
        self._grad_anchors = torch.zeros_like(self._anchors[:0])
        self._grad_references: Tensor | None = None

    def _near_origin(self, points: list[Tensor], poison: tuple[Tensor, ...]) -> NearOrigin:
        """The points that the products are of."""
        return self._maker.near_origin(points, self._products, Marks(poison))

    def pair_bytes(self, with_grad: bool) -> int:
        """See `Side`."""
        return self._products.pair_bytes if with_grad else 0

    def rows(self, start: int, stop: int) -> Rows:
        """Inner products, or what goes straight to δ, in a buffer that the next chunk reuses."""
        anchors = self._anchors[start:stop]
        if self._values is None or self._values.shape[0] < stop - start:
            columns = self._references.shape[0]
            self._values = self._maker.empty_rows(stop - start, columns, anchors)
        gram = Gram(
            anchors,
            self._references,
            self._anchor_sq[start:stop],
            self._reference_sq,
            self._offsets[start:stop],
            self._twins,
            self._unit,
        )
        rows = Rows(self._values[: stop - start], self.name, gram)
        rows.ready = self._maker.straight(rows)
        if not rows.ready:
            self._product(start, stop, rows.values)
        return rows

    def _product(self, start: int, stop: int, products: Tensor) -> None:
        anchors = self._anchors[start:stop]
        if not self._halves:
            self._products.of_pairs(anchors, self._references, products)
            return
        if start > 0:
            torch.mm(anchors, self._references[:start].T, out=products[:, :start])
        if stop < products.shape[1]:
            torch.mm(anchors, self._references[stop:].T, out=products[:, stop:])
        upper_product(anchors, products[:, start:stop])  # the anchors among themselves
        self._maker.mirror(products, start)

    def accumulate(self, start: int, stop: int, grad: Tensor) -> None:
        """∂a_i += Σ_j V (a_i − b_j), ∂b_j −= Σ_i V (a_i − b_j)."""
        anchors = self._anchors[start:stop]
        unit = 1.0 if self.in_units else self.unit
        pull = partial(self._maker.pull, products=self._products, unit=unit)
        if self._shared and len(anchors) == len(self._anchors):  # one chunk is all there is
            self._grad_anchors = pull(self._maker.with_mirror(grad), anchors, anchors)
            return
        if self._grad_references is None:
            self._grad_anchors = torch.empty_like(self._anchors)
            self._grad_references = torch.zeros_like(self._references)
        self._grad_anchors[start:stop] = pull(grad, anchors, self._references)
        self._grad_references += pull(grad.T, self._references, anchors)

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """Sums up, and goes back to the features."""
        to_anchors, to_references = self._grad_anchors, self._grad_references
        if self._shared:
            both = to_anchors if to_references is None else to_anchors + to_references
            return self._to_features(both, 0), None
        if to_references is None:  # no chunk: no anchors
            to_references = torch.zeros_like(self._references)
        return self._to_features(to_anchors, 0), self._to_features(to_references, -1)

    def _to_features(self, grad: Tensor, which: int) -> Tensor:
        """From points near the origin to the features: 0 the anchors, -1 the references."""
        return grad


class CosineSide(GramSide):
    """`cosine`: the products of unit vectors."""

    def _near_origin(self, points: list[Tensor], poison: tuple[Tensor, ...]) -> NearOrigin:
        """See `GramSide`."""
        self._products = self._products.of_float32()
        self._normalized = [self._maker.normalized(x) for x in points]
        units, inverse = zip(*self._normalized, strict=True)
        return self._maker.near_origin(list(units), self._products, Marks(poison, inverse))

    def _to_features(self, grad: Tensor, which: int) -> Tensor:
        """Back through the normalisation."""
        return self._maker.normalized_backward(grad, *self._normalized[which])
