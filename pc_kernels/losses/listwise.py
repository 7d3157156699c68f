"""Losses of learning to rank: lists of items, a score from the model and a label from the data for each.

They are functions of soft ranks from the top, R(j) = 1 + Σ_{k≠j} Φ((s_k − s_j)/τ), or sums over pairs; a
list of n items costs O(n), in place of the n² of the formulas (for RankNet O(n) a halving of its labels).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..cdf import smooth_cdf
from ..lists import Halves, Lists, PerList, best_places, gains, pairs_told_apart, told_apart
from ..recipe import SCORE_OPTIONS, Recipe
from .module import RecipeModule, reduced


class ListLoss(RecipeModule):
    """A loss of lists of scored items, as a module: a subclass says in `per_list` what a list's loss is.

    Each option is an attribute, which may be set between calls, and is then checked.
    """

    allowed = SCORE_OPTIONS
    names: ClassVar[tuple[str, str]] = ("scores", "labels")
    """What the two tensors are called in errors."""

    def forward(
        self,
        scores: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """The loss of lists, padded or laid one after the other.

        Args:
            scores: [lists, items], or of any shape [..., items]; or [N] with `offsets`. float32, float64,
                bfloat16 or float16: all but float64 is computed in float32.
            labels: of the same shape, real; no gradient.
            mask: bool, of the same shape: True where there is an item, False where there is padding.
            offsets: int64 [lists + 1]: list l is items offsets[l] … offsets[l+1]−1 of scores [N].

        Returns:
            A scalar; for reduction "none" the losses of the lists, [lists] or of the shape [...]. A NaN
            or an infinity among a list's scores or labels makes its loss NaN.

        Raises:
            TypeError, ValueError: an argument is not what is said here.
        """
        lists = Lists.of(scores, labels, mask, offsets, self.names)
        losses, counted = self.per_list(lists, self.recipe)
        losses = (losses + lists.undefined()).to(lists.scores.dtype)
        loss = reduced(losses, counted, self.recipe.reduction)
        return loss.view(lists.shape) if self.recipe.reduction == "none" else loss

    def per_list(self, lists: Lists, recipe: Recipe) -> PerList:
        """The losses of these lists."""
        raise NotImplementedError


def soft_places(lists: Lists, among: Lists, recipe: Recipe) -> Tensor:
    """R(j) = 1 + Σ_{k≠j} Φ((s_k − s_j)/τ) [n] of the items of `lists`, each one of those of `among`.

    The item itself counts Φ(0) = ½ in the sum over all; and sums are taken from the top, since an error
    that is small beside the number of items is large beside a small rank.
    """
    count = smooth_cdf(
        among.scores,
        lists.scores,
        temperature=recipe.temperature,
        relaxation=recipe.relaxation,
        tail="upper",
        source_offsets=among.offsets(),
        query_offsets=lists.offsets(),
        backend=recipe.backend,
    )
    return count + 0.5


def crossings(half: Halves, lists: Lists, recipe: Recipe, integral: bool = False) -> Tensor:
    """Σ Φ((s_j − s_i)/τ) over the pairs of an item i above and an item j below: by list, [L].

    Args:
        half: the pairs.
        lists: where they are from.
        recipe: says Φ and τ.
        integral: of Φ, which is softplus for the logistic, instead of Φ.
    """
    count = smooth_cdf(
        half.below,
        half.above,
        temperature=recipe.temperature,
        relaxation=recipe.relaxation,
        tail="upper",
        integral=integral,
        source_offsets=half.below_offsets,
        query_offsets=half.above_offsets,
        backend=recipe.backend,
    )
    return lists.sum(count, half.owner)


def misordered(lists: Lists, recipe: Recipe, integral: bool = False) -> Tensor:
    """`crossings` of all pairs of a list with labels y_i > y_j: [L]."""
    levels = (crossings(half, lists, recipe, integral) for half in told_apart(lists))
    return sum(levels, start=lists.sum(lists.scores * 0))


class ApproxNDCGLoss(ListLoss):
    """1 − Σ_j (2^y_j − 1)/log₂(1 + R(j)) / maxDCG, the gain of a list beside the best there is.

    Qin, Liu & Li, "A general approximation framework for direct optimization of information retrieval
    measures" (2010); as in TensorFlow Ranking and allRank, whose losses are this one less 1. A list
    without a label above 0 has nothing to rank: 0, and it is not in the mean. Labels are ≥ 0.

    Example:
        >>> loss_fn = pc_kernels.ApproxNDCGLoss(temperature=0.1)
        >>> loss = loss_fn(scores, relevance, mask)    # [lists, items] each -> scalar
        >>> loss = loss_fn(flat_scores, flat_relevance, offsets=offsets)

    Args:
        relaxation: the CDF Φ: a row of `pc_kernels.formulas.RELAXATIONS`, "logistic" by default.
        temperature: τ, in units of the scores. > 0.
        reduction: "mean" or "sum" over lists, or "none": one value a list.
        backend: see `python -m pc_kernels.info`.
    """

    def per_list(self, lists: Lists, recipe: Recipe) -> PerList:
        """See `ListLoss`; ranks are asked for only where there is a gain."""
        gain = gains(lists)
        best = lists.sum(gain / torch.log2(1 + best_places(lists).to(gain)))
        gainful = lists.select(gain != 0)
        place = soft_places(gainful, lists, recipe)
        dcg = gainful.sum(gain[gain != 0] / torch.log2(1 + place))
        counted = best > 0
        return PerList(1 - dcg / torch.where(counted, best, 1), counted)


class ApproxMRRLoss(ListLoss):
    """1 − Σ_j (y_j/R(j)) / Σ_j y_j: the mean reciprocal rank of the relevant items, labels y ≥ 0.

    Qin, Liu & Li (2010); as in TensorFlow Ranking, whose loss is this one less 1. A list without a label
    above 0 has nothing to rank: 0, and it is not in the mean.

    Example:
        >>> loss = pc_kernels.ApproxMRRLoss()(scores, clicks, mask)

    Args: as for `ApproxNDCGLoss`.
    """

    def per_list(self, lists: Lists, recipe: Recipe) -> PerList:
        """See `ListLoss`."""
        relevant = lists.select(lists.labels > 0)
        label = relevant.labels.to(lists.scores.dtype)
        total = relevant.sum(label)
        found = relevant.sum(label / soft_places(relevant, lists, recipe))
        counted = total > 0
        return PerList(1 - found / torch.where(counted, total, 1), counted)


class RankNetLoss(ListLoss):
    """The mean of softplus((s_j − s_i)/τ) over the pairs with y_i > y_j: cross entropy of their order.

    Burges et al., "Learning to rank using gradient descent" (ICML 2005), σ = 1/τ. The mean is over the
    pairs of a list, then over lists (allRank's is over all pairs of a batch). Labels are any numbers;
    with G different ones in a list it costs ⌈log₂ G⌉ passes over its items, never all pairs. Under the
    relaxation "normal" a pair costs the integral of that CDF. A list of equal labels is 0 and not in
    the mean.

    Example:
        >>> loss = pc_kernels.RankNetLoss()(scores, grades, mask)

    Args: as for `ApproxNDCGLoss`; the default temperature is 1.
    """

    defaults: ClassVar = {"temperature": 1.0}

    def per_list(self, lists: Lists, recipe: Recipe) -> PerList:
        """See `ListLoss`."""
        pairs = pairs_told_apart(lists)
        cost = misordered(lists, recipe, integral=True)
        return PerList(cost / pairs.clamp(min=1), pairs > 0)
