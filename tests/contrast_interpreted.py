"""The Triton kernels of the contrastive loss, interpreted; test_contrastive.py runs this file."""

from __future__ import annotations

import pytest
from contrast_cases import (
    KINDS,
    check_formulas,
    check_not_finite,
    check_temperatures,
    check_tiny,
)
from torch import Generator

from pc_kernels.triton_kernels import contrast_launch

BACKEND = "triton"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast_launch, "ROW_BLOCK", 16)
    monkeypatch.setattr(contrast_launch, "COLUMN_BLOCK", 16)


@pytest.mark.parametrize("kind", KINDS)
def test_formulas(kind: str, rng: Generator) -> None:
    check_formulas(BACKEND, kind, rng, (20, 6, 5), chunk_bytes=1 << 10)


@pytest.mark.parametrize("kind", KINDS)
def test_temperatures(kind: str, rng: Generator) -> None:
    check_temperatures(BACKEND, kind, rng, (18, 3, 8))


@pytest.mark.parametrize("kind", ["InfoNCE", "CLIP"])
def test_a_tiny_loss(kind: str) -> None:
    check_tiny(BACKEND, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite(kind: str, rng: Generator) -> None:
    check_not_finite(BACKEND, kind, rng)
