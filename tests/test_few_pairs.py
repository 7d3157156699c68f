"""Batches of few pairs on the CPU: one operator does what the sweep of many does, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Generator, Tensor

from pc_kernels.backends import BACKENDS, CpuBackend, extension_obstacle
from pc_kernels.recipe import Recipe
from pc_kernels.sweep import Batch, sweep

pytestmark = pytest.mark.skipif(extension_obstacle() is not None, reason=str(extension_obstacle()))


def _twins(rng: Generator, n: int, width: int) -> Tensor:
    x = torch.randn(n, width, generator=rng)
    x[n - n // 2 :] = x[: n // 2]
    return x


FEATURES: dict[str, Callable[[Generator, int, int], Tensor]] = {
    "centred": lambda rng, n, d: torch.randn(n, d, generator=rng),
    "the end of a tensor": lambda rng, n, d: torch.randn(3 * n, d, generator=rng)[2 * n :],
    "off centre": lambda rng, n, d: torch.randn(n, d, generator=rng) + 7.3,
    "huge": lambda rng, n, d: 1e25 * torch.randn(n, d, generator=rng),
    "twins": _twins,
    "half": lambda rng, n, d: torch.randn(d, n, generator=rng).T.to(torch.bfloat16),
    "not finite": lambda rng, n, d: torch.randn(n, d, generator=rng) / torch.arange(n)[:, None],
}


def batch_of(rng: Generator, kind: str, anchors: int, references: int | None) -> Batch:
    """Against themselves, or so many references."""

    def features(n: int | None, width: int) -> Tensor | None:
        return None if n is None else FEATURES[kind](rng, n, width)

    student, teacher = features(anchors, 5), features(anchors, 9)
    assert student is not None and teacher is not None
    weights = torch.rand(1, anchors, generator=rng)
    refs = features(references, 5), features(references, 9)
    own = 0 if references is None else None
    return Batch([student], teacher, *refs, weights, None, own, False)


def in_chunks(batch: Batch, recipe: Recipe, with_grad: bool) -> tuple[Tensor, list[Tensor]]:
    """As it goes with many pairs, here in one chunk."""
    with mock.patch.object(CpuBackend, "sweep_at_once", return_value=None):
        return sweep(batch, recipe, with_grad)


SIZES = [(0, None), (1, None), (2, None), (8, None), (33, None), (200, None)]
SIZES += [(0, 4), (5, 0), (5, 1), (7, 300), (300, 7)]


@pytest.mark.parametrize("kind", FEATURES)
def test_the_same_bits(rng: Generator, kind: str) -> None:
    options = [(d, scale) for d in ("euclidean", "sqeuclidean") for scale in ("std", None)]
    for i, (anchors, references) in enumerate(SIZES):
        batch = batch_of(rng, kind, anchors, references)
        for dissimilarity, scale in options:
            recipe = Recipe(dissimilarity=dissimilarity, scale=scale, backend="cpu")
            with_grad = i % 3 > 0
            assert BACKENDS["cpu"].sweep_at_once(batch, recipe, with_grad) is not None
            losses, gradients = sweep(batch, recipe, with_grad)
            wanted, wanted_gradients = in_chunks(batch, recipe, with_grad)
            torch.testing.assert_close(losses, wanted, rtol=0, atol=0, equal_nan=True)
            assert len(gradients) == len(wanted_gradients)
            for x, y in zip(gradients, wanted_gradients, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_what_goes_otherwise(rng: Generator) -> None:
    """Callables, cosines, masks, several students, many pairs, and more than `chunk_bytes` holds."""
    batch, recipe = batch_of(rng, "centred", 16, None), Recipe(backend="cpu")
    student, teacher = batch.students[0], batch.teacher

    def goes_at_once(batch: Batch = batch, **options: object) -> bool:
        recipe = Recipe(backend="cpu", **options)  # type: ignore[arg-type]
        return BACKENDS["cpu"].sweep_at_once(batch, recipe, True) is not None

    assert goes_at_once() and goes_at_once(chunk_bytes=8 * 16 * 16)
    assert not goes_at_once(chunk_bytes=8 * 16 * 16 - 1)
    assert not goes_at_once(dissimilarity=torch.cdist)
    assert not goes_at_once(teacher_dissimilarity="cosine")
    assert not goes_at_once(products="bf16x6")
    mask = torch.ones(16, 16, dtype=torch.bool)
    others = {
        "masked": Batch([student], teacher, None, None, batch.weights, mask, 0, False),
        "two": Batch(
            [student] * 2, teacher, None, None, batch.weights.repeat(2, 1), None, 0, False
        ),
        "given": Batch([mask.float()], mask.float(), None, None, batch.weights, None, 0, True),
        "many": batch_of(rng, "centred", 512, None),
    }
    for other in others.values():
        assert not goes_at_once(other)
        assert len(sweep(other, recipe, True)[1]) == len(other.students)


@pytest.mark.parametrize("m", [5, 40, 80, 128])
def test_slopes_of_any_size(rng: Generator, m: int) -> None:
    """Rows of few points multiply them by exponentials: gradients stay linear, to the last bit."""
    backend, recipe = BACKENDS["cpu"], Recipe(temperature=0.1, backend="cpu")
    x = torch.randn(4, m, generator=rng)
    x[:, 0] -= 3  # most of the range that such rows have
    slopes = torch.randn(4, m, generator=rng)
    _, density = backend.soft_rank(x, recipe, True)
    wanted = backend.soft_rank_backward(slopes, x, density, recipe)
    for unit in (2.0**-80, 2.0**80):
        got = backend.soft_rank_backward(slopes * unit, x, density, recipe)
        assert torch.equal(got, wanted * unit)
