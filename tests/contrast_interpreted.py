"""The Triton kernels of the contrastive loss in Triton's interpreter; test_contrastive.py runs this file."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_contrastive import KINDS, Case
from torch import Generator

import pc_kernels
from pc_kernels.triton_kernels import contrast_launch

BACKEND = "triton"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast_launch, "ROW_BLOCK", 16)
    monkeypatch.setattr(contrast_launch, "COLUMN_BLOCK", 16)


@pytest.mark.parametrize("kind", KINDS)
def test_formulas(kind: str, rng: Generator) -> None:
    for sizes in ((1, 0, 3), (7, 0, 4), (20, 6, 5)):
        case = Case(rng, kind, sizes)
        weights, mask = torch.rand(sizes[0], generator=rng), case.mask(rng)
        case.check(BACKEND, chunk_bytes=1 << 10)
        case.check(BACKEND, weights, pair_mask=mask)


@pytest.mark.parametrize("kind", KINDS)
def test_temperatures(kind: str, rng: Generator) -> None:
    case = Case(rng, kind, (18, 3, 8))
    for temperature in (1e-3, 0.01, 1.0, 100.0):
        case.check(BACKEND, temperature=temperature)


@pytest.mark.parametrize("kind", ["InfoNCE", "CLIP"])
def test_a_tiny_loss(kind: str) -> None:
    case = Case(Generator(), kind, (9, 0, 9))
    case.features = [torch.eye(9), torch.eye(9)]
    case.check(BACKEND, temperature=0.045)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite(kind: str, rng: Generator) -> None:
    q, k, refs = Case(rng, kind, (6, 2, 4)).features
    options: dict[str, Any] = {**Case(rng, kind, (6, 2, 4)).options, "reduction": "none"}
    for bad in (math.nan, math.inf, -math.inf):
        q[4, 1] = bad
        losses = pc_kernels.contrastive_loss(q, k, refs, backend=BACKEND, **options)
        assert losses[4].isnan() and (kind == "CLIP" or losses.isnan().sum() == 1)
        mask = torch.ones(6, 8, dtype=torch.bool)
        mask[4] = False
        leaf = k.clone().requires_grad_()
        losses = pc_kernels.contrastive_loss(
            q, leaf, refs, pair_mask=mask, backend=BACKEND, **options
        )
        losses.sum().backward()
        assert losses[4] == 0 and losses.isfinite().all() and leaf.grad.isfinite().all()
