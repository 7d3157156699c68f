"""Stand-in for smooth_cdf, by its direct formulas, until the operator is there."""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import RELAXATIONS


def smooth_cdf(
    sources: Tensor,
    queries: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 0.1,
    relaxation: str = "logistic",
    tail: str = "lower",
    integral: bool = False,
    source_offsets: Tensor | None = None,
    query_offsets: Tensor | None = None,
    source_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    phi = RELAXATIONS[relaxation]
    step = phi.cdf
    if integral:
        step = (
            torch.nn.functional.softplus
            if relaxation == "logistic"
            else (lambda u: u * phi.cdf(u) + phi.pdf(u))
        )
    if source_offsets is not None:
        assert query_offsets is not None
        parts = []
        so, qo = source_offsets.tolist(), query_offsets.tolist()
        for a, b, c, d in zip(so, so[1:], qo, qo[1:], strict=False):
            w = None if weights is None else weights[..., a:b]
            parts.append(
                smooth_cdf(
                    sources[a:b],
                    queries[c:d],
                    w,
                    temperature=temperature,
                    relaxation=relaxation,
                    tail=tail,
                    integral=integral,
                )
            )
        return torch.cat(parts, -1) if parts else queries * 0
    if query_mask is not None:
        queries = torch.where(query_mask, queries, 0)
    if source_mask is not None:
        sources = torch.where(source_mask, sources, 0)
    u = (queries[..., :, None] - sources[..., None, :]) / temperature
    values = step(u if tail == "lower" else -u)
    if source_mask is not None:
        values = values * source_mask[..., None, :]
    if weights is None:
        result = values.sum(-1)
    elif weights.dim() == sources.dim():
        result = (values * weights[..., None, :]).sum(-1)
    else:
        result = (values[..., None, :, :] * weights[..., :, None, :]).sum(-1)
    if query_mask is not None:
        result = torch.where(
            query_mask if result.dim() == queries.dim() else query_mask[..., None, :], result, 0
        )
    return result
