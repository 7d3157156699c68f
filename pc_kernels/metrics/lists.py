"""Metrics of lists of scored items, exact, in O(m log m) for a list of m items. No gradients.

Ties have one rule: a tied item has its mid-rank, the mean of the places that the tied ones take. So each
metric is what its loss tends to as the temperature goes to 0.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends import select
from ..checks import check_cutoffs, one_of
from ..lists import Lists, PerList, best_places, gains, hard_places, wide_dtype


class Measure(Protocol):
    """A metric of lists, as users call it."""

    per_list: Callable[..., PerList]
    """What it says of each list, with the same options."""

    def __call__(
        self,
        scores: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The metric; see `of_lists`."""


def of_lists(per_list: Callable[..., PerList]) -> Measure:
    """Makes a metric of what it says of each list.

    The metric takes scores and labels [..., items], a bool mask of the same shape, or both [N] with int64
    offsets [lists + 1], as `ListLoss.forward` does; and `reduction`, "mean" over the lists that count or
    "none". It returns float64; NaN for what does not count and for a list with a NaN.
    """

    def measure(
        scores: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        *,
        reduction: str = "mean",
        **options: Any,
    ) -> Tensor:
        one_of("reduction", reduction, ("mean", "none"))
        with torch.no_grad():
            lists = Lists.of(scores, labels, mask, offsets)
            values, counted = per_list_of(lists, per_list, **options)
        if reduction == "none":
            return torch.where(counted, values, torch.nan).view(lists.shape)
        return torch.where(counted, values, 0).sum() / counted.sum()

    *shared, _ = inspect.signature(measure).parameters.values()
    _, *own = inspect.signature(per_list).parameters.values()
    functools.update_wrapper(measure, per_list)
    measure.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    measure.per_list = per_list  # type: ignore[attr-defined]
    return measure  # type: ignore[return-value]


def per_list_of(lists: Lists, per_list: Callable[..., PerList], **options: Any) -> PerList:
    """What a metric says of each list; NaN, which counts, for lists with a NaN."""
    values, counted = per_list(lists, **options)
    unknown = lists.sum(lists.scores.isnan() | lists.labels.isnan()) > 0
    return PerList(torch.where(unknown, torch.nan, values), counted | unknown)


def check_options(measure: Measure, options: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError unless a metric has these options."""
    inspect.signature(measure.per_list).bind(None, **options)
    if options.get("k") is not None:
        check_cutoffs((options["k"],))


def _share(part: Tensor, whole: Tensor) -> PerList:
    """Part of whole [L]; lists of nothing do not count."""
    wide = wide_dtype(part.device)
    return PerList(part.to(wide) / torch.where(whole == 0, 1, whole), whole != 0)


def _top(place: Tensor, k: int | None) -> Tensor:
    """Whether a place is among the first k."""
    if k is None:
        return torch.ones_like(place, dtype=torch.bool)
    (cut,) = check_cutoffs((k,))
    return place <= cut


@of_lists
def average_precision(lists: Lists) -> PerList:
    """(1/P) Σ_{j∈pos} R_pos(j)/R(j), the places of the positives among themselves and among all.

    scikit-learn's `average_precision_score`, but for ties, which it counts as one threshold. A list
    without a positive (a label above 0) does not count.
    """
    positive = lists.labels > 0
    hits = lists.select(positive)
    place = hard_places(lists, lists.scores)[positive]
    return _share(hits.sum(hard_places(hits, hits.scores) / place), hits.lengths())


@of_lists
def recall_at_k(lists: Lists, *, k: int = 10) -> PerList:
    """The share of a list's positives (labels above 0) that are among its first k."""
    found = _top(hard_places(lists, lists.scores), k) & (lists.labels > 0)
    return _share(lists.sum(found), lists.sum(lists.labels > 0))


@of_lists
def ndcg(lists: Lists, *, k: int | None = None) -> PerList:
    """Σ (2^y − 1)/log₂(1 + R) beside the best there is, of the first k places or of all.

    Järvelin & Kekäläinen (2002) with the gains of Burges et al. (2005). scikit-learn's `ndcg_score` takes
    2^y − 1 as its y_true, and averages gains over ties. A list without a label above 0 does not count.
    """
    place = hard_places(lists, lists.scores)
    best = best_places(lists).to(place)
    gain = gains(lists)
    dcg, ideal = (
        lists.sum(torch.where(_top(x, k), gain / torch.log2(1 + x), 0)) for x in (place, best)
    )
    return _share(dcg, ideal)


@of_lists
def mrr(lists: Lists, *, k: int | None = None) -> PerList:
    """One over the place of a list's first positive (label above 0), 0 if that is beyond k."""
    place = hard_places(lists, lists.scores)
    found = torch.where(_top(place, k) & (lists.labels > 0), 1 / place, 0)
    first = found.new_zeros(lists.count).scatter_reduce(0, lists.owner, found, "amax")
    return PerList(first, lists.sum(lists.labels > 0) > 0)


@of_lists
def auc(lists: Lists) -> PerList:
    """The share of pairs of a positive (label above 0) and a negative that are in order; ties count half.

    scikit-learn's `roc_auc_score`. A list without one or the other does not count.
    """
    positive = lists.labels > 0
    hits = lists.select(positive)
    ahead = hits.sum(hard_places(lists, lists.scores)[positive])  # Σ of places, P(P + 1)/2 at best
    count = hits.lengths()
    misses = lists.lengths() - count
    wrong = _share(ahead - count * (count + 1) / 2, count * misses)
    return PerList(1 - wrong.values, wrong.counted)


@of_lists
def spearman(lists: Lists) -> PerList:
    """Spearman's ρ, the correlation of the mid-ranks of scores and labels; 0 where all scores are equal.

    SciPy's `spearmanr`. A list of equal labels does not count.
    """
    by_score, by_label = (hard_places(lists, x) for x in (lists.scores, lists.labels))
    middle = ((lists.lengths() + 1).to(by_score) / 2)[lists.owner]
    by_score, by_label = by_score - middle, by_label - middle
    spread, spread_of_labels = lists.sum(by_score.square()), lists.sum(by_label.square())
    norm = (spread * spread_of_labels).sqrt()
    rho = _share(lists.sum(by_score * by_label), norm)
    return PerList(rho.values, spread_of_labels > 0)


@of_lists
def kendall_tau(lists: Lists) -> PerList:
    """Kendall's τ_b = (c − d)/√((n − n_s)(n − n_y)), of n pairs with n_s, n_y tied; 0 for equal scores.

    SciPy's `kendalltau`. A list of equal labels does not count.
    """
    defined = ~(lists.scores.isnan() | lists.labels.isnan())
    wide = wide_dtype(lists.scores.device)
    x, y = (torch.where(defined, v, 0).to(wide) for v in (lists.scores, lists.labels))
    backend = select("auto", x.device, torch.float32)  # counts are exact in any
    pairs = backend.pair_counts(x, y, lists.offsets())
    told_x, told_y = ((pairs.all - tied).to(wide) for tied in (pairs.tied_x, pairs.tied_y))
    tau = _share((pairs.concordant - pairs.discordant).to(wide), (told_x * told_y).sqrt())
    return PerList(tau.values, told_y > 0)
