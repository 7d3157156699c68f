"""The definitions, in plain PyTorch: what every backend must compute.

Direct O(m²)-a-row formulas, any floating dtype, any device, differentiable by autograd. In float64
they are the truth that the tests compare with. Read them to know what the package computes; never use
them for speed: `perception_coherence_loss` builds a tensor of anchors × references × references.

Notation: δ(i, j) is the dissimilarity of anchor i and reference j, m the number of references of an
anchor, r_T and r_S the teacher's and the student's ranks, Φ a relaxation, τ_i a temperature.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from .cdf_rows import CdfKeywords, CdfOptions, CdfRows, make_options
from .formulas import HUBER_DELTA, PENALTIES, PROJECTIONS, RELAXATIONS
from .recipe import FEATURE_OPTIONS, MATRIX_OPTIONS, MatrixOptions, Options, make_recipe

__all__ = [
    "HUBER_DELTA",
    "Coherence",
    "coherence",
    "coherence_from_dissimilarities",
    "coherence_loss_from_dissimilarities",
    "hard_rank",
    "isotonic",
    "pairwise_dissimilarity",
    "perception_coherence_loss",
    "rank_penalty",
    "relaxation_cdf",
    "smooth_cdf",
    "soft_rank",
]


class Coherence(NamedTuple):
    """How far two representations order the references of an anchor the same way, on average."""

    agreement: Tensor
    """Share of reference pairs ordered the same way, in [0, 1]; a tie on either side counts half."""
    spearman: Tensor
    """Spearman's rank correlation of the two rows of dissimilarities, in [-1, 1]."""


def pairwise_dissimilarity(
    x: Tensor,
    y: Tensor | None = None,
    metric: str | Callable[[Tensor, Tensor], Tensor] = "euclidean",
) -> Tensor:
    """δ(i, j) between the rows of x [A, D] and of y [M, D] (of x itself by default): [A, M].

    A distance of 0 has gradient 0. A vector of zeros has cosine dissimilarity 1 to everything.
    """
    y = x if y is None else y
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if callable(metric):
        return metric(x, y)
    if metric == "cosine":
        return 1 - _unit(x) @ _unit(y).T
    difference = x[:, None, :] - y[None, :, :]
    if metric == "cityblock":
        return difference.abs().sum(-1)
    squared = difference.square().sum(-1)
    if metric == "sqeuclidean":
        return squared
    if metric == "euclidean":
        zero = squared == 0
        return torch.where(zero, 0, torch.where(zero, 1, squared).sqrt())
    raise ValueError(f"unknown metric {metric!r}")


def _unit(x: Tensor) -> Tensor:
    length = x.square().sum(-1, keepdim=True)
    zero = length == 0
    return torch.where(zero, 0, x / torch.where(zero, 1, length).sqrt())


def hard_rank(x: Tensor, dim: int = -1, keep: Tensor | None = None) -> Tensor:
    """Mid-ranks r(j) = (#{k≠j: x_k < x_j} + ½ #{k≠j: x_k = x_j}) / (m−1), in [0, 1]; ½ if m = 1.

    Where `keep` [..., m] is False the value is absent: not counted, and its own rank is 0.
    """
    x, keep, m = _present(x.movedim(dim, -1), keep)
    above = ((x[..., :, None] > x[..., None, :]) & keep[..., None, :]).to(x.dtype).sum(-1)
    equal = ((x[..., :, None] == x[..., None, :]) & keep[..., None, :]).to(x.dtype).sum(-1) - 1
    rank = torch.where(m > 1, (above + equal / 2) / (m - 1).clamp(min=1), 0.5)
    rank = torch.where(x.isnan().any(-1, keepdim=True), torch.nan, rank)
    return torch.where(keep, rank, 0).movedim(-1, dim)


def _present(x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """X [..., m] with 0 for what is absent, what is kept, and how many that are [..., 1]."""
    keep = torch.ones_like(x, dtype=torch.bool) if keep is None else keep
    return torch.where(keep, x, 0), keep, keep.sum(-1, keepdim=True)


def relaxation_cdf(x: Tensor, relaxation: str) -> Tensor:
    """Φ(x), the smooth step that replaces a comparison."""
    if relaxation not in RELAXATIONS:
        raise ValueError(f"unknown relaxation {relaxation!r}")
    return RELAXATIONS[relaxation].cdf(x)


def soft_rank(
    x: Tensor,
    temperature: float = 0.1,
    relaxation: str = "logistic",
    scale: str | None = None,
    dim: int = -1,
    keep: Tensor | None = None,
) -> Tensor:
    """r(j) = Σ_{k≠j} Φ((x_j − x_k)/τ) / (m−1), in [0, 1]; ½ if m = 1. A projection: `projected_rank`.

    τ = temperature, times the population standard deviation of the m values if scale is "std" (a
    row of equal values then has every rank ½ and no gradient). `keep` as for `hard_rank`.
    """
    x, keep, m = _present(x.movedim(dim, -1), keep)
    difference = x[..., :, None] - x[..., None, :]
    if scale == "std":
        mean = x.sum(-1, keepdim=True) / m.clamp(min=1)
        centred = torch.where(keep, x - mean, 0)
        constant = ((difference == 0) | ~(keep[..., :, None] & keep[..., None, :])).all(-1).all(-1)
        variance = centred.square().sum(-1, keepdim=True) / m.clamp(min=1)
        variance = torch.where(constant[..., None], 1, variance)
        difference = torch.where(constant[..., None, None], 0, difference)
        x = torch.where(constant[..., None], 0, x) if relaxation in PROJECTIONS else x
        tau = temperature * variance.sqrt()[..., None]
    else:
        tau = torch.full_like(difference[..., :1, :1], temperature)
    if relaxation in PROJECTIONS:
        rank = _projected_rank(x, tau[..., 0], keep, PROJECTIONS[relaxation].kl)
    else:
        steps = relaxation_cdf(difference / tau, relaxation)
        own = torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)
        rank = torch.where(own | ~keep[..., None, :], 0, steps).sum(-1) / (m - 1).clamp(min=1)
    rank = torch.where(m > 1, rank, 0.5)
    rank = torch.where(x.isfinite().all(-1, keepdim=True), rank, torch.nan)
    return torch.where(keep, rank, 0).movedim(-1, dim)


def isotonic(s: Tensor, w: Tensor, kl: bool = False) -> Tensor:
    """The isotonic regression v_j = min_{a≤j} max_{b≥j} A(a, b) of descending rows s and w [..., m].

    A(a, b) is the mean of s − w from a to b, or by the Kullback-Leibler divergence log Σ eˢ − log Σ eʷ.
    s − v is the projection of s onto the permutahedron of w (Blondel et al., ICML 2020).
    """
    if s.shape[-1] == 0:
        return s
    place = torch.arange(s.shape[-1], device=s.device)
    inside = place >= place[:, None]  # b ≥ a

    def total(x: Tensor) -> Tensor:
        """Σ_{k=a}^b of x, or of exp x relative to that of x_a: [..., a, b]."""
        if not kl:
            return torch.where(inside, x[..., None, :], 0).cumsum(-1)
        relative = torch.where(inside, x[..., None, :] - x[..., :, None], -torch.inf)
        return x[..., :, None] + torch.where(inside, relative.exp().cumsum(-1), 1).log()

    averages = total(s) - total(w)
    if not kl:
        averages = averages / (place - place[:, None] + 1).clamp(min=1)
    averages = torch.where(inside, averages, -torch.inf)
    best = averages.flip(-1).cummax(-1).values.flip(-1)  # over b ≥ j, of every a
    return torch.where(inside, best, torch.inf).amin(-2)


def _projected_rank(x: Tensor, tau: Tensor, keep: Tensor, kl: bool) -> Tensor:
    """The projection of (m − 1) x/τ onto the permutahedron of the places 0 … m − 1, over m − 1.

    By the Kullback-Leibler divergence: exp of that of x/τ onto that of log 1 … log m, less 1, over m − 1.
    Gaps beyond the places' range, over which nothing is pooled, are closed to just over it, which changes
    no rank; what is absent comes last, after such a gap.
    """
    others = (keep.sum(-1, keepdim=True) - 1).clamp(min=1).to(x.dtype)
    order = torch.where(keep, x, -torch.inf).argsort(-1, descending=True)
    ordered, there = x.gather(-1, order), keep.gather(-1, order)
    gaps = (ordered[..., :-1] - ordered[..., 1:]) / tau * (1 if kl else others)
    gaps = torch.where(there[..., 1:], gaps.minimum(others + 1), others + 1)
    s = torch.nn.functional.pad(-gaps.cumsum(-1), (1, 0))
    place = (others - torch.arange(x.shape[-1], device=x.device)).clamp(min=0)
    rank = s - isotonic(s, (place + 1).log() if kl else place, kl)
    rank = (rank.exp() - 1 if kl else rank) / others
    return torch.zeros_like(rank).scatter(-1, order, rank)


def smooth_cdf(
    sources: Tensor, queries: Tensor, weights: Tensor | None = None, **options: Unpack[CdfKeywords]
) -> Tensor:
    """F(y) = Σ_k w_k Φ((y − x_k)/τ) of sources x [..., m] at queries y [..., n].

    Weights, options, shapes and what comes of masks and NaN: see `pc_kernels.smooth_cdf`.
    """
    chosen = make_options(options)
    if chosen.source_offsets is not None and chosen.query_offsets is not None:
        return _cdf_of_lists(sources, queries, weights, chosen)
    sign = 1 if chosen.tail == "lower" else -1
    channelled = weights is not None and weights.dim() > sources.dim()
    w = torch.ones_like(sources) if weights is None else weights
    batch = (w.movedim(-2, 0) if channelled else w[None]), chosen.source_mask, chosen.query_mask
    rows = CdfRows(sign * sources, sign * queries, batch[0], None, None, *batch[1:])
    formula = chosen.recipe.smooth_step.kernel(chosen.kernel)
    sums = kernel_sums(rows, formula, chosen.temperature)
    return sums.movedim(0, -2) if channelled else sums[0]


def kernel_sums(rows: CdfRows, formula: Callable[[Tensor], Tensor], temperature: float) -> Tensor:
    """Σ_k w_k formula((y_j − x_k)/τ) of rows of matrices, of any batch shape: [W, ..., n]."""
    x, keep, _ = _present(rows.sources, rows.source_mask)
    y, asked, _ = _present(rows.queries, rows.query_mask)
    w = torch.ones_like(x)[None] if rows.weights is None else rows.weights
    w = torch.where(keep, w, 0)
    steps = formula((y[..., :, None] - x[..., None, :]) / temperature)
    sums = (w[..., None, :] * steps).sum(-1)
    finite = x.isfinite().all(-1) & y.isfinite().all(-1) & w.isfinite().all(-1).all(0)
    return torch.where(asked, torch.where(finite[..., None], sums, torch.nan), 0)


def _cdf_of_lists(
    sources: Tensor, queries: Tensor, weights: Tensor | None, options: CdfOptions
) -> Tensor:
    """List by list."""

    def parts(x: Tensor | None, offsets: Tensor | None) -> Sequence[Tensor | None]:
        bounds = [] if offsets is None else offsets.tolist()
        cuts = itertools.pairwise(bounds)
        return [None if x is None else x[..., first:past] for first, past in cuts]

    by_source = [parts(x, options.source_offsets) for x in (sources, weights, options.source_mask)]
    by_query = [parts(y, options.query_offsets) for y in (queries, options.query_mask)]
    alone = replace(options, source_offsets=None, query_offsets=None)
    found = [
        smooth_cdf(x, y, w, **{**vars(alone), "source_mask": keep, "query_mask": asked})
        for x, w, keep, y, asked in zip(*by_source, *by_query, strict=True)
    ]
    return torch.cat(found, -1) if found else queries[:0]


def rank_penalty(residual: Tensor, kind: str = "squared") -> Tensor:
    """ℓ(r_S − r_T)."""
    if kind not in PENALTIES:
        raise ValueError(f"unknown penalty {kind!r}")
    return PENALTIES[kind].value(residual)


def _without_self(d: Tensor) -> Tensor:
    """[B, B] without its diagonal: [B, B−1]."""
    b = d.shape[0]
    keep = ~torch.eye(b, dtype=torch.bool, device=d.device)
    return d[keep].view(b, b - 1) if b > 0 else d


def coherence_loss_from_dissimilarities(
    d_s: Tensor,
    d_t: Tensor,
    *,
    weights: Tensor | None = None,
    pair_mask: Tensor | None = None,
    exclude_self: bool = False,
    **options: Unpack[MatrixOptions],
) -> Tensor:
    """L_i = mean_j ℓ(r_S(i, j) − r_T(i, j)) over the rows of two matrices [A, M], reduced over i.

    With `exclude_self` the matrices are [B, B] and their diagonals are left out. Where `pair_mask`
    [A, M] is False, the reference is absent for that anchor. Fewer than two references rank nothing:
    the anchor's loss is 0, and it does not count in the mean, Σ w_i L_i / Σ w_i. Options: see `Recipe`.
    """
    recipe = make_recipe("coherence_loss_from_dissimilarities", options, MATRIX_OPTIONS)
    if pair_mask is not None:
        pair_mask = pair_mask.expand_as(d_s)
    if exclude_self:
        d_s, d_t = _without_self(d_s), _without_self(d_t)
        pair_mask = None if pair_mask is None else _without_self(pair_mask)
    d_s, keep, m = _present(d_s, pair_mask)
    d_t = torch.where(keep, d_t, 0)
    rank = soft_rank(d_s, recipe.temperature, recipe.relaxation, recipe.scale, keep=keep)
    target = hard_rank(d_t, keep=keep).to(d_s.dtype)
    target = torch.where(d_t.isfinite().all(-1, keepdim=True), target, torch.nan)
    value, _ = recipe.rule.value_and_slope(rank, target, keep)
    counted = m[:, 0] >= 2
    nothing = (d_s + d_t.to(d_s)).sum(-1) * 0
    rows = torch.where(counted, value, nothing)
    weights = torch.ones_like(rows) if weights is None else weights.to(rows)
    if recipe.reduction == "none":
        return weights * rows
    total = (weights * counted).sum()
    share = torch.where(total == 0, 1, total) if recipe.reduction == "mean" else 1
    return (weights * rows / share).sum()


def perception_coherence_loss(
    student: Tensor,
    teacher: Tensor,
    student_refs: Tensor | None = None,
    teacher_refs: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    pair_mask: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """The loss of features student [A, Ds] and teacher [A, Dt].

    References are the rest of the batch, or student_refs [M, Ds] with teacher_refs [M, Dt].
    `weights` [A] and `pair_mask` [A, M]: see `coherence_loss_from_dissimilarities`. Options: `Recipe`.
    """
    recipe = make_recipe("perception_coherence_loss", options, FEATURE_OPTIONS)
    d_s = pairwise_dissimilarity(student, student_refs, recipe.dissimilarity)
    d_t = pairwise_dissimilarity(teacher, teacher_refs, recipe.of_teacher)
    return coherence_loss_from_dissimilarities(
        d_s,
        d_t.detach(),
        weights=weights,
        pair_mask=pair_mask,
        exclude_self=student_refs is None,
        **{name: getattr(recipe, name) for name in MATRIX_OPTIONS},
    )


def coherence_from_dissimilarities(
    d_s: Tensor, d_t: Tensor, *, exclude_self: bool = False
) -> Coherence:
    """Agreement and Spearman's correlation of the rows of two matrices [A, M], averaged over rows.

    A row with fewer than two references has no pair and is not counted; a row that one side holds
    equal throughout has correlation 0.
    """
    if exclude_self:
        d_s, d_t = _without_self(d_s), _without_self(d_t)
    m = d_s.shape[-1]
    if m < 2 or d_s.shape[0] == 0:
        nothing = d_s.new_full((), torch.nan)
        return Coherence(nothing, nothing.clone())
    order_s = (d_s[:, :, None] - d_s[:, None, :]).sign()
    order_t = (d_t[:, :, None] - d_t[:, None, :]).sign()
    tau = (order_s * order_t.to(order_s)).sum((1, 2)) / (m * (m - 1))
    rank_s = hard_rank(d_s) - 0.5
    rank_t = hard_rank(d_t).to(rank_s) - 0.5
    norm = (rank_s.square().sum(-1) * rank_t.square().sum(-1)).sqrt()
    product = (rank_s * rank_t).sum(-1)
    spearman = torch.where(norm == 0, torch.zeros_like(norm), product / norm)
    return Coherence(((1 + tau) / 2).mean(), spearman.mean())


def coherence(
    student: Tensor,
    teacher: Tensor,
    student_refs: Tensor | None = None,
    teacher_refs: Tensor | None = None,
    *,
    dissimilarity: str | Callable[[Tensor, Tensor], Tensor] = "euclidean",
    teacher_dissimilarity: str | Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Coherence:
    """`coherence_from_dissimilarities` of features; arguments as for the loss."""
    return coherence_from_dissimilarities(
        pairwise_dissimilarity(student, student_refs, dissimilarity),
        pairwise_dissimilarity(teacher, teacher_refs, teacher_dissimilarity or dissimilarity),
        exclude_self=student_refs is None,
    )
