"""What travels between the stages: a chunk of anchors against all references."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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

    def part(self, anchors: slice) -> Gram:
        """Of these anchors."""
        return self._replace(
            anchors=self.anchors[anchors],
            anchor_sq=self.anchor_sq[anchors],
            offsets=self.offsets[anchors],
        )


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

    def part(self, anchors: slice) -> Rows:
        """Of these anchors, in the same memory."""
        gram = None if self.gram is None else self.gram.part(anchors)
        return replace(self, values=self.values[anchors], gram=gram)


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

    def others(self, rows: Tensor) -> Tensor:
        """The rows [C, M] without the anchors themselves, [C, M − 1], if they are references."""
        if self.self_start is None:
            return rows
        cut = rows.new_empty(len(rows), rows.shape[1] - 1)
        for part, whole in _parts(cut, rows, self.self_start):
            part.copy_(whole)
        return cut

    def put_back(self, cut: Tensor, rows: Tensor) -> None:
        """Writes what `others` has made of rows into them, and 0 to the anchors themselves."""
        if self.self_start is None:
            rows.copy_(cut)
            return
        rows.diagonal(self.self_start).zero_()
        for part, whole in _parts(cut, rows, self.self_start):
            whole.copy_(part)


def _parts(cut: Tensor, rows: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of what lies before the first anchor's own place, between two, and after the last.

    Of matrices [C, M − 1] and [C, M]: their rows follow one another, and from one own place to the next
    it is M + 1.
    """
    count, width = rows.shape
    last = first + (count - 1) * (width + 1)
    short, flat = cut.view(-1), rows.view(-1)
    start, end = first, last - count + 1  # in what is cut
    yield short[:start], flat[:first]
    between = flat[first + 1 : last + 1].view(count - 1, width + 1)
    yield short[start:end].view(count - 1, width), between[:, :width]
    yield short[end:], flat[last + 1 :]


class Chunk(NamedTuple):
    """A chunk of C anchors, as it reaches a loss."""

    student: Rows
    """The student's rows: their values are overwritten with the gradient, if one is wanted."""
    teacher: Rows
    """The teacher's rows, whose values may be overwritten unless they are ranks already."""
    weights: Tensor
    """[C], one for each anchor."""
    pairs: Pairs

    def part(self, anchors: slice) -> Chunk:
        """Of these anchors, in the same memory."""
        keep = None if self.pairs.keep is None else self.pairs.keep[anchors]
        own = None if self.pairs.self_start is None else self.pairs.self_start + anchors.start
        student, teacher = self.student.part(anchors), self.teacher.part(anchors)
        return Chunk(student, teacher, self.weights[anchors], Pairs(own, keep))


CACHED_VALUES = 1 << 16
"""Of a row block, for each thread of a CPU: a dozen matrices of them stay in its caches."""


def block_rows(width: int, device: torch.device) -> int:
    """Rows of so many values that passes over them stay in the caches of a CPU; elsewhere, any number."""
    if device.type != "cpu":
        return 1 << 62
    return torch.get_num_threads() * max(CACHED_VALUES // max(width, 1), 1)


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows [C, m], of `block_rows` each."""
    count, width = rows.shape
    block = min(count, block_rows(width, rows.device))
    for start in range(0, count, max(block, 1)):
        yield slice(start, min(start + block, count))
