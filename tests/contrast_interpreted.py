"""The Triton kernels of the contrastive loss, interpreted; test_contrastive.py runs this file."""

from __future__ import annotations

import pytest
import torch
from contrast_cases import KINDS, Case, check_not_finite, check_tiny
from torch import Generator

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
    check_tiny(BACKEND, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite(kind: str, rng: Generator) -> None:
    check_not_finite(BACKEND, kind, rng)
