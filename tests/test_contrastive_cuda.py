"""The CUDA kernels of the contrastive loss on the CPU (tests/cuda_shim), against the formulas."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contrast_cases import (
    KINDS,
    check_formulas,
    check_not_finite,
    check_temperatures,
    check_tiny,
)
from shim import ShimBackend
from torch import Generator

from pc_kernels.backends import BACKENDS

BACKEND = "cuda_shim"
DEVICES = [{"threads": 16, "warp": 8}, {"threads": 16, "warp": 8, "shared_bytes": 4096}]


@pytest.fixture(autouse=True, params=DEVICES, ids=["shared memory", "little of it"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    BACKENDS[BACKEND] = ShimBackend(**request.param)
    yield
    del BACKENDS[BACKEND]


@pytest.mark.parametrize("kind", KINDS)
def test_formulas(kind: str, rng: Generator) -> None:
    check_formulas(BACKEND, kind, rng, (40, 13, 5), chunk_bytes=1 << 12)


@pytest.mark.parametrize("kind", KINDS)
def test_temperatures(kind: str, rng: Generator) -> None:
    check_temperatures(BACKEND, kind, rng, (33, 3, 8))


@pytest.mark.parametrize("kind", ["InfoNCE", "CLIP"])
def test_a_tiny_loss(kind: str) -> None:
    check_tiny(BACKEND, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite(kind: str, rng: Generator) -> None:
    check_not_finite(BACKEND, kind, rng)
