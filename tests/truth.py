"""The truth in float64: the definitions of `pc_kernels.reference`, a few rows at a time.

The reference needs references² an anchor; it is called on chunks of anchors, since rows do not know of
each other. Beside values and gradients it gives the floors of tolerances.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from tolerances import RANK, U
from torch import Tensor

from pc_kernels import reference

PAIRS_AT_ONCE = 4_000_000


def pdf(z: Tensor, relaxation: str) -> Tensor:
    """φ = Φ′."""
    if relaxation == "logistic":
        return torch.sigmoid(z) * torch.sigmoid(-z)
    if relaxation == "laplace":
        return torch.exp(-z.abs()) / 2
    return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def row_temperature(x: Tensor, temperature: float, scale: str | None) -> Tensor:
    """τ [N, 1] of rows x [N, m]; 1 for a constant row under "std"."""
    if scale is None:
        return torch.full_like(x[:, :1], temperature)
    sigma = x.std(1, correction=0, keepdim=True)
    return torch.where((x == x[:, :1]).all(1, keepdim=True), 1, temperature * sigma)


def chunks(rows: int, m: int) -> range:
    """Starts of chunks of rows with few enough pairs; the step is their size."""
    return range(0, rows, max(1, PAIRS_AT_ONCE // max(m * m, 1)))


@dataclass
class Ranks:
    """Soft ranks of rows, the gradient of Σ upstream · rank, and the floor of it."""

    rank: Tensor
    grad: Tensor
    magnitude: Tensor
    """Σ_k (|g_j| + |g_k|) φ/τ / (m − 1): times a rounding, the floor."""


def soft_rank(
    x: Tensor, upstream: Tensor, temperature: float, relaxation: str, scale: str | None
) -> Ranks:
    """Of rows x [N, m]. A long row is summed in blocks by the formulas of docs/method.md instead."""
    x, upstream = x.detach().double(), upstream.double()
    m = x.shape[1]
    if m * m > PAIRS_AT_ONCE:
        rows = [
            _long_row(r, g, temperature, relaxation, scale)
            for r, g in zip(x, upstream, strict=True)
        ]
        return Ranks(*(torch.stack(part) for part in zip(*rows, strict=True)))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    step = chunks(len(x), m).step
    for start in chunks(len(x), m):
        leaf = x[start : start + step].clone().requires_grad_()
        g = upstream[start : start + step]
        rank = reference.soft_rank(leaf, temperature, relaxation, scale)
        rank.backward(g)
        magnitude = sum_of_pairs(leaf.detach(), g.abs(), temperature, relaxation, scale)
        parts.append((rank.detach(), leaf.grad, magnitude / max(m - 1, 1)))
    return Ranks(*(torch.cat(part) for part in zip(*parts, strict=True)))


@dataclass
class SmoothCdf:
    """Sums at queries, the gradients of Σ upstream · sum, and what both are made of."""

    sums: Tensor
    reach: Tensor
    """Σ_k |w_k| K, of the normal relaxation 1.5 τ further on."""
    grads: list[Tensor | None]
    """In sources, queries and weights."""
    grad_sizes: list[Tensor | None]
    """The same with all terms positive."""
    largest_weight: float


def smooth_cdf(
    inputs: tuple[Tensor, Tensor, Tensor | None], upstream: Tensor, **options: Any
) -> SmoothCdf:
    """By autograd through the definition."""
    results = []
    for absolute in (False, True):
        x, y, w = (None if v is None else v.detach().double() for v in inputs)
        if absolute and w is not None:
            w = w.abs()
        leaves = [None if v is None else v.clone().requires_grad_() for v in (x, y, w)]
        sums = reference.smooth_cdf(*leaves, **options)
        sums.backward(upstream.double().abs() if absolute else upstream.double())
        if absolute and options.get("relaxation") == "normal":
            step = options["temperature"] * (1.5 if options.get("tail") != "upper" else -1.5)
            sums = reference.smooth_cdf(x, y + step, w, **options)
        results.append((sums.detach(), [None if v is None else v.grad for v in leaves]))
    (sums, grads), (reach, grad_sizes) = results
    largest = 1.0
    if inputs[2] is not None and inputs[2].numel() > 0:
        largest = inputs[2].double().abs().nan_to_num(0.0).max().item()
    return SmoothCdf(sums, reach, grads, grad_sizes, largest)


def sum_of_pairs(
    x: Tensor, weight: Tensor, temperature: float, relaxation: str, scale: str | None
) -> Tensor:
    """Σ_k (weight_j + weight_k) φ((x_j − x_k)/τ)/τ of rows x [N, m], k = j included."""
    tau = row_temperature(x, temperature, scale)
    density = pdf((x[:, :, None] - x[:, None, :]) / tau[:, :, None], relaxation)
    return ((weight[:, :, None] + weight[:, None, :]) * density).sum(2) / tau


def _long_row(
    x: Tensor, g: Tensor, temperature: float, relaxation: str, scale: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    m = len(x)
    tau = row_temperature(x[None], temperature, scale).item()
    rank, grad, magnitude = (torch.empty_like(x) for _ in range(3))
    for start in range(0, m, block := max(1, PAIRS_AT_ONCE // m)):
        part = slice(start, start + block)
        z = (x[part, None] - x[None]) / tau
        rank[part] = (reference.relaxation_cdf(z, relaxation).sum(1) - 0.5) / (m - 1)
        density = pdf(z, relaxation)
        grad[part] = g[part] * density.sum(1) - density @ g
        magnitude[part] = g[part].abs() * density.sum(1) + density @ g.abs()
    grad, magnitude = grad / tau / (m - 1), magnitude / tau / (m - 1)
    if scale == "std":
        standard = (x - x.mean()) / x.std(correction=0)
        grad = grad - standard * (grad * standard).mean()
    return rank, grad, magnitude


@dataclass
class Coherence:
    """Losses [A] of rows, the gradient [A, M] of Σ weights · loss, and the floors of both."""

    losses: Tensor
    grad: Tensor
    loss_floor: Tensor
    """What the losses change by if all ranks are off by 1."""
    grad_floor: Tensor
    """A float32 gradient's floor, [A, M]."""
    density: Tensor
    """Σ_k φ (δ_j + δ_k)/τ / (m − 1) [A, M]: how far rounding all δ by 1 would move a rank."""


def coherence_rows(
    d_s: Tensor,
    d_t: Tensor,
    weights: Tensor | None = None,
    *,
    own: Tensor | None = None,
    keep: Tensor | None = None,
    relaxation: str = "logistic",
    temperature: float = 0.1,
    scale: str | None = "std",
    penalty: str = "squared",
    rounding: float = 8 * U,
) -> Coherence:
    """The loss of two matrices [A, M], row by row, weighted by `weights` [A] (1 by default).

    Anchor i leaves out its own[i]-th reference, if `own` is given, and those that `keep` [A, M] does
    not keep: they are taken out of the matrices.
    """
    d_s, d_t = d_s.detach().double(), d_t.detach().double()
    weights = d_s.new_ones(len(d_s)) if weights is None else weights.double()
    if own is not None:
        keep = torch.ones_like(d_s, dtype=torch.bool) if keep is None else keep.clone()
        keep[torch.arange(len(d_s)), own] = False
    if keep is not None:
        options: dict[str, Any] = {"relaxation": relaxation, "temperature": temperature}
        options["scale"] = scale
        options |= {"penalty": penalty, "rounding": rounding}
        if len(keep) > 1 and keep.sum(1).unique().numel() > 1:
            rows = [
                coherence_rows(*(x[i : i + 1] for x in (d_s, d_t, weights)), keep=row, **options)
                for i, row in enumerate(keep.split(1))
            ]
            fields = zip(*(vars(row).values() for row in rows), strict=True)
            return Coherence(*(torch.cat(parts) for parts in fields))
        others = (len(d_s), int(keep[:1].sum()))
        inner = coherence_rows(d_s[keep].view(others), d_t[keep].view(others), weights, **options)
        grad, floor, density = (
            torch.zeros_like(d_s).masked_scatter_(keep, part)
            for part in (inner.grad, inner.grad_floor, inner.density)
        )
        return Coherence(inner.losses, grad, inner.loss_floor, floor, density)
    rank_options = (temperature, relaxation, scale)
    m = d_s.shape[1]
    if m < 2 or len(d_s) == 0:
        nothing = torch.zeros_like(d_s)
        losses = (d_s + d_t).sum(1) * 0
        return Coherence(losses, nothing, torch.zeros_like(losses), nothing, nothing)
    parts: list[tuple[Tensor, ...]] = []
    step = chunks(len(d_s), m).step
    for start in chunks(len(d_s), m):
        part = slice(start, start + step)
        leaf, target, w = d_s[part].clone().requires_grad_(), d_t[part], weights[part]
        losses = reference.coherence_loss_from_dissimilarities(
            leaf,
            target,
            relaxation=relaxation,
            temperature=temperature,
            scale=scale,
            penalty=penalty,
            reduction="none",
        )
        losses.backward(w)
        x = leaf.detach()
        residual = reference.soft_rank(x, *rank_options) - reference.hard_rank(target)
        error = slope_error(residual, penalty, rounding) * w.abs()[:, None] / m
        floor = sum_of_pairs(x, error, *rank_options) / (m - 1)
        density = sum_of_pairs(x, x.abs(), *rank_options) / (m - 1)
        slope = slope_size(residual, penalty)
        parts.append((losses.detach(), leaf.grad, slope.mean(1), floor, density))
    return Coherence(*(torch.cat(part) for part in zip(*parts, strict=True)))


def slope_size(residual: Tensor, penalty: str) -> Tensor:
    """|ℓ′|."""
    if penalty == "squared":
        return 2 * residual.abs()
    if penalty == "absolute":
        return torch.ones_like(residual)
    return residual.abs().clamp(max=reference.HUBER_DELTA)


def slope_error(residual: Tensor, penalty: str, rounding: float) -> Tensor:
    """What ℓ′ may be off by: its own rounding, that of the residual, and where it steps the step."""
    own = slope_size(residual, penalty) * rounding
    if penalty == "absolute":
        return own + 2.0 * (residual.abs() <= RANK)
    return own + (2 if penalty == "squared" else 1) * rounding


@dataclass
class Features:
    """The whole loss from features: `Coherence`, with gradients in the features."""

    losses: Tensor
    loss_tolerance: Tensor
    """What the roundings of the ranks and, below temperature 0.1, of distances may add, [A]."""
    grads: list[Tensor]
    """In the student's features, and in its references' if there are any."""
    grad_floor: float
    kappa: float
    """Mean δ/τ."""
    conditioning: list[float]
    """What the gradients' norms move by if all distances are rounded otherwise; 0 if `strict`."""


ROUNDED_OTHERWISE = 4
"""So often, to see what becomes of gradients."""


def features(
    student: Tensor,
    teacher: Tensor,
    refs: tuple[Tensor, Tensor] | None,
    weights: Tensor,
    metric: Any = "euclidean",
    teacher_metric: Any = None,
    *,
    rounding: float = 8 * U,
    distance_rounding: float = 2 * U,
    strict: bool = True,
    only: Tensor | None = None,
    keep: Tensor | None = None,
    **options: Any,
) -> Features:
    """Σ weights · loss over the anchors; not `strict`: distances may carry roundings.

    `only`: the places of the anchors that count, with a weight each; the others have weight 0.
    `keep` [A, M]: the pairs that count.
    """
    leaves = [student.detach().double().requires_grad_()]
    if refs is not None:
        leaves.append(refs[0].detach().double().requires_grad_())
    places = torch.arange(len(student)) if only is None else only
    anchors = leaves[0][places]
    d_s = reference.pairwise_dissimilarity(anchors, leaves[-1], metric)
    d_t = reference.pairwise_dissimilarity(
        teacher[places].double(),
        (refs[1] if refs is not None else teacher).double(),
        teacher_metric or metric,
    )
    own = places if refs is None else None
    rows = coherence_rows(d_s, d_t, weights, own=own, keep=keep, rounding=rounding, **options)
    d_s.backward(rows.grad, retain_graph=True)
    conditioning = [0.0] * len(leaves)
    rng = torch.Generator().manual_seed(0)
    for _ in range(0 if strict else ROUNDED_OTHERWISE):
        signs = torch.randint(0, 2, d_s.shape, generator=rng).double() * 2 - 1
        moved = d_s.detach() * (1 + distance_rounding * signs)
        other = coherence_rows(
            moved, d_t, weights, own=own, keep=keep, rounding=rounding, **options
        )
        change = torch.autograd.grad(d_s, leaves, other.grad - rows.grad, retain_graph=True)
        conditioning = [max(a, b.norm().item()) for a, b in zip(conditioning, change, strict=True)]
    # Pairs' roundings are independent: they add up in quadrature, in both ends of each pair.
    reach = rows.grad_floor * _steepness(metric, anchors, d_s.detach())
    floor = 2 * math.sqrt(2 * reach.square().sum().item())
    tolerance = rounding * rows.loss_floor + rounding**2
    if not strict:
        tolerance = tolerance + distance_rounding * rows.density.amax(1) * rows.loss_floor
    tau = row_temperature(
        d_s.detach(), options.get("temperature", 0.1), options.get("scale", "std")
    )
    kappa = (d_s.detach() / tau).mean().item() if d_s.numel() else 0.0
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return Features(rows.losses, tolerance, grads, floor, kappa, conditioning)


def _steepness(metric: Any, x: Tensor, d: Tensor) -> Tensor | float:
    """|∂δ(i, j)/∂x_i| at most."""
    if metric == "sqeuclidean":
        return 2 * d.sqrt()
    if metric == "cosine":
        return 1 / x.detach().norm(dim=1, keepdim=True).clamp(min=1e-30)
    return math.sqrt(x.shape[1]) if metric == "cityblock" else 1.0
