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
    own: Tensor | None
    """int64 [B], where among its own a query is itself; None where it is none of the references."""

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
        if ref_labels is None:
            self_start = 0
        own = None
        if self_start is not None:
            own = place.argsort()[self_start : self_start + len(labels)] - start
        return cls(place, start, stop - start, self_start, own)

    def others(self) -> Tensor:
        """How many positives a query has beside itself: int64 [B]."""
        return self.count if self.self_start is None else self.count - 1

    def columns(self, queries: Tensor, with_itself: bool) -> tuple[Tensor, Tensor]:
        """Those of some queries [C]: their places among the references, padded, and what is there.

        With_itself, a query that is a reference is among them.
        """
        count = (self.count if with_itself else self.others())[queries][:, None]
        rank = torch.arange(int(count.max()) if count.numel() else 0, device=queries.device)
        present = rank < count
        if self.own is not None and not with_itself:
            rank = rank + (rank >= self.own[queries][:, None])
        inside = torch.where(present, self.start[queries][:, None] + rank, 0)
        return self.place[inside], present

    def others_than(self, queries: Tensor) -> Tensor | None:
        """Which references are not the queries [C] themselves: bool [C, M]; None: all."""
        if self.self_start is None:
            return None
        references = torch.arange(len(self.place), device=queries.device)
        return references != self.self_start + queries[:, None]
