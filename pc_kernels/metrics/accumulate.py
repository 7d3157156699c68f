"""Metrics that take their data batch by batch, on one process or on several: update, compute, reset.

With `process_group=` the ranks of the group each update with their own data, in any number of batches;
all of them call `compute`, and get the metric of all the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..agreement import coherence_sums
from ..checks import check_cutoffs, check_features, check_retrieval
from ..dissimilarities import Dissimilarity
from ..lists import Lists
from ..recipe import Recipe
from ..reference import Coherence
from ..training.distributed import Group, GroupOrWorld, check_member, live_group, sum_over_ranks
from . import lists as of_lists
from .retrieval import Retrieval, Search, means


class Metric:
    """What is gathered from batch to batch, and what it comes to."""

    def __init__(self, process_group: GroupOrWorld | None = None) -> None:
        """Nothing gathered yet; process_group: the ranks that share the data."""
        self.process_group = process_group
        if process_group is not None and process_group != "world":
            check_member(process_group)
        self.reset()

    @property
    def group(self) -> Group | None:
        """The ranks that share the data."""
        return live_group(self.process_group)

    def _joint(self, sums: Tensor) -> Tensor:
        """This rank's sums, added over the ranks."""
        group = self.group
        return sums if group is None else sum_over_ranks(sums, group)

    def reset(self) -> None:
        """Forgets all data."""
        raise NotImplementedError

    def compute(self) -> Any:
        """The metric of all data since the last reset, that of all ranks; NaN without data."""
        raise NotImplementedError


class ListMetric(Metric):
    """The mean over lists of a metric of lists: only sums are kept."""

    measure: ClassVar[of_lists.Measure]
    """The metric of lists."""

    def __init__(self, *, process_group: GroupOrWorld | None = None, **options: Any) -> None:
        """Takes the options of the metric of lists, and the ranks that share the data."""
        super().__init__(process_group)
        of_lists.check_options(type(self).measure, options)
        self.options = options

    def reset(self) -> None:
        """See `Metric`."""
        self._sums = torch.zeros(2, dtype=torch.float64)

    @torch.no_grad()
    def update(
        self,
        scores: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> None:
        """Takes lists, as `ListLoss.forward` does."""
        lists = Lists.of(scores, labels, mask, offsets)
        found = of_lists.per_list_of(lists, type(self).measure.per_list, **self.options)
        total = torch.where(found.counted, found.values, 0).sum()
        self._sums = self._sums.to(scores.device) + torch.stack([total, found.counted.sum()])

    def compute(self) -> Tensor:
        """See `Metric`."""
        sums = self._joint(self._sums)
        return sums[0] / sums[1]


class NDCG(ListMetric):
    """The mean of `ndcg` over lists; k: of the first k places."""

    measure = of_lists.ndcg


class MRR(ListMetric):
    """The mean of `mrr` over lists; k: of the first k places."""

    measure = of_lists.mrr


class RecallAtK(ListMetric):
    """The mean of `recall_at_k` over lists; k: 10 by default."""

    measure = of_lists.recall_at_k


class MeanAveragePrecision(ListMetric):
    """The mean of `average_precision` over lists."""

    measure = of_lists.average_precision


class PoolMetric(Metric):
    """A metric of all items as one list: they are kept."""

    names: ClassVar[tuple[str, ...]] = ("scores", "labels")
    """What an update takes."""

    def reset(self) -> None:
        """See `Metric`."""
        self._kept: list[tuple[Tensor, ...]] = []

    def _keep(self, *batch: Tensor) -> None:
        self._kept.append(tuple(x.detach().clone() for x in batch))

    def _all(self) -> tuple[list[Tensor], range]:
        """The data of all ranks, one tensor for each of the names, and which rows are this rank's."""
        mine = [torch.cat(parts) for parts in zip(*self._kept, strict=True)]
        group = self.group
        if group is None:
            return mine, range(len(mine[0]) if mine else 0)
        ranks: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(ranks, [x.cpu() for x in mine], group=group)
        own = dist.get_rank(group)
        start = sum(len(data[0]) for data in ranks[:own] if data)
        device = mine[0].device if mine else "cpu"
        whole = [torch.cat(parts).to(device) for parts in zip(*filter(None, ranks), strict=True)]
        return whole, range(start, start + (len(mine[0]) if mine else 0))


class ScoreMetric(PoolMetric):
    """A metric of lists, of all items as one list."""

    measure: ClassVar[of_lists.Measure]
    """The metric of lists."""

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Takes scores and labels of any shape, the same for both."""
        Lists.of(scores, labels)
        self._keep(scores.reshape(-1), labels.reshape(-1))

    def compute(self) -> Tensor:
        """See `Metric`."""
        data, _ = self._all()
        if not data:
            return torch.tensor(torch.nan, dtype=torch.float64)
        return type(self).measure(*data)


class AUC(ScoreMetric):
    """`auc` of all items."""

    measure = of_lists.auc


class AveragePrecision(ScoreMetric):
    """`average_precision` of all items."""

    measure = of_lists.average_precision


class Spearman(ScoreMetric):
    """`spearman` of all items."""

    measure = of_lists.spearman


class KendallTau(ScoreMetric):
    """`kendall_tau` of all items."""

    measure = of_lists.kendall_tau


class RetrievalMetric(PoolMetric):
    """`retrieval` of all embeddings, each a query among the others."""

    def __init__(
        self,
        k: int | Sequence[int] = (1, 10),
        *,
        normalize: bool = True,
        process_group: GroupOrWorld | None = None,
    ) -> None:
        """Options as for `retrieval`."""
        super().__init__(process_group)
        self.k, self.normalize = check_cutoffs(k), normalize

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Takes embeddings [B, D] and labels, integers [B]."""
        check_retrieval(embeddings, labels, None, None, None)
        self._keep(embeddings, labels)

    @torch.no_grad()
    def compute(self) -> Retrieval:
        """See `Metric`; each rank takes its own queries."""
        data, own = self._all()
        sums = torch.zeros(3 + len(self.k), dtype=torch.float64)
        if data:
            embeddings, labels = data
            search = Search.of(embeddings, labels, None, None, self.normalize)
            sums = search.sums(self.k, own)
        return means(self._joint(sums), self.k)


class CoherenceMetric(PoolMetric):
    """`coherence` of all inputs, each an anchor among the others."""

    def __init__(
        self,
        *,
        dissimilarity: Dissimilarity = "euclidean",
        teacher_dissimilarity: Dissimilarity | None = None,
        process_group: GroupOrWorld | None = None,
    ) -> None:
        """Options as for `coherence`."""
        super().__init__(process_group)
        self.recipe = Recipe(dissimilarity, teacher_dissimilarity)

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Takes features [B, Ds] and [B, Dt] of the same inputs."""
        check_features(student, teacher, None, None)
        self._keep(student, teacher)

    @torch.no_grad()
    def compute(self) -> Coherence:
        """See `Metric`; each rank takes its own anchors."""
        data, own = self._all()
        sums = torch.zeros(3, dtype=torch.float64)
        if data:
            student, teacher = data
            sums = coherence_sums(student, teacher, None, None, self.recipe, own)
        sums = self._joint(sums)
        return Coherence(*(sums[:2] / sums[2]))
