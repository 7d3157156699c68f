"""What travels between the stages: a chunk of anchors against all references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Gram(NamedTuple):
    """What makes squared distances of a chunk's inner products."""

    anchors: Tensor
    """[C, D]."""
    references: Tensor
    """[M, D]."""
    anchor_sq: Tensor
    """Squared norms [C]."""
    reference_sq: Tensor
    """Squared norms [M]."""
    offsets: Tensor
    """[C]: |a| of an anchor that is far out, else 0; see `Rows`."""
    twins: Tensor
    """Int32 [M + 1], or [0]: see `NearOrigin`. These take the product of the first before it is used."""
    unit: Tensor
    """[1], where only the device knows what features were divided by; [0]: nobody has to."""


@dataclass
class Rows:
    """A chunk of anchors against all references.

    `values` [C, M] holds inner products, and `gram` what makes squared distances of them; without a
    `gram` it holds dissimilarities ("given"), or a teacher's hard ranks ("ranked").

    The distances of an anchor far out differ only in their last digits. Backends keep such a row, whose
    offset |a| is then not 0, as δ − |a| (squared distances as δ − |a|²): ranks do not change by it.
    """

    values: Tensor
    dissimilarity: str = "given"
    gram: Gram | None = None
    ready: bool = False
    """Whether `values` holds δ already, of Gram rows whose V the backend leaves: see `RowMaker`."""


class Pairs(NamedTuple):
    """Which references each anchor of a chunk has."""

    self_start: int | None = None
    """Anchor i is reference self_start + i, and left out; None: it is none of them."""
    keep: Tensor | None = None
    """bool [C, M], contiguous: where it is False the reference is absent; None: all are there."""

    def present(self, rows: Tensor) -> Tensor:
        """Bool [C, M]: whether anchor i has reference j; `rows` is of that shape and device."""
        everything = torch.ones_like(rows, dtype=torch.bool)
        keep = everything if self.keep is None else everything & self.keep
        if self.self_start is not None:
            keep.diagonal(self.self_start)[: len(keep)].fill_(False)
        return keep

    def other_columns(self, rows: Tensor) -> Tensor | None:
        """Of each anchor's references but itself, [C, M−1]; None if no anchor is a reference."""
        if self.self_start is None:
            return None
        own = torch.arange(self.self_start, self.self_start + len(rows), device=rows.device)
        column = torch.arange(rows.shape[1] - 1, device=rows.device)[None, :]
        return column + (column >= own[:, None])


class Chunk(NamedTuple):
    """A chunk of C anchors, as it reaches a loss."""

    student: Rows
    """The student's rows: their values are overwritten with the gradient, if one is wanted."""
    teacher: Rows
    """The teacher's rows, whose values may be overwritten unless they are ranks already."""
    weights: Tensor
    """[C], one for each anchor."""
    pairs: Pairs
