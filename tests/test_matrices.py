"""The loss of matrices that the caller has: strict at every temperature, on every kind of row."""

from __future__ import annotations

import math

import pytest
import torch
from compare import (
    BACKEND_NAMES,
    DOUBLE_BACKENDS,
    FAST_BACKENDS,
    PENALTIES,
    REDUCTIONS,
    RELAXATIONS,
    SCALES,
    check_matrices,
    own_leaf,
)
from inputs import BEYOND_PLAIN_FLOAT32, ROWS, make_rows
from torch import Generator

import pc_kernels

TEMPERATURES = [1e-4, 1e-2, 0.1, 100.0]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_rows_that_make_trouble(
    backend: str, name: str, penalty: str, temperature: float, rng: Generator
) -> None:
    d_s = make_rows(name, rng, 4, 66)
    for relaxation in RELAXATIONS:
        options = {"penalty": penalty, "temperature": temperature, "relaxation": relaxation}
        for teacher in ("normal", "integers", name):
            check_matrices(backend, d_s, make_rows(teacher, rng, 4, 66), rng, **options)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_student_that_agrees(
    backend: str, penalty: str, temperature: float, rng: Generator
) -> None:
    """Residuals are small and the gradient is what is left of a cancellation."""
    for name in ROWS:
        if name in (*BEYOND_PLAIN_FLOAT32, "all equal"):
            continue
        d = make_rows(name, rng, 2, 50)
        check_matrices(backend, d, d, rng, penalty=penalty, temperature=temperature)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_options(
    backend: str,
    relaxation: str,
    exclude_self: bool,
    reduction: str,
    scale: str | None,
    rng: Generator,
) -> None:
    d_s, d_t = torch.rand(2, 23, 23, generator=rng)
    for chunk_bytes in (None, 1):
        check_matrices(
            backend,
            d_s,
            d_t,
            rng,
            relaxation=relaxation,
            exclude_self=exclude_self,
            reduction=reduction,
            scale=scale,
            chunk_bytes=chunk_bytes,
        )


@pytest.mark.parametrize(
    "shape", [(0, 0), (0, 4), (4, 0), (1, 1), (5, 1), (1, 2), (5, 2), (2, 700), (300, 3)]
)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_shapes(backend: str, shape: tuple[int, int], rng: Generator) -> None:
    d_s, d_t = torch.rand(2, *shape, generator=rng)
    for reduction in REDUCTIONS:
        check_matrices(backend, d_s, d_t, rng, reduction=reduction)
    if shape[0] == shape[1]:
        check_matrices(backend, d_s, d_t, rng, exclude_self=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_dtypes(backend: str, dtype: torch.dtype, rng: Generator) -> None:
    d_s, d_t = torch.rand(2, 9, 40, generator=rng)
    check_matrices(backend, d_s.to(dtype), d_t.to(dtype), rng)
    check_matrices(backend, d_s.to(dtype), d_t, rng)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_views(backend: str, rng: Generator) -> None:
    """Transposed, strided and expanded matrices give what their copies give, and stay as they are."""
    base = torch.rand(30, 30, generator=rng)
    for d_s, d_t in (
        (base.T, base.flip(0)),
        (base[::2, 1::3], base[1::2, ::3]),
        (base[:1].expand(30, 30), base[:, :1].expand(30, 30)),
    ):
        before = d_s.clone(), d_t.clone()
        check_matrices(backend, d_s, d_t, rng)
        leaf = d_s.detach().requires_grad_()
        loss = pc_kernels.coherence_loss_from_dissimilarities(leaf, d_t, backend=backend)
        loss.backward()
        assert torch.equal(d_s, before[0]) and torch.equal(d_t, before[1])


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_only_rows_with_a_nan_or_infinity_are_nan(
    backend: str, side: str, bad: float, exclude_self: bool, rng: Generator
) -> None:
    for m in (2, 3, 5, 20):
        d_s, d_t = torch.rand(2, m, m, generator=rng)
        row, column = 1, 0
        (d_s if side == "student" else d_t)[row, column] = bad
        leaf = own_leaf(d_s)
        losses = pc_kernels.coherence_loss_from_dissimilarities(
            leaf, d_t, exclude_self=exclude_self, reduction="none", backend=backend
        )
        losses.sum().backward()
        touched = torch.arange(m) == row
        assert losses[touched].isnan().all() and losses[~touched].isfinite().all()
        assert leaf.grad is not None and leaf.grad[~touched].isfinite().all()
        if m > 2 or not exclude_self:
            assert leaf.grad[row].isnan().any()
        mean = pc_kernels.coherence_loss_from_dissimilarities(
            d_s, d_t, exclude_self=exclude_self, backend=backend
        )
        assert mean.isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_the_diagonal_is_not_read(backend: str, bad: float, rng: Generator) -> None:
    d_s, d_t = torch.rand(2, 12, 12, generator=rng)
    results = []
    for diagonal in (0.0, bad):
        leaf = own_leaf(d_s.clone().fill_diagonal_(diagonal))
        loss = pc_kernels.coherence_loss_from_dissimilarities(
            leaf, d_t.clone().fill_diagonal_(diagonal), exclude_self=True, backend=backend
        )
        loss.backward()
        results.append((loss, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is not None and results[1][1] is not None
    assert torch.equal(results[0][1], results[1][1])
    assert (results[0][1].diagonal() == 0).all()


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("penalty", ["squared", "huber"])
@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_gradcheck(backend: str, penalty: str, relaxation: str, rng: Generator) -> None:
    d_s = torch.rand(3, 8, generator=rng, dtype=torch.float64, requires_grad=True)
    d_t = torch.rand(3, 8, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda d: pc_kernels.coherence_loss_from_dissimilarities(
            d, d_t, temperature=0.5, penalty=penalty, relaxation=relaxation, backend=backend
        ),
        (d_s,),
    )


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_the_teacher_gets_no_gradient(backend: str, rng: Generator) -> None:
    d_s, d_t = (own_leaf(x) for x in torch.rand(2, 6, 7, generator=rng))
    pc_kernels.coherence_loss_from_dissimilarities(d_s, d_t, backend=backend).backward()
    assert d_s.grad is not None and d_t.grad is None
