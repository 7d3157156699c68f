"""Losses of binary scores over a pool, of millions as well: AUC and average precision."""

from __future__ import annotations

from ..lists import Lists, PerList, halved
from ..recipe import Recipe
from .listwise import ListLoss, crossings, soft_places


class AUCLoss(ListLoss):
    """1 − AUC: the mean of Φ((s_j − s_i)/τ) over positives i and negatives j.

    The area under the ROC curve is the share of pairs in order (Hanley & McNeil 1982); smoothed by the
    logistic as in Yan et al., "Optimizing classifier performance via an approximation to the
    Wilcoxon–Mann–Whitney statistic" (ICML 2003). One pass over n scores, whatever their pairs. A pool
    without a positive or without a negative is 0 and not in the mean.

    Example:
        >>> loss = pc_kernels.AUCLoss()(scores, is_positive)    # [items] or [lists, items]

    Args: as for `ApproxNDCGLoss`. Labels are bool, or 0 and 1 (what is above 0 is positive).
    """

    def per_list(self, lists: Lists, recipe: Recipe) -> PerList:
        """See `ListLoss`."""
        positive = lists.labels > 0
        hits = lists.sum(positive)
        pairs = hits * (lists.lengths() - hits)
        wrong = crossings(halved(lists, lists.owner, positive), lists, recipe)
        return PerList(wrong / pairs.clamp(min=1), pairs > 0)


class AveragePrecisionLoss(ListLoss):
    """1 − (1/P) Σ_{j∈pos} R_pos(j)/R(j): average precision, by soft ranks among positives and all.

    The formula of Brown et al., "Smooth-AP" (ECCV 2020), of scores rather than embeddings. A pool without
    a positive is 0 and not in the mean.

    Example:
        >>> loss = pc_kernels.AveragePrecisionLoss()(scores, is_positive)    # [items] or [lists, items]

    Args: as for `ApproxNDCGLoss`. Labels are bool, or 0 and 1 (what is above 0 is positive).
    """

    def per_list(self, lists: Lists, recipe: Recipe) -> PerList:
        """See `ListLoss`."""
        hits = lists.select(lists.labels > 0)
        precision = soft_places(hits, hits, recipe) / soft_places(hits, lists, recipe)
        count = hits.lengths()
        return PerList(1 - hits.sum(precision) / count.clamp(min=1), count > 0)
