"""Hostile features: nearer to float64 than torch.cdist, and right at every size a float has."""

from __future__ import annotations

import math

import points
import pytest
import tolerances
import torch
from compare import BACKEND_NAMES, DISSIMILARITIES, FAST_BACKENDS, own_leaf
from inputs import HOSTILE_FEATURES, quantised, two_clumps
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import reference


def gradient_error(grad: Tensor | None, student: Tensor, teacher: Tensor) -> float:
    """Relative to the definition in float64."""
    wide = student.double().requires_grad_()
    reference.perception_coherence_loss(wide, teacher.double()).backward()
    assert grad is not None and wide.grad is not None
    return ((grad.double() - wide.grad).norm() / wide.grad.norm()).item()


def ours(student: Tensor, teacher: Tensor, backend: str) -> Tensor | None:
    leaf = own_leaf(student)
    pc_kernels.perception_coherence_loss(leaf, teacher, backend=backend).backward()
    return leaf.grad


def with_cdist(student: Tensor, teacher: Tensor) -> Tensor | None:
    """The same loss as one would write it: torch.cdist as it comes, then the formulas in float32."""
    leaf = own_leaf(student)
    reference.coherence_loss_from_dissimilarities(
        torch.cdist(leaf, leaf), torch.cdist(teacher, teacher), exclude_self=True
    ).backward()
    return leaf.grad


@pytest.mark.parametrize("rows", [20, 96])
@pytest.mark.parametrize("name", HOSTILE_FEATURES)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gradients_are_nearer_than_with_cdist(
    backend: str, name: str, rows: int, rng: Generator
) -> None:
    """In the geometric mean over a few draws; within the row of everyday inputs there is no contest.

    Up to 25 rows torch.cdist takes differences, past that it takes a product as well.
    """
    draws = []
    for _ in range(5):
        student, teacher = HOSTILE_FEATURES[name](rng, rows, 16), quantised(rng, rows, 8)
        draws.append(
            (
                gradient_error(ours(student, teacher, backend), student, teacher),
                gradient_error(with_cdist(student, teacher), student, teacher),
            )
        )
    mean, theirs = (math.exp(sum(map(math.log, e)) / len(e)) for e in zip(*draws, strict=True))
    print(f"{name}: {mean:.2e}, with torch.cdist {theirs:.2e}")
    assert mean <= max(theirs, tolerances.GRAD)


@pytest.mark.parametrize("name", HOSTILE_FEATURES)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_hostile_teachers_keep_their_order(backend: str, name: str, rng: Generator) -> None:
    """Ranks by distances that are off by 64 u at most: only neighbours closer than that may swap."""
    teacher, student = HOSTILE_FEATURES[name](rng, 96, 16), torch.randn(96, 8, generator=rng)
    losses = pc_kernels.perception_coherence_loss(
        student, teacher, reduction="none", backend=backend
    )
    d = reference.pairwise_dissimilarity(teacher.double())
    d_s = reference.pairwise_dissimilarity(student.double())
    keep = ~torch.eye(96, dtype=torch.bool)
    d, d_s = d[keep].view(96, 95), d_s[keep].view(96, 95)
    wanted = reference.coherence_loss_from_dissimilarities(d_s, d, reduction="none")
    close = (d[:, :, None] - d[:, None, :]).abs() <= 128 * tolerances.U * d[:, :, None]
    swaps = (close.sum((1, 2)) - 95) / 2  # each moves two ranks by 1/94, squared residuals by 2/94
    allowed = tolerances.LOSS + swaps * 2 * (2 / 94) / 95
    assert ((losses - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("exponent", [-120, -90, -60, -40, 40, 60, 63, 90, 120])
@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_finite_features_of_any_size(
    backend: str, metric: str, exponent: int, rng: Generator
) -> None:
    """Powers of two change no digit, hence no rank: the loss is the same, or at least NaN.

    NaN is for squares that float32 cannot hold; a number that looks like a loss and is none is not.
    """
    student, teacher = torch.randn(40, 6, generator=rng), quantised(rng, 40, 5)
    options = {"dissimilarity": metric, "teacher_dissimilarity": "euclidean", "backend": backend}
    wanted = pc_kernels.perception_coherence_loss(student, teacher, **options)
    for s, t in ((student * 2.0**exponent, teacher), (student, teacher * 2.0**exponent)):
        if s is student and metric != "euclidean":
            continue
        loss = pc_kernels.perception_coherence_loss(s, t, **options)
        assert loss.isnan() or abs(loss - wanted) <= 1e-5 * wanted
        if abs(exponent) <= 40:
            assert not loss.isnan()


@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gradients_of_small_and_large_features(backend: str, metric: str, rng: Generator) -> None:
    """Scaled features have gradients scaled the other way."""
    student, teacher = torch.randn(40, 6, generator=rng), quantised(rng, 40, 5)
    grads = {}
    for exponent in (0, -40, 40):
        leaf = own_leaf(student * 2.0**exponent)
        pc_kernels.perception_coherence_loss(
            leaf,
            teacher,
            dissimilarity=metric,
            teacher_dissimilarity="euclidean",
            backend=backend,
        ).backward()
        assert leaf.grad is not None
        grads[exponent] = leaf.grad.double() * 2.0**exponent
    for exponent in (-40, 40):
        difference = (grads[exponent] - grads[0]).norm()
        assert difference <= 2 * tolerances.GRAD * grads[0].norm()


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_float16_features_at_the_end_of_their_range(backend: str, rng: Generator) -> None:
    """6e4 fits float16, its square does not: nothing but the input is float16."""
    student = (2e4 * torch.randn(30, 8, generator=rng)).clamp(-6e4, 6e4).half()
    teacher = quantised(rng, 30, 5)
    for metric in DISSIMILARITIES:
        options = {"dissimilarity": metric, "teacher_dissimilarity": "euclidean"}
        loss = pc_kernels.perception_coherence_loss(student, teacher, backend=backend, **options)
        wanted = reference.perception_coherence_loss(student.double(), teacher.double(), **options)
        assert abs(loss - wanted) <= tolerances.LOSS * wanted


@pytest.mark.parametrize("chunk_bytes", [None, 20_000])
@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3, 1e4])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gradients_of_a_far_clump_do_not_cancel(
    backend: str, offset: float, chunk_bytes: int | None, rng: Generator
) -> None:
    """No shift brings both it and the rest near the origin; its pairs are summed from differences."""
    student = 1e-3 * torch.randn(128, 16, generator=rng)
    student[:115] += offset
    teacher = quantised(rng, 128, 8)
    own = pc_kernels.PerceptionCoherenceLoss(chunk_bytes=chunk_bytes, backend=backend)
    leaf = own_leaf(student)
    own(leaf, teacher).backward()
    assert gradient_error(leaf.grad, student, teacher) <= tolerances.GRAD
    anchors, references = own_leaf(student), own_leaf(student.flip(0))
    own(anchors, teacher, references, teacher.flip(0)).backward()
    wide = [own_leaf(x.double()) for x in (student, student.flip(0))]
    sides = (teacher.double(), wide[1], teacher.flip(0).double())
    reference.perception_coherence_loss(wide[0], *sides).backward()
    for leaf, exact in zip((anchors, references), wide, strict=True):
        assert leaf.grad is not None and exact.grad is not None
        error = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error <= tolerances.GRAD


@pytest.mark.parametrize("offset", [10.0, 1e3, 1e4])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_clump_costs_few_digits_against_the_direct_formula(
    backend: str, offset: float, rng: Generator
) -> None:
    """All of it is in one place on an anchor's grid: where the grid is exact."""
    student, teacher = two_clumps(rng, 128, 16, 115, offset), quantised(rng, 128, 8)
    leaf = own_leaf(student)
    reference.perception_coherence_loss(leaf, teacher).backward()
    direct = gradient_error(leaf.grad, student, teacher)
    assert gradient_error(ours(student, teacher, backend), student, teacher) <= 10 * direct


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("far", [13, 64])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_far_anchors_keep_their_neighbours(
    backend: str, far: int, masked: bool, rng: Generator
) -> None:
    """Rows of far anchors are kept less their offset, which would cost a near reference its digits."""
    student, teacher = two_clumps(rng, 128, 16, far), quantised(rng, 128, 8)
    mask = torch.rand(128, 128, generator=rng) < 0.8 if masked else None
    leaf, wide = own_leaf(student), own_leaf(student.double())
    pc_kernels.perception_coherence_loss(leaf, teacher, pair_mask=mask, backend=backend).backward()
    reference.perception_coherence_loss(wide, teacher.double(), pair_mask=mask).backward()
    assert leaf.grad is not None and wide.grad is not None
    assert (leaf.grad - wide.grad).norm() <= tolerances.GRAD * wide.grad.norm()


@pytest.mark.parametrize("anchors", [1, 3, 7])
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_equal_references_are_tied(backend: str, metric: str, anchors: int, rng: Generator) -> None:
    """A product of matrices may round the columns of equal references differently."""
    student, teacher = own_leaf(torch.randn(anchors, 128, generator=rng)), torch.randn(anchors, 64)
    of_teacher = torch.randn(1023, 64, generator=rng)
    alike = torch.randn(1, 128, generator=rng).expand(1023, 128)
    options = {"dissimilarity": metric, "backend": backend}
    loss = pc_kernels.perception_coherence_loss(student, teacher, alike, of_teacher, **options)
    loss.backward()
    assert student.grad is not None and not student.grad.any()  # a row of equal values

    kinds, kind = torch.randn(300, 128, generator=rng), torch.randint(300, (1023,), generator=rng)
    d = pc_kernels.pairwise_dissimilarity(student.detach(), kinds[kind], metric)
    first = torch.full((300,), 1023).scatter_reduce(0, kind, torch.arange(1023), "amin")
    assert torch.equal(d, d[:, first[kind]])


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_equal_references_are_tied_whatever_products_do(
    backend: str, rng: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    points.check_ties(backend, rng, monkeypatch)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_zero_beside_poison(backend: str, rng: Generator) -> None:
    points.check_a_zero_beside_poison(backend, rng)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_features_of_any_size_and_their_gradients(backend: str, rng: Generator) -> None:
    points.check_features_of_any_size(backend, rng)
