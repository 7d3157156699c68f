"""The CUDA kernels of the contrastive loss on the CPU (tests/cuda_shim), against the formulas."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from contrast_cases import KINDS, Case, check_not_finite, check_tiny
from shim import ShimBackend
from torch import Generator

from pc_kernels.backends import BACKENDS

BACKEND = "cuda_shim"
DEVICES = [{"threads": 16, "warp": 8}, {"threads": 16, "warp": 8, "shared_bytes": 4096}]


@pytest.fixture(autouse=True, params=DEVICES, ids=["shared memory", "global memory"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    BACKENDS[BACKEND] = ShimBackend(**request.param)
    yield
    del BACKENDS[BACKEND]


@pytest.mark.parametrize("kind", KINDS)
def test_formulas(kind: str, rng: Generator) -> None:
    for sizes in ((1, 0, 3), (7, 0, 4), (40, 13, 5)):
        case = Case(rng, kind, sizes)
        weights, mask = torch.rand(sizes[0], generator=rng), case.mask(rng)
        case.check(BACKEND, chunk_bytes=1 << 12)
        case.check(BACKEND, weights, pair_mask=mask)


@pytest.mark.parametrize("kind", KINDS)
def test_temperatures(kind: str, rng: Generator) -> None:
    case = Case(rng, kind, (33, 3, 8))
    for temperature in (1e-3, 0.01, 1.0, 100.0):
        case.check(BACKEND, temperature=temperature)


@pytest.mark.parametrize("kind", ["InfoNCE", "CLIP"])
def test_a_tiny_loss(kind: str) -> None:
    check_tiny(BACKEND, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite(kind: str, rng: Generator) -> None:
    check_not_finite(BACKEND, kind, rng)
