"""The whole loss, features to gradients: every backend against the truth in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
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
    own_leaf,
)
from inputs import quantised
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import installation


def batch(rng: Generator, rows: int, width: int = 12) -> tuple[Tensor, Tensor]:
    """Student features, and teacher features whose distances are exact."""
    return torch.randn(rows, width, generator=rng), quantised(rng, rows, 8)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_every_combination(
    backend: str, metric: str, relaxation: str, penalty: str, reduction: str, rng: Generator
) -> None:
    options = {"relaxation": relaxation, "penalty": penalty, "reduction": reduction}
    metrics = {"dissimilarity": metric, "teacher_dissimilarity": "euclidean"}
    student, teacher = batch(rng, 17)
    check_features(backend, student, teacher, rng, **metrics, **options)
    refs = batch(rng, 22)
    check_features(backend, student, teacher, rng, refs=refs, **metrics, **options)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 16, 64, 65])
@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_batch_sizes(backend: str, metric: str, rows: int, rng: Generator) -> None:
    student, teacher = batch(rng, rows)
    for reduction in REDUCTIONS:
        check_features(
            backend,
            student,
            teacher,
            rng,
            dissimilarity=metric,
            teacher_dissimilarity="sqeuclidean",
            reduction=reduction,
        )


@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_batch_of_513(backend: str, metric: str, rng: Generator) -> None:
    """Compared on some of the anchors, anywhere in the batch and in its chunks."""
    student, teacher = batch(rng, 513, 33)
    check_features(
        backend,
        student,
        teacher,
        rng,
        dissimilarity=metric,
        teacher_dissimilarity="cityblock",
        reduction="none",
        chunk_bytes=1 << 20,
        only=torch.randperm(513, generator=rng)[:24],
    )


@pytest.mark.parametrize(("anchors", "references"), [(1, 2), (1, 40), (40, 2), (5, 129), (33, 1)])
@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_rectangular(
    backend: str, metric: str, anchors: int, references: int, rng: Generator
) -> None:
    student, teacher = batch(rng, anchors)
    check_features(
        backend,
        student,
        teacher,
        rng,
        refs=batch(rng, references),
        dissimilarity=metric,
        teacher_dissimilarity="euclidean",
        reduction="sum",
    )


@pytest.mark.parametrize(("anchors", "references"), [(0, 0), (0, 5), (5, 0), (5, 1), (0, 1)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_nothing_to_rank(
    backend: str, metric: str, reduction: str, anchors: int, references: int, rng: Generator
) -> None:
    student, refs = own_leaf(torch.randn(anchors, 3)), own_leaf(torch.randn(references, 3))
    loss = pc_kernels.perception_coherence_loss(
        student,
        torch.randn(anchors, 2),
        refs,
        torch.randn(references, 2),
        dissimilarity=metric,
        reduction=reduction,
        backend=backend,
    )
    assert (loss == 0).all() and loss.shape == ((anchors,) if reduction == "none" else ())
    loss.sum().backward()
    for leaf in (student, refs):
        assert leaf.grad is not None and (leaf.grad == 0).all()


@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_temperatures(
    backend: str,
    metric: str,
    relaxation: str,
    scale: str | None,
    temperature: float,
    rng: Generator,
) -> None:
    student, teacher = batch(rng, 48)
    check_features(
        backend,
        student,
        teacher,
        rng,
        dissimilarity=metric,
        teacher_dissimilarity="euclidean",
        relaxation=relaxation,
        scale=scale,
        temperature=temperature,
    )


def clear_of_ties(rng: Generator, rows: int, metric: str) -> Tensor:
    """Continuous features whose dissimilarities differ by more than float32 rounds them."""
    while True:
        x = torch.randn(rows, 6, generator=rng)
        d = pc_kernels.reference.pairwise_dissimilarity(x.double(), None, metric)
        gaps = d.sort(1).values.diff(dim=1)[:, 1:]  # past the anchor itself
        if gaps.min() > 1e-5:
            return x


@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_every_metric_for_the_teacher(backend: str, metric: str, rng: Generator) -> None:
    student, teacher = torch.randn(13, 5, generator=rng), clear_of_ties(rng, 13, metric)
    check_features(backend, student, teacher, rng, dissimilarity=metric)
    check_features(
        backend,
        student,
        teacher,
        rng,
        dissimilarity="sqeuclidean",
        teacher_dissimilarity=metric,
    )


@pytest.mark.parametrize("width", [1, 2, 3, 127, 2048])
@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_widths(backend: str, metric: str, width: int, rng: Generator) -> None:
    """Cosine dissimilarities of width 1 are 0 and 2, up to their rounding: a row of its own below."""
    if metric == "cosine" and width == 1:
        pytest.skip("see test_cosine_of_width_1")
    student, teacher = batch(rng, 20, width)
    check_features(
        backend,
        student,
        teacher,
        rng,
        dissimilarity=metric,
        teacher_dissimilarity="euclidean",
    )


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_cosine_of_width_1(backend: str, rng: Generator) -> None:
    """Signs are all there is: x/|x| is ±1 exactly, hence ties are ties."""
    student, teacher = batch(rng, 20, 1)
    student[student == 0] = 1
    check_features(
        backend, student, teacher, rng, dissimilarity="cosine", teacher_dissimilarity="euclidean"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_low_precision_features(
    backend: str, metric: str, dtype: torch.dtype, rng: Generator
) -> None:
    """Computed in float32 from what the features are; gradients in the features' dtype."""
    student, teacher = batch(rng, 30)
    refs = batch(rng, 22)
    metrics = {"dissimilarity": metric, "teacher_dissimilarity": "euclidean"}
    for teacher_dtype in (dtype, torch.float32):
        check_features(
            backend,
            student.to(dtype),
            teacher.to(teacher_dtype),
            rng,
            refs=(refs[0].to(dtype), refs[1].to(teacher_dtype)),
            **metrics,
        )
        check_features(backend, student.to(dtype), teacher.to(teacher_dtype), rng, **metrics)


@pytest.mark.parametrize("temperature", [1e-2, 0.1, 10.0])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_double(
    backend: str,
    metric: str,
    relaxation: str,
    penalty: str,
    temperature: float,
    rng: Generator,
) -> None:
    student, teacher = batch(rng, 21)
    check_features(
        backend,
        student.double(),
        teacher.double(),
        rng,
        dissimilarity=metric,
        teacher_dissimilarity="euclidean",
        relaxation=relaxation,
        penalty=penalty,
        temperature=temperature,
    )


@pytest.mark.parametrize("double", ["student", "teacher"])
def test_one_double_input_makes_all_of_it_double(double: str, rng: Generator) -> None:
    student, teacher = batch(rng, 21)
    if double == "student":
        student = student.double()
    else:
        teacher = teacher.double()
    check_features("auto", student, teacher, rng)


def minkowski(a: Tensor, b: Tensor) -> Tensor:
    return ((a[:, None, :] - b[None, :, :]).abs() + 1e-3).pow(1.5).sum(-1)


CALLABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "minkowski": minkowski,
    "product": lambda a, b: -(a @ b.T),
    "transposed": lambda a, b: -(b @ a.T).T,
    "of the references alone": lambda a, b: b.square().sum(1) + 0 * a[:, :1],
}


@pytest.mark.parametrize("chunk_bytes", [None, 1])
@pytest.mark.parametrize("with_refs", [False, True])
@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_callables(
    backend: str, name: str, with_refs: bool, chunk_bytes: int | None, rng: Generator
) -> None:
    student, teacher = batch(rng, 11, 4)
    refs = batch(rng, 9, 4) if with_refs else None
    check_features(
        backend,
        student,
        teacher,
        rng,
        refs=refs,
        dissimilarity=CALLABLES[name],
        teacher_dissimilarity="euclidean",
        chunk_bytes=chunk_bytes,
    )


def test_a_callable_for_the_teacher_alone(rng: Generator) -> None:
    student, teacher = batch(rng, 11)

    def exact(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None, :] - b[None, :, :]).square().sum(-1)

    check_features("auto", student, teacher, rng, teacher_dissimilarity=exact)


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 20_000])
@pytest.mark.parametrize("metric", DISSIMILARITIES)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_chunks_do_not_show(backend: str, metric: str, chunk_bytes: int, rng: Generator) -> None:
    student, teacher = batch(rng, 37)
    metrics = {"dissimilarity": metric, "teacher_dissimilarity": "euclidean"}
    for refs in (None, batch(rng, 50)):
        for reduction in ("mean", "none"):
            check_features(
                backend,
                student,
                teacher,
                rng,
                refs=refs,
                reduction=reduction,
                chunk_bytes=chunk_bytes,
                **metrics,
            )


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_duplicates_and_constant_rows(backend: str, rng: Generator) -> None:
    student, teacher = batch(rng, 24)
    student = student[torch.randint(0, 6, (24,), generator=rng)]
    for metric in DISSIMILARITIES:
        metrics = {"dissimilarity": metric, "teacher_dissimilarity": "euclidean"}
        check_features(backend, student, teacher, rng, **metrics)
    same = student[:1].expand(24, 12)
    leaf = same.clone().requires_grad_()
    for metric in DISSIMILARITIES:
        loss = pc_kernels.perception_coherence_loss(
            leaf, teacher, dissimilarity=metric, backend=backend
        )
        assert loss.isfinite() and loss > 0  # ½ everywhere, and the teacher ranks
        (grad,) = torch.autograd.grad(loss, leaf)
        assert (grad == 0).all(), metric


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_vectors_of_zeros(backend: str, rng: Generator) -> None:
    """Cosine dissimilarity 1 to everything, and no gradient of their own."""
    student, teacher = batch(rng, 16)
    student[[2, 3, 11]] = 0
    check_features(
        backend, student, teacher, rng, dissimilarity="cosine", teacher_dissimilarity="euclidean"
    )


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_the_module_is_the_function(backend: str, rng: Generator) -> None:
    student, teacher = batch(rng, 10)
    refs = batch(rng, 12)
    options: dict[str, Any] = {
        "dissimilarity": "cosine",
        "teacher_dissimilarity": "cityblock",
        "relaxation": "normal",
        "temperature": 0.3,
        "scale": None,
        "penalty": "huber",
        "reduction": "none",
        "chunk_bytes": 1000,
        "backend": backend,
    }
    module = pc_kernels.PerceptionCoherenceLoss(**options)
    for arguments in ((student, teacher), (student, teacher, *refs)):
        expected = pc_kernels.perception_coherence_loss(*arguments, **options)
        assert torch.equal(module(*arguments), expected)
    assert "cosine" in repr(module) and "huber" in repr(module)
    assert not list(module.parameters())


def test_defaults_are_documented_ones(rng: Generator) -> None:
    student, teacher = batch(rng, 10)
    expected = pc_kernels.perception_coherence_loss(
        student,
        teacher,
        dissimilarity="euclidean",
        teacher_dissimilarity="euclidean",
        relaxation="logistic",
        temperature=0.1,
        scale="std",
        penalty="squared",
        reduction="mean",
        backend="auto",
    )
    assert torch.equal(pc_kernels.PerceptionCoherenceLoss()(student, teacher), expected)
    assert torch.equal(pc_kernels.perception_coherence_loss(student, teacher), expected)


def test_what_a_value_says(rng: Generator) -> None:
    """The levels of docs/method.md: collapsed, hard ranks by Spearman's correlation, reversed."""
    teacher = torch.rand(40, 39, generator=rng)
    loss_of = pc_kernels.coherence_loss_from_dissimilarities
    exact = (39 + 1) / (12 * (39 - 1))  # the variance of ranks, 1/12 for many
    assert loss_of(torch.ones(40, 39), teacher).item() == pytest.approx(exact, rel=1e-5)
    student = teacher + torch.rand(40, 39, generator=rng)
    ranks = [x.argsort(1).argsort(1).double() for x in (student, teacher)]
    rho = 1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum(1) / (39 * (39**2 - 1))
    hard = loss_of(student, teacher, temperature=1e-5)
    assert hard.item() == pytest.approx(float((1 - rho).mean()) * 2 * exact, rel=1e-4)
    assert loss_of(-teacher, teacher, temperature=1e-5).item() == pytest.approx(4 * exact, rel=1e-4)


@pytest.mark.parametrize(("scale", "enough"), [("std", 4), (None, 3)])
def test_batches_too_small_to_teach(
    scale: str | None, enough: int, monkeypatch: pytest.MonkeyPatch, rng: Generator
) -> None:
    """They have no gradient, which is said once; one more row has one."""
    monkeypatch.setattr(installation, "_warned", set())
    for rows in (0, enough):
        student = torch.randn(rows, 3, generator=rng, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = pc_kernels.perception_coherence_loss(student, torch.randn(rows, 3), scale=scale)
        loss.backward()
        assert student.grad is not None and (rows == 0 or student.grad.any())
    small = torch.randn(enough - 1, 3, generator=rng, requires_grad=True)
    with pytest.warns(UserWarning, match=f"a batch of {enough - 1} has {enough - 2} ref") as caught:
        for _ in range(2):
            loss = pc_kernels.perception_coherence_loss(
                small, torch.randn(enough - 1, 3), scale=scale
            )
    loss.backward()
    assert len(caught) == 1 and caught[0].filename == __file__
    assert small.grad is not None and small.grad.abs().max() < 1e-5
