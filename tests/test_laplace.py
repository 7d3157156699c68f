"""The relaxation that has no grid: its scans against the truth, wherever soft ranks and CDFs are used."""

from __future__ import annotations

from typing import Any

import pytest
import test_nearly_hard
import torch
from compare import (
    DOUBLE_BACKENDS,
    SCALES,
    check_features,
    check_matrices,
    check_smooth_cdf,
    check_soft_rank,
    own_leaf,
    usable,
)
from inputs import BEYOND_PLAIN_FLOAT32, ROWS, make_rows
from test_smooth_cdf import CASES, sources_and_queries
from torch import Generator

import pc_kernels

BACKENDS = usable()
FAST_BACKENDS = [b for b in BACKENDS if b.values != ("reference",)]
LAPLACE: dict[str, Any] = {"relaxation": "laplace"}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_rows_that_make_trouble(backend: str, name: str, rng: Generator) -> None:
    rows = make_rows(name, rng, 2, 97)
    x, y = sources_and_queries(name, rng, 2, 67, 41)
    w = torch.randn(2, 2, 67, generator=rng)
    for i, temperature in enumerate((1e-4, 1e-2, 0.1, 100.0)):
        scale = SCALES[i // 2 % 2]
        check_soft_rank(backend, rows, rng, temperature=temperature, scale=scale, **LAPLACE)
        case = CASES[i]
        if not (case["integral"] and name in BEYOND_PLAIN_FLOAT32):
            check_smooth_cdf(backend, (x, y, w), rng, temperature=temperature, **LAPLACE, **case)


@pytest.mark.parametrize("name", test_nearly_hard.ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_clumps(backend: str, name: str, rng: Generator) -> None:
    x = test_nearly_hard.make(name, rng, 2, 400)
    check_soft_rank(backend, x, rng, temperature=1.0, scale=None, **LAPLACE)
    inputs = (*sources_and_queries(name, rng, 2, 300, 150), None)
    for case in CASES:
        check_smooth_cdf(backend, inputs, rng, temperature=1.0, **LAPLACE, **case)


@pytest.mark.parametrize("m", [0, 1, 2, 3, 7, 16, 17, 33, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend: str, m: int, rng: Generator) -> None:
    for name in ("normal", "integers"):
        check_soft_rank(backend, make_rows(name, rng, 3, m), rng, temperature=0.1, **LAPLACE)
    y, w = torch.randn(3, 5, generator=rng), torch.randn(3, m, generator=rng)
    x = torch.randn(3, m, generator=rng)
    check_smooth_cdf(backend, (x, y, w), rng, temperature=0.2, **LAPLACE)
    check_smooth_cdf(backend, (y, x, None), rng, temperature=0.2, integral=True, **LAPLACE)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_long_rows(backend: str, rng: Generator) -> None:
    """Hot and cold: the decays of all places are multiplied."""
    x = make_rows("normal", rng, 1, 1200)
    for temperature in (1e-3, 100.0):
        check_soft_rank(backend, x, rng, temperature=temperature, **LAPLACE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses(backend: str, rng: Generator) -> None:
    """Fused on the CPU, by the chain elsewhere; with masks, anchors among the references, features."""
    d_s, d_t = torch.rand(2, 40, 40, generator=rng)
    keep = torch.rand(40, 40, generator=rng) < 0.7
    for pair_mask, penalty in ((None, "squared"), (keep, "huber"), (keep, "absolute")):
        options = {"pair_mask": pair_mask, "penalty": penalty, "exclude_self": True, **LAPLACE}
        check_matrices(backend, d_s, d_t, rng, **options)
    student = torch.randn(40, 6, generator=rng)
    teacher = torch.randint(-9, 9, (40, 5), generator=rng) / 8
    check_features(backend, student, teacher, rng, **LAPLACE)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_masks_and_lists(backend: str, rng: Generator) -> None:
    """What is absent counts as if it were not there; lists as rows."""
    x, y = torch.randn(30, generator=rng), torch.randn(20, generator=rng)
    there = torch.rand(30, generator=rng) < 0.7
    options: dict[str, Any] = {"temperature": 0.2, "backend": backend, **LAPLACE}
    masked = pc_kernels.smooth_cdf(x, y, source_mask=there, **options)
    assert torch.allclose(masked, pc_kernels.smooth_cdf(x[there], y, **options), rtol=2e-6)
    ends = {"source_offsets": [0, 0, 11, 30], "query_offsets": [0, 4, 4, 20]}
    offsets = {name: torch.tensor(end) for name, end in ends.items()}
    check_smooth_cdf(backend, (x, y, None), rng, temperature=0.2, **LAPLACE, **offsets)


@pytest.mark.parametrize("tail", ["lower", "upper"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_small_counts_beside_a_crowd(backend: str, tail: str, rng: Generator) -> None:
    """They keep their digits at any distance: nothing is cut off."""
    sign = 1.0 if tail == "lower" else -1.0
    x = sign * torch.cat([torch.tensor([0.0]), 60 + 3 * torch.rand(10_000, generator=rng)])
    y = sign * torch.tensor([-20.0, 0.0, 30.0, 59.0])
    options = {"temperature": 1.0, "tail": tail, **LAPLACE}
    got = pc_kernels.smooth_cdf(x, y, backend=backend, **options)
    wanted = pc_kernels.reference.smooth_cdf(x.double(), y.double(), **options)
    assert ((got.double() - wanted).abs() <= 2e-7 * wanted).all()


@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_double(backend: str, rng: Generator) -> None:
    x = make_rows("outlier of 1e3", rng, 2, 65).double()
    y, w = torch.randn(2, 33, generator=rng).double(), torch.randn(3, 2, 65, generator=rng).double()
    for temperature in (1e-3, 100.0):
        check_soft_rank(backend, x, rng, temperature=temperature, **LAPLACE)
        for case in CASES:
            inputs = (x, y, w.movedim(0, 1))
            check_smooth_cdf(backend, inputs, rng, temperature=temperature, **LAPLACE, **case)
    leaf = own_leaf(torch.randn(2, 7, generator=rng).double())
    for scale in SCALES:
        assert torch.autograd.gradcheck(
            lambda v, scale=scale: pc_kernels.soft_rank(v, 0.3, "laplace", scale, backend=backend),
            leaf,
        )
