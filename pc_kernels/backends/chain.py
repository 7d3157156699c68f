"""The chain of stages: dissimilarity -> rank -> loss -> gradient, one after the other in plain PyTorch.

It serves every row rule on every backend; fused kernels are a shortcut for some of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dissimilarities.gram_rows import GRAM, dissimilarities_backward
from ..dissimilarities.rows import Chunk, Pairs, Rows, row_blocks

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
    target = engine.hard_rank(d_t, keep) + torch.where(_finite(d_t), 0, torch.nan)[:, None]
    return target if keep is None else torch.where(keep, target, 0)


def _finite(rows: Tensor) -> Tensor:
    """Whether rows [C, m] have no NaN and no infinity: [C]."""
    return (rows * 0).sum(1) == 0


def coherence_rows(engine: Backend, chunk: Chunk, recipe: Recipe, with_grad: bool) -> Tensor:
    """See `Backend.coherence_rows`."""
    losses = chunk.weights.new_empty(len(chunk.weights))
    for anchors in row_blocks(chunk.student.values):
        losses[anchors] = _coherence_block(engine, chunk.part(anchors), recipe, with_grad)
    return losses


def _coherence_block(engine: Backend, chunk: Chunk, recipe: Recipe, with_grad: bool) -> Tensor:
    """The same for a block of rows; the anchors themselves are cut out of their rows."""
    student, teacher, weights, pairs = chunk
    mask = None if pairs.keep is None else pairs.others(pairs.keep)
    distance = _distance(engine, student) if with_grad else None
    d_s = pairs.others(engine.dissimilarity(student))
    d_t = pairs.others(engine.dissimilarity(teacher))
    unit = _unit(student, recipe)
    d_s = d_s if unit is None else d_s * unit
    d_s = d_s if mask is None else torch.where(mask, d_s, 0)
    target = d_t if teacher.dissimilarity == "ranked" else _target(engine, d_t, mask)
    rank, back = engine.soft_rank_pass(d_s, recipe, with_grad, mask)
    keep = torch.ones_like(d_s, dtype=torch.bool) if mask is None else mask
    loss, slope = recipe.rule.value_and_slope(rank, target, keep)
    undefined = ~_finite(rank + target)
    nothing = torch.as_tensor(d_s.shape[1] < 2) if mask is None else mask.sum(1) < 2  # to rank
    poison = torch.where(undefined, torch.nan, 0)
    loss, weights = (torch.where(nothing, 0, x) for x in (loss, weights))
    loss = loss + poison
    if with_grad:
        grad = back(slope * weights[:, None]) + poison[:, None]
        grad = grad if unit is None else grad * unit
        distance = d_s if distance is None else pairs.others(distance)
        grad = dissimilarities_backward(student, distance, grad)
        grad = grad if mask is None else torch.where(mask, grad, 0)
        pairs.put_back(grad, student.values)
    return loss


def _distance(engine: Backend, student: Rows) -> Tensor | None:
    """What V depends on beside ∂L/∂δ, if on more than δ; the rows stay."""
    if student.gram is None or not GRAM[student.dissimilarity].by_distance:
        return None
    if student.values.device.type == "cpu" and not student.gram.offsets.any():
        return None  # δ is the distance
    return engine.true_dissimilarity(replace(student, values=student.values.clone()))


def _unit(student: Rows, recipe: Recipe) -> Tensor | None:
    """[1], what δ is to be multiplied by for a temperature that does not scale with it; None: nothing."""
    if recipe.scale is not None or student.gram is None or student.gram.unit.numel() == 0:
        return None
    return student.gram.unit ** GRAM[student.dissimilarity].power
