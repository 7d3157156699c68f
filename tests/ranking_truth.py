"""The ranking losses, written from their sources' definitions: one query, one pair at a time, float64.

Nothing here is shared with the package but the table of relaxations' formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Cdf = Callable[[Tensor], Tensor]


def cdf_of(relaxation: str) -> Cdf:
    """Φ."""
    return {"logistic": torch.sigmoid, "normal": torch.special.ndtr, "laplace": laplace}[relaxation]


def laplace(u: Tensor) -> Tensor:
    """Whose slope at a tie is ½."""
    return torch.where(u < 0, u.clamp(max=0).exp() / 2, 1 - (-u.clamp(min=0)).exp() / 2)


def integral_of(relaxation: str) -> Cdf:
    """∫Φ."""
    if relaxation == "logistic":
        return torch.nn.functional.softplus
    if relaxation == "laplace":
        tail = [lambda u: u.clamp(max=0).exp() / 2, lambda u: u + (-u.clamp(min=0)).exp() / 2]
        return lambda u: torch.where(u < 0, tail[0](u), tail[1](u))
    root = math.sqrt(2 * math.pi)
    return lambda u: u * torch.special.ndtr(u) + torch.exp(-u.square() / 2) / root


def soft_place(scores: Tensor, j: int, among: list[int], temperature: float, cdf: Cdf) -> Tensor:
    """1 + Σ_{k in among, k≠j} Φ((s_k − s_j)/τ)."""
    others = torch.tensor([k for k in among if k != j], dtype=torch.int64)
    return 1 + cdf((scores[others] - scores[j]) / temperature).sum()


def approx_ndcg(s: Tensor, y: Tensor, temperature: float, relaxation: str) -> Tensor | None:
    everyone = list(range(len(s)))
    gains = [2.0 ** y[j].item() - 1 for j in everyone]
    best = sum(g / math.log2(2 + i) for i, g in enumerate(sorted(gains, reverse=True)))
    if best == 0:
        return None
    places = [soft_place(s, j, everyone, temperature, cdf_of(relaxation)) for j in everyone]
    return 1 - sum(g / torch.log2(1 + r) for g, r in zip(gains, places, strict=True)) / best


def approx_mrr(s: Tensor, y: Tensor, temperature: float, relaxation: str) -> Tensor | None:
    if y.sum() == 0:
        return None
    everyone = list(range(len(s)))
    places = [soft_place(s, j, everyone, temperature, cdf_of(relaxation)) for j in everyone]
    return 1 - sum(y[j] / places[j] for j in everyone) / y.sum()


def over_pairs(s: Tensor, y: Tensor, cost: Cdf) -> Tensor | None:
    """The mean of cost(s_j − s_i) over y_i > y_j."""
    costs = [cost(s[j] - s[i]) for i in range(len(s)) for j in range(len(s)) if y[i] > y[j]]
    return torch.stack(costs).mean() if costs else None


def ranknet(s: Tensor, y: Tensor, temperature: float, relaxation: str) -> Tensor | None:
    return over_pairs(s, y, lambda d: integral_of(relaxation)(d / temperature))


def kendall(s: Tensor, y: Tensor, temperature: float, relaxation: str) -> Tensor | None:
    return over_pairs(s, y, lambda d: 1 - (2 * cdf_of(relaxation)(-d / temperature) - 1))


def auc(s: Tensor, y: Tensor, temperature: float, relaxation: str) -> Tensor | None:
    return over_pairs(s, (y != 0).double(), lambda d: cdf_of(relaxation)(d / temperature))


def average_precision(s: Tensor, y: Tensor, temperature: float, relaxation: str) -> Tensor | None:
    everyone = list(range(len(s)))
    hits = [j for j in everyone if y[j] != 0]
    if not hits:
        return None
    place = partial(soft_place, s, temperature=temperature, cdf=cdf_of(relaxation))
    return 1 - sum(place(j, hits) / place(j, everyone) for j in hits) / len(hits)


def spearman(s: Tensor, y: Tensor, temperature: float, relaxation: str) -> Tensor | None:
    if len(y) == 0 or (y == y[0]).all():
        return None
    everyone = list(range(len(s)))
    soft = [soft_place(s, j, everyone, temperature, cdf_of(relaxation)) for j in everyone]
    if (s == s[0]).all():  # no correlation
        return 1 + 0 * s.sum()
    hard = [(y > y[j]).sum().double() + ((y == y[j]).sum() + 1) / 2 for j in everyone]
    return 1 - torch.corrcoef(torch.stack([torch.stack(soft), torch.stack(hard)]))[0, 1]


LIST_LOSSES = {
    "ApproxNDCGLoss": approx_ndcg,
    "ApproxMRRLoss": approx_mrr,
    "RankNetLoss": ranknet,
    "SpearmanLoss": spearman,
    "KendallLoss": kendall,
    "AUCLoss": auc,
    "AveragePrecisionLoss": average_precision,
}


def similarities(x: Tensor, refs: Tensor | None) -> Tensor:
    """Cosines [B, M]."""
    refs = x if refs is None else refs
    return (x / x.norm(dim=1, keepdim=True)) @ (refs / refs.norm(dim=1, keepdim=True)).T


def smooth_ap(
    s: Tensor, q: int, positives: list[int], with_query: bool, own: bool, cdf: Cdf, tau: float
) -> Tensor:
    """Brown et al. 2020: the query is in both sets."""
    everyone = [k for k in range(len(s)) if with_query or not own or k != q]
    positives = [k for k in positives if k in everyone]
    place = partial(soft_place, s, temperature=tau, cdf=cdf)
    return 1 - sum(place(j, positives) / place(j, everyone) for j in positives) / len(positives)


def recall_at_k(
    s: Tensor, q: int, positives: list[int], with_query: bool, own: bool, cdf: Cdf, tau: float
) -> Tensor:
    """Patel et al. 2022, K = 1, 2, 4 with τ_K = K: the query is no positive."""
    everyone = [k for k in range(len(s)) if with_query or not own or k != q]
    positives = [k for k in positives if not own or k != q]
    total = torch.zeros((), dtype=s.dtype)
    for k in (1, 2, 4):
        cut = min(k, len(s))
        places = [soft_place(s, j, everyone, tau, cdf) for j in positives]
        found = sum(torch.sigmoid((cut - r) / k) for r in places)
        total = total + torch.clamp(found, max=cut) / min(cut, len(positives))
    return 1 - total / 3


def retrieval(
    per_query: Callable[..., Tensor],
    x: Tensor,
    labels: Tensor,
    refs: Tensor | None,
    ref_labels: Tensor | None,
    with_query: bool,
    relaxation: str,
    tau: float,
) -> list[Tensor | None]:
    """The losses of the queries; None for one without a positive beside itself."""
    s = similarities(x, refs)
    own = refs is None
    theirs = labels if ref_labels is None else ref_labels
    losses: list[Tensor | None] = []
    for q in range(len(x)):
        positives = [k for k in range(len(theirs)) if theirs[k] == labels[q]]
        if len(positives) <= own:
            losses.append(None)
        else:
            losses.append(per_query(s[q], q, positives, with_query, own, cdf_of(relaxation), tau))
    return losses
