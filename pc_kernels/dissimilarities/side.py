"""One half of a sweep over chunks of anchors: features in, rows of δ out, and gradients back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .rows import Rows


class Points(NamedTuple):
    """The features that dissimilarities are of."""

    anchors: Tensor
    """[A, D]."""
    references: Tensor | None
    """[M, D]; None: the anchors themselves."""

    @classmethod
    def of(cls, anchors: Tensor, references: Tensor | None, dtype: torch.dtype) -> Points:
        """Features as sides take them: contiguous, without a graph, in the compute dtype."""
        ready = anchors.detach().to(dtype).contiguous()
        if references is None:
            return cls(ready, None)
        return cls(ready, references.detach().to(dtype).contiguous())


class Side:
    """The student's or the teacher's half of a sweep over chunks of anchors."""

    unit = 1.0
    """What the dissimilarities of `rows` are to be multiplied by: 1 but for extreme features."""
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
