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
    anchors = range(len(student))
    *sums, count = coherence_sums(
        student, teacher, student_refs, teacher_refs, recipe, anchors
    ).unbind()
    dtype = compute_dtype(student, teacher, student_refs, teacher_refs)
    return Coherence(*((total / count).to(dtype) for total in sums))


def coherence_sums(
    student: Tensor,
    teacher: Tensor,
    student_refs: Tensor | None,
    teacher_refs: Tensor | None,
    recipe: Recipe,
    anchors: range,
) -> Tensor:
    """Over some anchors the sums of agreement and of correlation, and how many they are: float64 [3].

    Fewer than two references rank nothing: no anchor counts.
    """
    device = student.device
    dtype = compute_dtype(student, teacher, student_refs, teacher_refs)
    references = len(student if student_refs is None else student_refs)
    total = torch.zeros(3, dtype=torch.float64, device=device)
    if references - int(student_refs is None) < 2:
        return total
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
        for start in range(anchors.start, anchors.stop, chunk):
            stop = min(start + chunk, anchors.stop)
            d_s, d_t = (backend.dissimilarity(side.rows(start, stop)) for side in sides)
            pairs = Pairs(start if student_refs is None else None)
            d_s, d_t = pairs.others(d_s), pairs.others(d_t)
            agreement, spearman = agreement_rows(d_s, d_t), spearman_rows(d_s, d_t)
            count = total.new_tensor(stop - start)
            total += torch.stack([agreement.sum(), spearman.sum(), count])
    return total


def spearman_rows(d_s: Tensor, d_t: Tensor) -> Tensor:
    """Spearman's correlation of the rows of two matrices [C, m]: [C], float64; 0 for a constant row."""
    backend = select("auto", d_s.device, d_s.dtype)
    rank_s, rank_t = (backend.hard_rank(d).double() - 0.5 for d in (d_s, d_t))
    norm = (rank_s.square().sum(1) * rank_t.square().sum(1)).sqrt()
    return torch.where(norm == 0, 0, (rank_s * rank_t).sum(1) / norm)


def agreement_rows(d_s: Tensor, d_t: Tensor) -> Tensor:
    """Share of pairs that two matrices [C, m] order the same way, by row: [C], float64.

    Pairs tied on one side count half. With n pairs, of which c agree and d disagree, this is
    (1 + (c − d)/n)/2.
    """
    rows, m = d_s.shape
    dtype = torch.promote_types(d_s.dtype, d_t.dtype)
    defined = (d_s.isfinite() & d_t.isfinite()).all(1)
    d_s, d_t = (torch.where(defined[:, None], d, 0).to(dtype) for d in (d_s, d_t))
    offsets = torch.arange(0, rows * m + 1, m, device=d_s.device)
    backend = select("auto", d_s.device, dtype)
    counts = backend.pair_counts(d_s.reshape(-1), d_t.reshape(-1), offsets)
    share = (1 + (counts.concordant - counts.discordant).double() / counts.all) / 2
    return torch.where(defined, share, torch.nan)
