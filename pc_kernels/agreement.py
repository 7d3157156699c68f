"""What the loss stands for, measured: how far two networks agree on the order of the references."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import select
from .checks import check_features, compute_dtype
from .dissimilarities import Dissimilarity, Pairs, Points, make_side
from .precision import exact_arithmetic
from .recipe import Recipe
from .reference import Coherence
from .sweep import default_chunk_bytes

COHERENCE_WORKING_BYTES = 192
"""Working memory for each pair of a chunk: 145 of integer ranks and permutations, and their holes."""


@torch.no_grad()
def coherence(
    student: Tensor,
    teacher: Tensor,
    student_refs: Tensor | None = None,
    teacher_refs: Tensor | None = None,
    *,
    dissimilarity: Dissimilarity = "euclidean",
    teacher_dissimilarity: Dissimilarity | None = None,
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
    recipe = Recipe(dissimilarity, teacher_dissimilarity)
    device = student.device
    dtype = compute_dtype(student, teacher, student_refs, teacher_refs)
    anchors, references = len(student), len(student if student_refs is None else student_refs)
    m = references - (student_refs is None)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    if m < 2 or anchors == 0:
        return Coherence(*(total + torch.nan).to(dtype))
    backend = select("auto", device, dtype)
    chunk = max(1, default_chunk_bytes(device) // (references * COHERENCE_WORKING_BYTES))
    with exact_arithmetic(device):
        sides = [
            make_side(name, Points.of(x, refs, dtype), with_grad=False)
            for name, x, refs in (
                (recipe.dissimilarity, student, student_refs),
                (recipe.of_teacher, teacher, teacher_refs),
            )
        ]
        for start in range(0, anchors, chunk):
            stop = min(start + chunk, anchors)
            d_s, d_t = (backend.dissimilarity(side.rows(start, stop)) for side in sides)
            others = Pairs(start if student_refs is None else None).other_columns(d_s)
            if others is not None:
                d_s, d_t = d_s.gather(1, others), d_t.gather(1, others)
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
