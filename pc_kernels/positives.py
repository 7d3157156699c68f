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
    self_start: int | None
    """Query i is reference self_start + i; None: it is none of them."""

    @classmethod
    def of(
        cls, labels: Tensor, ref_labels: Tensor | None, self_start: int | None = None
    ) -> Positives:
        """By labels [B], and [M] of the references if these are not the queries themselves."""
        labels = labels.long()
        theirs = labels if ref_labels is None else ref_labels.long()
        ordered, place = theirs.sort(stable=True)
        start = torch.searchsorted(ordered, labels)
        stop = torch.searchsorted(ordered, labels, right=True)
        return cls(place, start, stop - start, 0 if ref_labels is None else self_start)

    def others(self) -> Tensor:
        """How many positives a query has beside itself: int64 [B]."""
        return self.count if self.self_start is None else self.count - 1

    def columns(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Those of some queries [C]: their places among the references, padded, and what is there."""
        count = self.count[queries][:, None]
        rank = torch.arange(int(count.max()) if count.numel() else 0, device=queries.device)
        present = rank < count
        inside = torch.where(present, self.start[queries][:, None] + rank, 0)
        return self.place[inside], present

    def itself(self, queries: Tensor, columns: Tensor) -> Tensor:
        """Where these columns, [C, P] or [M], are the queries [C] themselves: bool [C, P] or [C, M]."""
        if self.self_start is None:
            return torch.zeros_like(queries, dtype=torch.bool)[:, None]
        return columns == self.self_start + queries[:, None]
