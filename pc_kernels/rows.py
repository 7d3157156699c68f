"""What travels between the stages: a chunk of anchors against all references.

And the stage `dissimilarity` on such rows in plain PyTorch, which is what backends fall back on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 1 / 64
"""Squared distances below this share of |a|² + |b|² are summed again from the differences."""


@dataclass
class Rows:
    """A chunk of anchors against all references.

    `values` [C, M] holds inner products and the other fields what makes squared distances of them;
    for metric "given" it holds dissimilarities, for "ranked" a teacher's hard ranks, and the rest is
    None.

    An anchor far out has distances that differ only in their last digits. Backends keep such a row,
    whose offset |a| is then not 0, as δ − |a| (squared distances as δ − |a|²): ranks do not mind.
    """

    values: Tensor
    metric: str = "given"
    anchors: Tensor | None = None  # [C, D]
    references: Tensor | None = None  # [M, D]
    anchor_sq: Tensor | None = None  # [C]
    reference_sq: Tensor | None = None  # [M]
    offsets: Tensor | None = None  # [C]
    ready: bool = False
    """Whether `values` holds δ already, of a metric whose V the backend leaves: see `RowMaker`."""


class RowMaker:
    """How the rows of the Gram metrics come about; backends may know better."""

    def empty_rows(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """A matrix of anything, of the dtype and on the device of `like`."""
        return like.new_empty(rows, columns)

    def straight(self, rows: Rows) -> bool:
        """Fills the values with δ straight from the features, if that beats a product of matrices.

        Says whether it has; who makes such rows `ready` finds them so in `coherence_rows` and its kin.
        """
        return False


PLAIN = RowMaker()


def squared_distances(rows: Rows) -> Tensor:
    """|a_i − b_j|² [C, M] of Gram rows, in plain PyTorch; the short ones from the differences."""
    assert rows.anchor_sq is not None and rows.reference_sq is not None
    assert rows.anchors is not None and rows.references is not None
    scale = rows.anchor_sq[:, None] + rows.reference_sq
    squared = torch.sub(scale, rows.values, alpha=2)
    i, j = torch.nonzero(squared < NEAR * scale, as_tuple=True)
    block = max(1, (1 << 20) // rows.anchors.shape[1])  # pairs whose differences are in memory
    for block_i, block_j in zip(i.split(block), j.split(block), strict=True):
        difference = rows.anchors[block_i] - rows.references[block_j]
        squared[block_i, block_j] = difference.square().sum(1)
    return squared


def dissimilarities(rows: Rows) -> Tensor:
    """δ(i, j) [C, M], less the row's offset (see `Rows`), in plain PyTorch."""
    if rows.metric in ("given", "ranked"):
        return rows.values
    assert rows.offsets is not None and rows.anchor_sq is not None and rows.reference_sq is not None
    squared = squared_distances(rows)
    offset = rows.offsets[:, None]
    excess = torch.sub(rows.reference_sq, rows.values, alpha=2)
    near = squared < NEAR * (rows.anchor_sq[:, None] + rows.reference_sq)
    excess = torch.where(near, squared - rows.anchor_sq[:, None], excess)
    if rows.metric == "euclidean":
        distance = squared.clamp(min=0).sqrt()  # √(x+y) − √x = y/(√(x+y) + √x)
        return torch.where(offset > 0, excess / (distance + offset), distance)
    return torch.where(offset > 0, excess, squared) if rows.metric == "sqeuclidean" else squared / 2


def true_dissimilarities(rows: Rows, d: Tensor) -> Tensor:
    """What `dissimilarities` leaves, with the rows' offsets."""
    if rows.offsets is None:
        return d
    offset = rows.offsets.square() if rows.metric == "sqeuclidean" else rows.offsets
    return d + offset[:, None]


def dissimilarities_backward(rows: Rows, d: Tensor, grad: Tensor) -> Tensor:
    """∂L/∂δ to V (see the top of this file), in plain PyTorch; d are the true dissimilarities."""
    if rows.metric == "euclidean":
        return torch.where(d == 0, 0, grad / d)
    return grad * 2 if rows.metric == "sqeuclidean" else grad
