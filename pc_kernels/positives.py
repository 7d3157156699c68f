"""Which references are of a query's class, by labels: what losses and metrics of retrieval see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positives:
    """Which references are of each query's class."""

    place: Tensor
    """int64 [M], references in order of their labels."""
    start: Tensor
    """int64 [B], where a query's own begin in that order."""
    count: Tensor
    """int64 [B], how many they are."""
    own: bool
    """Whether the references are the queries, query i reference i."""

    @classmethod
    def of(cls, labels: Tensor, ref_labels: Tensor | None) -> Positives:
        """By labels [B], and [M] of the references if these are not the queries themselves."""
        theirs = labels if ref_labels is None else ref_labels
        ordered, place = theirs.sort(stable=True)
        start = torch.searchsorted(ordered, labels)
        stop = torch.searchsorted(ordered, labels, right=True)
        return cls(place, start, stop - start, ref_labels is None)

    def others(self) -> Tensor:
        """How many positives a query has beside itself: int64 [B]."""
        return self.count - 1 if self.own else self.count

    def columns(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Those of some queries [C]: their places among the references, padded, and what is there."""
        count = self.count[queries][:, None]
        rank = torch.arange(int(count.max()) if count.numel() else 0, device=queries.device)
        present = rank < count
        inside = torch.where(present, self.start[queries][:, None] + rank, 0)
        return self.place[inside], present
