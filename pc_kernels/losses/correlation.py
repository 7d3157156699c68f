"""Losses of rank correlation: predictions against targets, of a batch or of lists."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..lists import Lists, PerList, hard_places, pairs_told_apart, wide_dtype
from ..recipe import Recipe
from .listwise import ListLoss, misordered, soft_places


class SpearmanLoss(ListLoss):
    """1 − ρ, the correlation of the predictions' soft ranks with the targets' hard mid-ranks.

    The loss of Blondel, Teboul, Berthet & Djolonga, "Fast differentiable sorting and ranking" (ICML
    2020), as torchsort's manual writes it, with the soft ranks of this package. A list of fewer than
    two items, or of equal targets, is 0 and not in the mean; equal predictions have ρ = 0 and no
    gradient.

    Example:
        >>> loss = pc_kernels.SpearmanLoss()(predictions, targets)    # [items] or [lists, items]

    Args: as for `ApproxNDCGLoss`; the temperature is in units of the predictions.
    """

    names: ClassVar = ("predictions", "targets")

    def per_list(self, lists: Lists, recipe: Recipe) -> PerList:
        """See `ListLoss`; the ranks of a list of n items have mean (n + 1)/2, soft or hard."""
        wide = wide_dtype(lists.scores.device)
        middle = ((lists.lengths() + 1).to(wide) / 2)[lists.owner]
        rank = soft_places(lists, lists, recipe).to(wide) - middle
        target = hard_places(lists, lists.labels) - middle
        spread, target_spread = lists.sum(rank.square()), lists.sum(target.square())
        counted = lists.varied(lists.labels)
        norm = spread * target_spread
        shown = lists.varied(lists.scores.detach()) & (norm > 0)
        rho = lists.sum(rank * target) / torch.where(shown, norm, 1).sqrt()
        return PerList(1 - torch.where(shown, rho, 0), counted)


class KendallLoss(ListLoss):
    """1 − τ̃ = 2 · the mean of Φ((s_j − s_i)/τ) over the pairs with targets t_i > t_j.

    τ̃ is Kendall's correlation with 2Φ(Δ/τ) − 1, for the logistic tanh(Δ/2τ), in place of the sign of a
    difference of predictions; pairs with equal targets do not count. After Zheng et al., "Improving
    few-shot image classification with Kendall's rank correlation" (2023), who have the product of both
    differences in the tanh. Any targets cost ⌈log₂ n⌉ passes over n items, never all pairs. A list of
    equal targets is 0 and not in the mean.

    Example:
        >>> loss = pc_kernels.KendallLoss()(predictions, targets)    # [items] or [lists, items]

    Args: as for `ApproxNDCGLoss`; the temperature is in units of the predictions.
    """

    names: ClassVar = ("predictions", "targets")

    def per_list(self, lists: Lists, recipe: Recipe) -> PerList:
        """See `ListLoss`."""
        pairs = pairs_told_apart(lists)
        wrong = misordered(lists, recipe)
        return PerList(2 * wrong / pairs.clamp(min=1), pairs > 0)
