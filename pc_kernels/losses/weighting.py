"""What an anchor weighs in the reduced loss: Σ_i w_i L_i."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import wide_dtype


def given_weights(anchors: Tensor, weights: Tensor | None) -> Tensor:
    """The user's weights [A] of anchors [A, ·], 1 by default; in float64 where the device has it."""
    dtype = wide_dtype(anchors.device)
    if weights is None:
        return anchors.new_ones(len(anchors), dtype=dtype)
    return weights.detach().to(dtype)


def anchor_weights(
    student: Tensor,
    weights: Tensor | None,
    pair_mask: Tensor | None,
    self_start: int | None,
) -> Tensor:
    """W [A], in float64 where the device has it: `weights`, 1 by default; 0 where nothing is to rank.

    Args:
        student: what a network says of A anchors, features or dissimilarities.
        weights: [A] or None.
        pair_mask: bool, broadcast to [A, M], or None.
        self_start: anchor i is reference self_start + i and left out; None: it is none of them.
    """
    if pair_mask is None:
        return given_weights(student, weights)
    dtype, anchors = wide_dtype(student.device), len(student)
    if pair_mask.shape[1] == 1:  # one word for all references of an anchor
        counts = pair_mask[:, 0].to(dtype)
    else:
        counts = pair_mask.sum(1, dtype=dtype)
        if self_start is not None:
            own = pair_mask.expand(anchors, -1).diagonal(self_start)[:anchors]
            counts = torch.add(counts, own, alpha=-1)
        counts = counts.ge_(2)  # 1 or 0, in the same dtype: launches are what this costs on a GPU
    if weights is None:
        return counts.expand(anchors)
    return given_weights(student, weights).masked_fill(counts == 0, 0)


def shares(weights: Tensor, total: Tensor | None = None) -> Tensor:
    """w_i / Σ w: what turns a sum into a weighted mean; 0 where all weights are.

    Weights whose sum is not finite have no shares: NaN. A sum below all normal numbers counts as the
    least of them.

    Args:
        weights: [A], in float64: in float32 the sum of large ones overflows, and small ones are 0.
        total: Σ w, where anchors of other processes count as well.
    """
    total = weights.sum() if total is None else total
    total = total.nan_to_num(torch.nan, torch.nan, torch.nan)
    return weights / total.clamp(min=torch.finfo(total.dtype).tiny)
