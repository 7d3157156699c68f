"""Metrics of retrieval: how early embeddings find those of their own class. Exact; queries in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_cutoffs, check_retrieval, compute_dtype
from ..positives import Positives
from ..precision import exact_arithmetic
from ..sweep import default_chunk_bytes

WORKING_BYTES = 24
"""Working memory for each similarity of a chunk: it, those in order, and their permutation."""


class Retrieval(NamedTuple):
    """Means over the queries that have positives; NaN if none has."""

    map_at_r: Tensor
    """MAP@R: (1/R) Σ_{j: R(j) ≤ R} R_pos(j)/R(j), of a query with R positives (Musgrave et al. 2020)."""
    mean_average_precision: Tensor
    """(1/R) Σ_j R_pos(j)/R(j), which 1 − `SmoothAPLoss(with_query=False)` tends to."""
    recall: dict[int, Tensor]
    """Recall@k by k: the share of queries with a positive among their first k."""


@torch.no_grad()
def retrieval(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    k: int | Sequence[int] = (1, 10),
    normalize: bool = True,
    chunk_bytes: int | None = None,
) -> Retrieval:
    """How early queries find the references of their own class, by similarity. No gradient.

    O(M log M) a query with M references. A tied reference has its mid-rank. A query is no reference of
    its own, and one without positives does not count.

    Args:
        embeddings: [B, D], the queries.
        labels: integers [B].
        ref_emb: references [M, D]; by default the other queries.
        ref_labels: integers [M].
        k: the k of recall@k.
        normalize: whether similarities are cosines, or else inner products.
        chunk_bytes: working memory; default 256 MiB, or more on a GPU that has it free.

    Returns:
        Retrieval(map_at_r, mean_average_precision, recall), float64. A NaN or an infinity makes all NaN.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
    """
    check_retrieval(embeddings, labels, None, ref_emb, ref_labels)
    found = Search.of(embeddings, labels, ref_emb, ref_labels, normalize)
    sums = found.sums(check_cutoffs(k), range(len(embeddings)), chunk_bytes)
    return means(sums, check_cutoffs(k))


def means(sums: Tensor, k: Sequence[int]) -> Retrieval:
    """The metrics of the sums that `Search.sums` makes."""
    of_r, of_all, *recall = (sums[1:] / sums[0]).unbind()
    return Retrieval(of_r, of_all, dict(zip(k, recall, strict=True)))


@dataclass(frozen=True)
class Search:
    """Queries and references, ready."""

    queries: Tensor
    """[B, D]."""
    references: Tensor
    """[M, D]."""
    positives: Positives

    @classmethod
    def of(
        cls,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        normalize: bool,
    ) -> Search:
        """Of what a user passes, checked."""
        dtype = compute_dtype(embeddings, ref_emb)
        queries, references = (
            torch.nn.functional.normalize(x.to(dtype)) if normalize else x.to(dtype)
            for x in (embeddings, embeddings if ref_emb is None else ref_emb)
        )
        return cls(queries, references, Positives.of(labels, ref_labels))

    def sums(self, k: Sequence[int], queries: range, chunk_bytes: int | None = None) -> Tensor:
        """Of some queries: how many count, Σ MAP@R, Σ AP, and Σ recall@k for each k; float64."""
        total = torch.zeros(3 + len(k), dtype=torch.float64, device=self.queries.device)
        own = torch.arange(queries.start, queries.stop, device=self.queries.device)
        others = self.positives.others()[own]
        order = others.argsort(descending=True)
        ranked = own[order][others[order] > 0]
        if ranked.numel() == 0:
            return total
        budget = chunk_bytes or default_chunk_bytes(self.queries.device)
        rows = max(1, budget // (WORKING_BYTES * len(self.references)))
        with exact_arithmetic(self.queries.device):
            for chunk in ranked.split(rows):
                total += self._sums(chunk, k)
        return total

    def _sums(self, queries: Tensor, k: Sequence[int]) -> Tensor:
        similarity = self.queries[queries] @ self.references.T
        defined = similarity.isfinite().all(1)
        columns, present = self.positives.columns(queries, with_itself=False)
        if self.positives.self_start is not None:
            similarity.scatter_(1, self.positives.self_start + queries[:, None], -torch.inf)
        found = torch.where(present, similarity.gather(1, columns), -torch.inf)
        place, among = places(found, similarity), places(found, found)
        precision = torch.where(present, among / place, 0)
        count = present.sum(1)
        inside = torch.where(place <= count[:, None], precision, 0)
        first = torch.where(present, place, torch.inf).amin(1)
        values = [inside.sum(1) / count, precision.sum(1) / count, *(first <= cut for cut in k)]
        rows = torch.stack([torch.ones_like(first), *(v.to(first) for v in values)], 1)
        return torch.where(defined[:, None], rows, torch.nan).sum(0)


def places(found: Tensor, among: Tensor) -> Tensor:
    """Mid-ranks from the top, from 1, of found [C, P] in the rows of `among` [C, M]: float64."""
    ordered = among.sort(1).values
    below = torch.searchsorted(ordered, found)
    not_above = torch.searchsorted(ordered, found, right=True)
    return among.shape[1] - not_above.double() + (not_above - below + 1) / 2
