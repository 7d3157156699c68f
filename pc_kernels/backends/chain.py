"""The chain of stages: dissimilarity -> rank -> loss -> gradient, one after the other in plain PyTorch.

It serves every row rule on every backend; fused kernels are a shortcut for some of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dissimilarities.gram_rows import dissimilarities_backward, true_dissimilarities
from ..dissimilarities.rows import Pairs, Rows

if TYPE_CHECKING:
    from ..recipe import Recipe
    from .base import Backend

WORKING_BYTES = 48
"""Working memory for each pair of a chunk: a dozen rows of float32 at the peak."""


def hard_rank_rows(engine: Backend, teacher: Rows, pairs: Pairs) -> Rows:
    """See `Backend.hard_rank_rows`."""
    d_t = engine.dissimilarity(teacher)
    keep = pairs.present(d_t)
    d_t = torch.where(keep, d_t, 0)
    finite = d_t.isfinite().all(1, keepdim=True)
    rank = torch.where(finite | ~keep, engine.hard_rank(d_t, keep), torch.nan)
    return Rows(rank, "ranked")


def coherence_rows(
    engine: Backend,
    student: Rows,
    teacher: Rows,
    weights: Tensor,
    pairs: Pairs,
    recipe: Recipe,
    with_grad: bool,
) -> Tensor:
    """See `Backend.coherence_rows`."""
    if teacher.dissimilarity != "ranked":
        teacher = engine.hard_rank_rows(teacher, pairs)
    target = teacher.values
    keep = pairs.present(target)
    d_s = torch.where(keep, engine.dissimilarity(student), 0)
    rank, density = engine.soft_rank(d_s, recipe, with_grad, keep)
    loss, slope = recipe.rule.value_and_slope(rank, target, keep)
    nothing = keep.sum(1) < 2  # to rank
    loss = torch.where(nothing, 0, loss)
    loss = torch.where((d_s + target).isfinite().all(1), loss, torch.nan)
    if with_grad:
        slope = slope * torch.where(nothing, 0, weights)[:, None]
        grad = engine.soft_rank_backward(slope, d_s, density, recipe, keep)
        grad = dissimilarities_backward(student, true_dissimilarities(student, d_s), grad)
        grad = torch.where(loss.isnan()[:, None], torch.nan, grad)
        student.values.copy_(torch.where(keep, grad, 0))
    return loss
