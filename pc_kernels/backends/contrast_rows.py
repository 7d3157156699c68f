"""The stages of the contrastive loss, `contrast_columns` and `contrast_rows`, in plain PyTorch.

A row of logits z(i, j) is an anchor against all keys, one of which, its positive p, is the right one.
With the log-sum-exp of the others, its negatives, rows and columns have one formula, which loses no digit
however small the loss is:

    L_i = −log softmax_j(z_ij)[p] = softplus(ρ_i),   ρ_i = log Σ_{j≠p} exp z_ij − z_ip              (1)
    ∂L_i/∂z_ij = σ(ρ_i) · exp(z_ij) / Σ_{j≠p} exp z_ij,   ∂L_i/∂z_ip = −σ(ρ_i)                      (2)

The sigmoid form is Σ_{j≠p} softplus(z_ij) + softplus(−z_ip). The compiled kernels do the same:
csrc/cpu/contrast_rows.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import wide_dtype

WORKING_ROWS = 6
"""Working memory at the peak: that many times the logits of a chunk, beside them."""


class ColumnSlopes(NamedTuple):
    """What the columns add to the slopes of a chunk: factor_j exp(z_ij − shift_j), (2) down a column."""

    shift: Tensor
    """[N], for the first N keys: those that are positives of some anchor."""
    factor: Tensor
    """[N]."""
    own: Tensor
    """[C]: what is added to the slopes of the positives instead."""


class LogitRows(NamedTuple):
    """A chunk of C anchors against all K keys."""

    values: Tensor
    """[C, K], z: with_grad, overwritten with the slopes ∂L/∂z."""
    form: str
    """A key of `FORMS`."""
    start: int
    """The positive of anchor i is key start + i."""
    keep: Tensor | None = None
    """bool [C, K], contiguous: where it is False the key is absent; None: all are there."""
    target: Tensor | None = None
    """[C, K], the teacher's logits, of "distillation"; may be overwritten."""
    columns: ColumnSlopes | None = None
    """Of a loss in both directions."""


@dataclass
class ColumnSums:
    """The online log-sum-exp of each column's negatives: top + log(total), and the positives."""

    top: Tensor
    """[N], the largest so far."""
    total: Tensor
    """[N], Σ exp(z − top), in float64 where the device has it."""
    positive: Tensor
    """[N], in the same; inf where the pair is absent, which makes (1) and (2) 0."""

    @classmethod
    def empty(cls, columns: int, like: Tensor) -> ColumnSums:
        """Of no rows yet."""
        zeros = like.new_zeros(columns, dtype=wide_dtype(like.device))
        return cls(like.new_full((columns,), -torch.inf), zeros, zeros.clone())


def _positives(rows: LogitRows) -> Tensor:
    """Z of the positives [C], a view."""
    return rows.values.diagonal(rows.start)[: len(rows.values)]


def _take_positives(rows: LogitRows) -> Tensor:
    """Z of the positives [C], inf where absent; what is left are the negatives, −inf where absent."""
    if rows.keep is not None:
        rows.values.masked_fill_(~rows.keep, -torch.inf)
    positive = _positives(rows).clone()
    if rows.keep is not None:
        present = rows.keep.diagonal(rows.start)[: len(positive)]
        positive = torch.where(present, positive, torch.inf)
    _positives(rows).fill_(-torch.inf)
    return positive.to(wide_dtype(positive.device))


def _finite(top: Tensor) -> Tensor:
    """The largest of some logits, 0 if there are none."""
    return torch.where(top == -torch.inf, 0, top)


def contrast_columns(rows: LogitRows, sums: ColumnSums) -> None:
    """Adds a chunk's rows to the columns' sums."""
    count = len(sums.top)
    positive = _take_positives(rows)
    negatives = rows.values[:, :count]
    top = torch.maximum(sums.top, negatives.amax(0))
    sums.total *= (sums.top - _finite(top)).exp_()
    sums.total += (negatives - _finite(top)).exp_().sum(0, dtype=sums.total.dtype)
    sums.top = top
    sums.positive[rows.start : rows.start + len(positive)] = positive
    _positives(rows).copy_(positive)


def contrast_rows(rows: LogitRows, weights: Tensor, with_grad: bool) -> Tensor:
    """Losses [C] of the rows alone; with_grad, the slopes of Σ_i weights_i L_i and of the columns.

    A row with a NaN or an infinity where it is kept is NaN.
    """
    values, keep = rows.values, rows.keep
    low, high = torch.aminmax(values if keep is None else torch.where(keep, values, 0), dim=1)
    defined = low.isfinite() & high.isfinite()
    losses = FORMS[rows.form](rows, weights, with_grad).to(values.dtype)
    if with_grad:
        values.masked_fill_(~defined[:, None], torch.nan)
        if keep is not None:
            values.masked_fill_(~keep, 0)
    return torch.where(defined, losses, torch.nan)


def _softmax(rows: LogitRows, weights: Tensor, with_grad: bool) -> Tensor:
    """(1) and (2)."""
    positive, z, columns = _take_positives(rows), rows.values, rows.columns
    down = None
    if columns is not None and with_grad:
        down = (z[:, : len(columns.shift)] - columns.shift).exp_().mul_(columns.factor)
    top = _finite(z.amax(1))
    z.sub_(top[:, None]).exp_()
    total = z.sum(1, dtype=positive.dtype)
    margin = top - positive + total.log()
    if with_grad:
        pull = weights * margin.sigmoid()
        z.mul_(torch.where(total > 0, pull / total, 0).to(z.dtype)[:, None])
        own = -pull.to(z.dtype)
        if columns is not None and down is not None:
            z[:, : len(columns.shift)] += down
            own += columns.own
        _positives(rows).copy_(own)
    return softplus(margin)


def _sigmoid(rows: LogitRows, weights: Tensor, with_grad: bool) -> Tensor:
    """Every pair by itself: whether it is a positive."""
    positive, z = _take_positives(rows), rows.values
    losses = softplus(z).sum(1, dtype=positive.dtype) + softplus(-positive)
    if with_grad:
        z.sigmoid_().mul_(weights[:, None])
        _positives(rows).copy_(weights * -(-positive).sigmoid())
    return losses


def _distillation(rows: LogitRows, weights: Tensor, with_grad: bool) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(student)) = Σ_j t_j (log t_j − log p_j); its slopes are p_j − t_j."""
    z, y, keep = rows.values, rows.target, rows.keep
    assert y is not None
    if keep is not None:
        z.masked_fill_(~keep, -torch.inf)
        y.masked_fill_(~keep, -torch.inf)
    z.sub_(_finite(z.amax(1))[:, None])
    y.sub_(_finite(y.amax(1))[:, None])
    ahead = y - z if keep is None else torch.where(keep, y - z, 0)
    wide = wide_dtype(z.device)
    student, teacher = z.exp_(), y.exp_()
    of_student, of_teacher = (p.sum(1, dtype=wide).clamp(min=1) for p in (student, teacher))
    ahead = ahead.mul_(teacher).sum(1, dtype=wide) / of_teacher
    if with_grad:
        student.mul_((weights / of_student).to(z.dtype)[:, None])
        student.sub_(teacher.mul_((weights / of_teacher).to(z.dtype)[:, None]))
    return (ahead + of_student.log() - of_teacher.log()).clamp(min=0)


FORMS: dict[str, Callable[[LogitRows, Tensor, bool], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "distillation": _distillation,
}
"""What the rows become."""


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), to rounding everywhere."""
    return torch.logaddexp(x, x.new_zeros(()))
