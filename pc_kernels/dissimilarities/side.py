"""One half of a sweep over chunks of anchors: features in, rows of δ out, and gradients back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..products import IN_FLOAT32, Products
from .rows import Rows


class Points(NamedTuple):
    """The features that dissimilarities are of."""

    anchors: Tensor
    """[A, D]."""
    references: Tensor | None
    """[M, D]; None: the anchors themselves."""
    products: Products = IN_FLOAT32
    """How products of them are taken."""
    poison: tuple[Tensor, ...] = ()
    """Of anchors, and of references if there are any, see `Marks`."""

    @classmethod
    def of(
        cls, anchors: Tensor, references: Tensor | None, dtype: torch.dtype, products: str = "ieee"
    ) -> Points:
        """Features as sides take them: contiguous, without a graph, in the compute dtype."""
        given = [anchors] if references is None else [anchors, references]
        ready = [x.detach().to(dtype).contiguous() for x in given]
        way = Products.of(products, given, dtype)
        return cls(ready[0], None if references is None else ready[1], way)


class Side:
    """The student's or the teacher's half of a sweep over chunks of anchors."""

    unit: float | Tensor = 1.0
    """What features are divided by for `rows`: mostly 1; [1] where only the device knows it."""
    power = 0
    """Of the unit, that the dissimilarities of `rows` are to be multiplied by."""
    in_units = False
    """Whether gradients are wanted in features in the unit."""
    most_pairs = 1 << 62
    """The most that a chunk may have."""

    def pair_bytes(self, with_grad: bool) -> int:
        """Working memory for each pair of a chunk, beside the rows."""
        return 0

    def rows(self, start: int, stop: int) -> Rows:
        """The rows of anchors start … stop−1."""
        raise NotImplementedError

    def accumulate(self, start: int, stop: int, grad: Tensor) -> None:
        """Takes what the backend left in `rows(start, stop).values`."""
        raise NotImplementedError

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """∂L/∂anchors [A, D] and ∂L/∂references [M, D]: None if the anchors are the references."""
        raise NotImplementedError
