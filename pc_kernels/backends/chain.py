"""The chain of stages: dissimilarity -> rank -> loss -> gradient, one after the other in plain PyTorch.

It serves every row rule on every backend; fused kernels are a shortcut for some of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dissimilarities.gram_rows import GRAM, dissimilarities_backward
from ..dissimilarities.rows import Chunk, Pairs, Rows

if TYPE_CHECKING:
    from ..recipe import Recipe
    from .base import Backend

WORKING_BYTES = 52
"""Working memory for each pair of a chunk: 13 rows of float32 at the peak."""


def hard_rank_rows(engine: Backend, teacher: Rows, pairs: Pairs) -> Rows:
    """See `Backend.hard_rank_rows`."""
    d_t = engine.dissimilarity(teacher)
    return Rows(_target(engine, d_t, pairs.present(d_t)), "ranked")


def _target(engine: Backend, d_t: Tensor, keep: Tensor | None) -> Tensor:
    """The teacher's ranks of rows [C, m]; NaN where kept in a row that is not finite."""
    d_t = d_t if keep is None else torch.where(keep, d_t, 0)
    undefined = ~d_t.isfinite().all(1, keepdim=True)
    if keep is not None:
        undefined = undefined & keep
    return torch.where(undefined, torch.nan, engine.hard_rank(d_t, keep))


def coherence_rows(engine: Backend, chunk: Chunk, recipe: Recipe, with_grad: bool) -> Tensor:
    """See `Backend.coherence_rows`; the anchors themselves are cut out of their rows."""
    student, teacher, weights, pairs = chunk
    columns = pairs.other_columns(student.values)

    def cut(rows: Tensor) -> Tensor:
        return rows if columns is None else rows.gather(1, columns)

    mask = None if pairs.keep is None else cut(pairs.keep)
    distance = _distance(engine, student) if with_grad else None
    d_s, d_t = cut(engine.dissimilarity(student)), cut(engine.dissimilarity(teacher))
    unit = _unit(student, recipe)
    d_s = d_s if unit is None else d_s * unit
    d_s = d_s if mask is None else torch.where(mask, d_s, 0)
    target = d_t if teacher.dissimilarity == "ranked" else _target(engine, d_t, mask)
    rank, density = engine.soft_rank(d_s, recipe, with_grad, mask)
    keep = torch.ones_like(d_s, dtype=torch.bool) if mask is None else mask
    loss, slope = recipe.rule.value_and_slope(rank, target, keep)
    nothing = keep.sum(1) < 2  # to rank
    loss = torch.where(nothing, 0, loss)
    loss = torch.where((d_s + target).isfinite().all(1), loss, torch.nan)
    if with_grad:
        slope = slope * torch.where(nothing, 0, weights)[:, None]
        grad = engine.soft_rank_backward(slope, d_s, density, recipe, mask)
        grad = grad if unit is None else grad * unit
        grad = dissimilarities_backward(student, d_s if distance is None else cut(distance), grad)
        grad = torch.where(loss.isnan()[:, None], torch.nan, grad)
        grad = grad if mask is None else torch.where(mask, grad, 0)
        if columns is None:
            student.values.copy_(grad)
        else:
            student.values.zero_().scatter_(1, columns, grad)
    return loss


def _distance(engine: Backend, student: Rows) -> Tensor | None:
    """What V depends on beside ∂L/∂δ, if anything; the rows stay."""
    if student.gram is None or not GRAM[student.dissimilarity].by_distance:
        return None
    return engine.true_dissimilarity(replace(student, values=student.values.clone()))


def _unit(student: Rows, recipe: Recipe) -> Tensor | None:
    """[1], what δ is to be multiplied by for a temperature that does not scale with it; None: nothing."""
    if recipe.scale is not None or student.gram is None or student.gram.unit.numel() == 0:
        return None
    return student.gram.unit ** GRAM[student.dissimilarity].power
