"""Weights of anchors and masks of pairs: a masked reference is as if it were not there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compare import (
    BACKEND_NAMES,
    DISSIMILARITIES,
    DOUBLE_BACKENDS,
    FAST_BACKENDS,
    PENALTIES,
    REDUCTIONS,
    RELAXATIONS,
    SCALES,
    check_features,
    check_matrices,
    own_leaf,
)
from inputs import HOSTILE_FEATURES, ROWS, make_rows, quantised
from torch import Generator, Tensor

import pc_kernels


def mask(rng: Generator, anchors: int, references: int, share: float = 0.6) -> Tensor:
    """Random pairs; the first anchors keep none, one, two and all of theirs."""
    keep = torch.rand(anchors, references, generator=rng) < share
    for anchor, kept in enumerate((0, 1, 2, references)[:anchors]):
        keep[anchor] = torch.arange(references) < kept
    return keep


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_matrices(
    backend: str, relaxation: str, penalty: str, scale: str | None, rng: Generator
) -> None:
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"relaxation": relaxation, "penalty": penalty, "scale": scale}
        keep, w = mask(rng, 9, 31), torch.rand(9, generator=rng)
        d_s, d_t = torch.rand(9, 31, generator=rng), make_rows("integers", rng, 9, 31)
        d_s[~keep], d_t[~keep] = math.nan, math.inf  # what is masked may be anything
        d_s[0], d_t[0] = 1.0, 2.0
        check_matrices(
            backend, d_s, d_t, rng, pair_mask=keep, weights=w, reduction=reduction, **options
        )


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 0.1, 100.0])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_rows_that_make_trouble(
    backend: str, name: str, temperature: float, rng: Generator
) -> None:
    keep = mask(rng, 6, 67)
    d_s, d_t = make_rows(name, rng, 6, 67), make_rows(name, rng, 6, 67)
    for relaxation in RELAXATIONS:
        options = {"relaxation": relaxation, "temperature": temperature}
        check_matrices(backend, d_s, d_t, rng, pair_mask=keep, **options)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 129])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_sizes(backend: str, size: int, exclude_self: bool, rng: Generator) -> None:
    d_s, d_t = torch.rand(2, size, size, generator=rng)
    for shape in ((size, size), (1, size), (size, 1), (1, 1)):
        keep = torch.rand(shape, generator=rng) < 0.7
        options: dict[str, Any] = {"exclude_self": exclude_self, "chunk_bytes": 5000}
        check_matrices(backend, d_s, d_t, rng, pair_mask=keep, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_refs", [False, True])
@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_features(
    backend: str, metric: str, with_refs: bool, reduction: str, rng: Generator
) -> None:
    refs = (torch.randn(23, 6, generator=rng), quantised(rng, 23, 5)) if with_refs else None
    references = 23 if with_refs else 17
    check_features(
        backend,
        torch.randn(17, 6, generator=rng),
        quantised(rng, 17, 5),
        rng,
        refs=refs,
        dissimilarity=metric,
        teacher_dissimilarity="euclidean",
        reduction=reduction,
        weights=torch.rand(17, generator=rng),
        pair_mask=mask(rng, 17, references),
        chunk_bytes=3000,
    )


@pytest.mark.parametrize("name", sorted(HOSTILE_FEATURES.keys() - {"tight clusters"}))
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_hostile_features(backend: str, name: str, rng: Generator) -> None:
    """Not tight clusters: of few far references only the last digits differ, in float32 noise."""
    student = HOSTILE_FEATURES[name](rng, 60, 8)
    keep = mask(rng, 60, 60)
    check_features(
        backend,
        student,
        quantised(rng, 60, 5),
        rng,
        pair_mask=keep,
        teacher_dissimilarity="euclidean",
    )


@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_float64(backend: str, rng: Generator) -> None:
    d_s, d_t = torch.rand(2, 8, 40, generator=rng, dtype=torch.float64)
    for temperature in (1e-3, 0.1):
        keep = mask(rng, 8, 40)
        check_matrices(backend, d_s, d_t, rng, pair_mask=keep, temperature=temperature)


@pytest.mark.parametrize("metric", [*DISSIMILARITIES, torch.cdist])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_padding_may_hold_anything(backend: str, metric: Any, rng: Generator) -> None:
    """Rows that nobody sees: zeros or NaN, it is the same to the bit, and they get no gradient."""
    rows, padding = 20, 5
    real = torch.arange(rows + padding) < rows
    teacher = torch.randn(rows + padding, 4, generator=rng)
    student = torch.randn(rows + padding, 3, generator=rng)
    results = []
    for fill in (0.0, math.nan, math.inf):
        s, t = student.clone(), teacher.clone()
        s[~real], t[~real] = fill, fill
        s.requires_grad_()
        loss = pc_kernels.perception_coherence_loss(
            s, t, dissimilarity=metric, pair_mask=real[:, None] & real, backend=backend
        )
        loss.backward()
        assert s.grad is not None and not s.grad[~real].any()
        results.append((loss.detach(), s.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_nan_reaches_those_who_see_it(backend: str, rng: Generator) -> None:
    student, teacher = torch.randn(12, 3, generator=rng), torch.randn(12, 3, generator=rng)
    student[4, 1] = math.nan
    sees = torch.rand(12, generator=rng) < 0.5
    keep = torch.ones(12, 12, dtype=torch.bool)
    keep[:, 4] = sees
    student.requires_grad_()
    losses = pc_kernels.perception_coherence_loss(
        student, teacher, pair_mask=keep, reduction="none", backend=backend
    )
    touched = sees | (torch.arange(12) == 4)
    assert torch.equal(losses.isnan(), touched)
    losses[~touched].sum().backward()
    assert student.grad is not None


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_mask_that_keeps_all_changes_nothing(backend: str, rng: Generator) -> None:
    student, teacher = torch.randn(30, 4, generator=rng), quantised(rng, 30, 4)
    results = []
    for pair_mask in (None, torch.ones(1, 1, dtype=torch.bool)):
        s = own_leaf(student)
        loss = pc_kernels.perception_coherence_loss(
            s, teacher, pair_mask=pair_mask, weights=torch.full((30,), 2.5), backend=backend
        )
        loss.backward()
        results.append((loss.item(), s.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_left_is_no_loss(reduction: str, rng: Generator) -> None:
    student, teacher = torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng)
    for options in (
        {"pair_mask": torch.zeros(1, 5, dtype=torch.bool)},
        {"weights": torch.zeros(5)},
    ):
        s = own_leaf(student)
        loss = pc_kernels.perception_coherence_loss(s, teacher, reduction=reduction, **options)
        loss.sum().backward()
        assert s.grad is not None and not loss.any() and not s.grad.any()


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(3e38, torch.float32), (1e-40, torch.float32), (1e-50, torch.float64), (1e300, torch.float64)],
)
def test_weights_of_any_size(size: float, dtype: torch.dtype, rng: Generator) -> None:
    """A weighted mean knows their shares, even where float32 holds neither them nor their sum."""
    student, teacher = torch.randn(9, 4, generator=rng), quantised(rng, 9, 3)
    parts = torch.randint(1, 9, (9,), generator=rng).to(dtype) / 8
    losses = []
    for weights in (parts, size * parts):
        leaf = own_leaf(student)
        losses.append(pc_kernels.perception_coherence_loss(leaf, teacher, weights=weights))
        losses[-1].backward()
        assert leaf.grad is not None and leaf.grad.norm() > 0
    # 1e-40 in float32 has 16 bits, each weight rounded by half of the last one
    assert torch.allclose(*losses, rtol=2.0**-13 if size == 1e-40 else 1e-6)


def test_a_sum_of_weights_that_is_infinite_is_no_mean(rng: Generator) -> None:
    weights = torch.full((9,), 1e308, dtype=torch.float64)
    student, teacher = torch.randn(9, 4, generator=rng), quantised(rng, 9, 3)
    assert pc_kernels.perception_coherence_loss(student, teacher, weights=weights).isnan()


def test_weights_are_those_of_repeated_anchors(rng: Generator) -> None:
    """Whole weights are anchors counted that often."""
    refs = torch.randn(30, 4, generator=rng), torch.randn(30, 4, generator=rng)
    student, teacher = torch.randn(6, 4, generator=rng), torch.randn(6, 4, generator=rng)
    times = torch.tensor([0, 1, 2, 3, 0, 1])
    weighted = pc_kernels.perception_coherence_loss(
        student, teacher, *refs, weights=times.bfloat16()
    )
    repeated = pc_kernels.perception_coherence_loss(
        student.repeat_interleave(times, 0), teacher.repeat_interleave(times, 0), *refs
    )
    assert weighted.item() == pytest.approx(repeated.item(), rel=1e-6)


BAD = {
    "weights list": ({"weights": [1.0] * 6}, TypeError, ["weights", "torch.Tensor", "list"]),
    "weights int": ({"weights": torch.ones(6).long()}, TypeError, ["weights", "int64"]),
    "weights shape": ({"weights": torch.ones(5)}, ValueError, ["weights", "(6,)", "(5,)"]),
    "weights matrix": ({"weights": torch.ones(6, 1)}, ValueError, ["weights", "(6, 1)"]),
    "mask float": ({"pair_mask": torch.ones(6, 6)}, TypeError, ["pair_mask", "bool", "float32"]),
    "mask list": ({"pair_mask": [[True] * 6] * 6}, TypeError, ["pair_mask", "list"]),
    "mask vector": ({"pair_mask": torch.ones(6).bool()}, ValueError, ["pair_mask", "(6,)"]),
    "mask shape": ({"pair_mask": torch.ones(6, 5).bool()}, ValueError, ["(6, 6)", "(6, 5)"]),
    "mask device": (
        {"pair_mask": torch.ones(6, 6, dtype=torch.bool, device="meta")},
        ValueError,
        ["pair_mask", "meta"],
    ),
    "weights device": ({"weights": torch.ones(6, device="meta")}, ValueError, ["weights", "meta"]),
}


@pytest.mark.parametrize(("options", "error", "words"), BAD.values(), ids=BAD)
def test_errors(options: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    x = torch.rand(6, 6)
    for function in (
        pc_kernels.perception_coherence_loss,
        pc_kernels.coherence_loss_from_dissimilarities,
        pc_kernels.PerceptionCoherenceLoss(),
    ):
        with pytest.raises(error) as caught:
            function(x, x, **options)
        assert all(word in str(caught.value) for word in words), caught.value
