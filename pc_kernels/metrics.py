"""What the loss stands for, measured: coherence; and the dissimilarity stage, standing alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import select
from .checks import (
    check_features,
    check_matrix,
    check_same_device,
    compute_dtype,
    first_order_only,
)
from .dissimilarity import Side, make_side
from .options import Metric, check_metric
from .reference import Coherence
from .rows import Rows, dissimilarities_backward
from .sweep import default_chunk_bytes, exact_arithmetic

COHERENCE_WORKING_BYTES = 192
"""Working memory for each pair of a chunk: 145 of integer ranks and permutations, and their holes."""


def pairwise_dissimilarity(
    x: Tensor, y: Tensor | None = None, metric: Metric = "euclidean"
) -> Tensor:
    """δ(i, j) of all rows of x and y, accurate for near-duplicates too, with gradients.

    Args:
        x: [A, D].
        y: [M, D]; by default x itself.
        metric: "euclidean", "sqeuclidean", "cosine", "cityblock" or a function ([A, D], [M, D]) ->
            [A, M]. A distance of 0 has gradient 0; a vector of zeros has cosine dissimilarity 1 to
            every vector.

    Returns:
        [A, M], in the dtype of x.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
    """
    check_matrix("x", x, "[rows, width]")
    check_metric("metric", metric)
    if y is not None:
        check_matrix("y", y, "[rows, width]")
        if x.shape[1] != y.shape[1]:
            raise ValueError(f"x and y must have the same width; got {x.shape[1]} and {y.shape[1]}")
        check_same_device(x=x, y=y)
    if callable(metric):
        return metric(x, x if y is None else y)
    return _Pairwise.apply(x, y, metric)


class _Pairwise(torch.autograd.Function):
    """All pairs through one Gram matrix; the backward through two products with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, metric: str) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.metric = metric
        side, _, d = _matrix(x, y, metric)
        return (d * side.unit).to(x.dtype)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, y = ctx.saved_tensors
        side, rows, d = _matrix(x, y, ctx.metric)
        with exact_arithmetic(x.device):
            grad = dissimilarities_backward(rows, d, grad.to(d.dtype) * side.unit)
            side.accumulate(0, x.shape[0], grad)
            to_x, to_y = side.gradients()
        return to_x.to(x.dtype), None if y is None or to_y is None else to_y.to(y.dtype), None


def _matrix(x: Tensor, y: Tensor | None, metric: str) -> tuple[Side, Rows, Tensor]:
    """The side of x and y, its rows, and δ [A, M] in the side's unit and the compute dtype."""
    dtype = compute_dtype(x) if y is None else compute_dtype(x, y)
    features = [None if v is None else v.detach().to(dtype).contiguous() for v in (x, y)]
    assert features[0] is not None
    with torch.no_grad(), exact_arithmetic(x.device):
        side = make_side(metric, features[0], features[1], True)
        rows = side.rows(0, x.shape[0])
        if rows.offsets is not None:  # distances themselves are wanted, not their differences
            rows.offsets = torch.zeros_like(rows.offsets)
        return side, rows, select("auto", x.device, dtype).dissimilarity(rows)


@torch.no_grad()
def coherence(
    student: Tensor,
    teacher: Tensor,
    student_refs: Tensor | None = None,
    teacher_refs: Tensor | None = None,
    *,
    dissimilarity: Metric = "euclidean",
    teacher_dissimilarity: Metric | None = None,
) -> Coherence:
    """How far student and teacher order the references of an anchor the same way. No gradient.

    O(m log m) for an anchor with m references; anchors go through in chunks.

    Args:
        student: features [A, Ds].
        teacher: features [A, Dt] of the same inputs.
        student_refs: references [M, Ds]; by default the other rows of the batch.
        teacher_refs: references [M, Dt].
        dissimilarity: as for `perception_coherence_loss`.
        teacher_dissimilarity: the teacher's, if another.

    Returns:
        Coherence(agreement, spearman), means over anchors, NaN where there is nothing to rank.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
    """
    check_features(student, teacher, student_refs, teacher_refs)
    check_metric("dissimilarity", dissimilarity)
    teacher_dissimilarity = (
        dissimilarity if teacher_dissimilarity is None else teacher_dissimilarity
    )
    check_metric("teacher_dissimilarity", teacher_dissimilarity)
    device, dtype = student.device, compute_dtype(student, teacher)
    features = [
        None if x is None else x.to(dtype).contiguous()
        for x in (student, teacher, student_refs, teacher_refs)
    ]
    s, t, s_refs, t_refs = features
    assert s is not None and t is not None
    backend = select("auto", device, dtype)
    anchors, references = s.shape[0], (s if s_refs is None else s_refs).shape[0]
    m = references - (s_refs is None)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    if m < 2 or anchors == 0:
        return Coherence(*(total + torch.nan).to(dtype))
    chunk = max(1, default_chunk_bytes(device) // (references * COHERENCE_WORKING_BYTES))
    with exact_arithmetic(device):
        student_side = make_side(dissimilarity, s, s_refs, False)
        teacher_side = make_side(teacher_dissimilarity, t, t_refs, False)
        for start in range(0, anchors, chunk):
            stop = min(start + chunk, anchors)
            d_s = backend.dissimilarity(student_side.rows(start, stop))
            d_t = backend.dissimilarity(teacher_side.rows(start, stop))
            if s_refs is None:
                keep = torch.ones_like(d_s, dtype=torch.bool)
                keep[torch.arange(stop - start), torch.arange(start, stop)] = False
                d_s, d_t = d_s[keep].view(-1, m), d_t[keep].view(-1, m)
            total += torch.stack([agreement_rows(d_s, d_t).sum(), spearman_rows(d_s, d_t).sum()])
    return Coherence(*(total / anchors).to(dtype))


def spearman_rows(d_s: Tensor, d_t: Tensor) -> Tensor:
    """Spearman's correlation of the rows of two matrices [C, m]: [C], float64; 0 for a constant row."""
    backend = select("auto", d_s.device, d_s.dtype)
    rank_s, rank_t = (backend.hard_rank(d).double() - 0.5 for d in (d_s, d_t))
    norm = (rank_s.square().sum(1) * rank_t.square().sum(1)).sqrt()
    return torch.where(norm == 0, 0, (rank_s * rank_t).sum(1) / norm)


def agreement_rows(d_s: Tensor, d_t: Tensor) -> Tensor:
    """Share of pairs that two matrices [C, m] order the same way, by row: [C], float64.

    Pairs tied on one side count half. With n pairs, of which c agree and d disagree, this is
    (1 + (c − d)/n)/2, and c + d is n less the tied ones (Knight 1966).
    """
    m = d_s.shape[1]
    defined = (d_s.isfinite() & d_t.isfinite()).all(1)
    d_s, d_t = (torch.where(defined[:, None], d, 0) for d in (d_s, d_t))
    below_s, tied_s = _place(d_s)
    below_t, tied_t = _place(d_t)
    _, tied_both = _place(below_s * m + below_t)
    by_s = below_s.argsort(dim=1, stable=True)
    by_both = by_s.gather(1, below_t.gather(1, by_s).argsort(dim=1, stable=True))
    disagree = inversions(below_s.gather(1, by_both))
    pairs = m * (m - 1) // 2
    agree = pairs - tied_s - tied_t + tied_both - disagree
    share = (1 + (agree - disagree).double() / pairs) / 2
    return torch.where(defined, share, torch.nan)


def _place(x: Tensor) -> tuple[Tensor, Tensor]:
    """For rows [C, m]: how many values lie below each, [C, m], and how many pairs are tied, [C]."""
    ordered = x.sort(dim=1).values
    below = torch.searchsorted(ordered, x)
    not_above = torch.searchsorted(ordered, x, right=True)
    return below, (not_above - below - 1).sum(1) // 2


def inversions(v: Tensor) -> Tensor:
    """Pairs i < j with v_i > v_j in rows of integers v [C, m], 0 ≤ v < m: [C].

    From the highest bit down, rows are kept in order of the bits seen so far. Two values that differ
    first in a bit are inverted if the one that has it set comes earlier. O(m) a bit.
    """
    rows, m = v.shape
    below = torch.zeros(rows, m + 1, dtype=v.dtype, device=v.device)  # below[x] = #{v < x}
    below = below.scatter_add_(1, v + 1, torch.ones_like(v)).cumsum(1)
    place = torch.arange(m, device=v.device).expand_as(v)
    total = torch.zeros(rows, dtype=v.dtype, device=v.device)
    for bit in reversed(range((m - 1).bit_length())):
        one = (v >> bit) & 1
        ones = one.cumsum(1) - one
        base = (v >> (bit + 1)) << (bit + 1)
        ones_here = ones - ones.gather(1, below.gather(1, base))  # those with the same higher bits
        total += (ones_here * (1 - one)).sum(1)
        split = below.gather(1, (base + (1 << bit)).clamp(max=m))
        target = torch.where(one == 1, split + ones_here, place - ones_here)
        v = torch.empty_like(v).scatter_(1, target, v)
    return total
