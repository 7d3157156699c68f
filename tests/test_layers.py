"""The loss of several layers, and pooling that is never silent."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compare import BACKEND_NAMES
from inputs import quantised
from torch import Generator, Tensor

import pc_kernels

single = pc_kernels.perception_coherence_loss
UTILS = ("test_schema", "test_faketensor")  # its backward belongs to a torch.autograd.Function


def leaf(rng: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng).requires_grad_()


def test_pooling(rng: Generator) -> None:
    vectors, tokens = torch.randn(4, 6, generator=rng), torch.randn(4, 5, 6, generator=rng)
    maps, video = torch.randn(4, 6, 3, 2, generator=rng), torch.randn(4, 6, 3, 2, 2, generator=rng)
    pool = pc_kernels.pool_features
    for way in (None, "mean", "max", "first", "flatten"):
        assert pool(vectors, way) is vectors
    assert torch.equal(pool(tokens, "mean"), tokens.mean(1))
    assert torch.equal(pool(tokens, "max"), tokens.amax(1))
    assert torch.equal(pool(tokens, "first"), tokens[:, 0])
    assert torch.equal(pool(maps, "mean"), maps.mean((2, 3)))
    assert torch.equal(pool(maps, "max"), maps.amax((2, 3)))
    assert torch.equal(pool(maps, "flatten"), maps.reshape(4, 36))
    assert torch.equal(pool(video, "mean"), video.mean((2, 3, 4)))


@pytest.mark.parametrize(
    ("shape", "pool", "words"),
    [
        ((4, 6, 3, 3), None, r"x has shape \(4, 6, 3, 3\): say how to pool"),
        ((4, 6, 3), None, "say how to pool"),
        ((4,), "mean", r"x must be .* got shape \(4,\)"),
        ((4, 6, 3, 3), "first", "tokens"),
        ((4, 6, 0, 3), "mean", "nothing to pool"),
        ((4, 6, 3), "average", "pool must be one of"),
    ],
)
def test_pooling_errors(shape: tuple[int, ...], pool: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pc_kernels.pool_features(torch.zeros(shape), pool)


def test_a_loss_points_to_pooling() -> None:
    with pytest.raises(ValueError, match="pool_features"):
        single(torch.zeros(4, 6, 3, 3), torch.zeros(4, 6))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("named", [False, True])
def test_it_is_the_sum_of_its_layers(named: bool, reduction: str, rng: Generator) -> None:
    names = ("mid", "tokens", "out")
    shapes = ((12, 8, 4, 4), (12, 5, 7), (12, 6))
    students = [leaf(rng, *shape) for shape in shapes]
    teachers = [torch.randn(12, 9, 2, 2, generator=rng), *(s.detach() ** 3 for s in students[1:])]
    lam = [0.5, 0.0, 2.0]
    options: dict[str, Any] = {"reduction": reduction, "dissimilarity": "cosine"}
    extra = {
        "weights": torch.rand(12, generator=rng),
        "pair_mask": torch.rand(12, 12, generator=rng) < 0.7,
    }
    pool: Any = "mean"
    given: tuple[Any, ...] = (lam, students, teachers)
    if named:
        pool = {"mid": "mean", "tokens": "mean"}
        given = tuple(dict(zip(names, values, strict=True)) for values in given)
    loss_fn = pc_kernels.MultiLayerPerceptionCoherenceLoss(given[0], pool=pool, **options)
    loss = loss_fn(*given[1:], **extra)
    pooled = [pc_kernels.pool_features(x, "mean") for x in (*students, *teachers)]
    wanted = sum(
        weight * single(s, t, **options, **extra)
        for weight, s, t in zip(lam, pooled[:3], pooled[3:], strict=True)
    )
    assert torch.allclose(loss, wanted, rtol=1e-6)
    got = torch.autograd.grad(loss.sum(), students)
    for a, b in zip(got, torch.autograd.grad(wanted.sum(), students), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_one_teacher_for_all(backend: str, masked: bool, reduction: str, rng: Generator) -> None:
    """Ranked once, and the same numbers as ranked for each."""
    students = [leaf(rng, 40, 3), leaf(rng, 40, 300), leaf(rng, 40, 7)]
    teacher = quantised(rng, 40, 5)
    extra: dict[str, Any] = {}
    if masked:
        extra["weights"] = torch.rand(40, generator=rng)
        extra["pair_mask"] = torch.rand(40, 40, generator=rng) < 0.6
        extra["pair_mask"][:3] = torch.arange(40) < torch.arange(3)[:, None]
    options: dict[str, Any] = {"reduction": reduction, "backend": backend, "chunk_bytes": 9000}
    loss = pc_kernels.MultiLayerPerceptionCoherenceLoss(**options)(students, teacher, **extra)
    wanted = sum(single(s, teacher, **options, **extra) for s in students) / 3
    assert torch.allclose(loss, wanted, rtol=1e-6, atol=1e-9)
    upstream = torch.rand(loss.shape, generator=rng)
    got = torch.autograd.grad(loss, students, upstream)
    for a, b in zip(got, torch.autograd.grad(wanted, students, upstream), strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_one_teacher_with_a_hole(backend: str, rng: Generator) -> None:
    """NaN where it would be without sharing."""
    students, teacher = [leaf(rng, 9, 3), leaf(rng, 9, 4)], torch.randn(9, 5, generator=rng)
    teacher[4, 2] = math.nan
    keep = torch.ones(9, 9, dtype=torch.bool)
    keep[:5, 4] = False
    layered = pc_kernels.MultiLayerPerceptionCoherenceLoss(reduction="none", backend=backend)
    for pair_mask in (None, keep):
        losses = layered(students, teacher, pair_mask=pair_mask)
        wanted = single(
            students[0], teacher, pair_mask=pair_mask, reduction="none", backend=backend
        )
        assert torch.equal(losses.isnan(), wanted.isnan()) and losses.isnan().any()


def test_one_teacher_and_what_cannot_be_shared(rng: Generator) -> None:
    """A callable metric, and dtypes that differ: the same sum."""
    teacher = torch.randn(12, 5, generator=rng)
    students = [leaf(rng, 12, 3), leaf(rng, 12, 4).detach().bfloat16().requires_grad_()]
    for metric in (torch.cdist, "cosine"):
        layered = pc_kernels.MultiLayerPerceptionCoherenceLoss([1.0, 2.0], dissimilarity=metric)
        mine = [students[0], students[0]] if callable(metric) else students
        loss = layered(mine, teacher)
        wanted = sum(
            w * single(s, teacher, dissimilarity=metric) for w, s in zip((1, 2), mine, strict=True)
        )
        assert torch.allclose(loss, wanted, rtol=1e-6)
        loss.backward()
    assert students[1].grad is not None and students[1].grad.dtype == torch.bfloat16


def test_a_teacher_pooled_in_two_ways(rng: Generator) -> None:
    """One tensor, but not one teacher: each layer has what its own pooling makes of it."""
    tokens = torch.randn(8, 4, 5, generator=rng)
    students = {"a": leaf(rng, 8, 3), "b": leaf(rng, 8, 4)}
    layered = pc_kernels.MultiLayerPerceptionCoherenceLoss(pool={"a": "mean", "b": "max"})
    alone = pc_kernels.PerceptionCoherenceLoss()
    wanted = (alone(students["a"], tokens.mean(1)) + alone(students["b"], tokens.amax(1))) / 2
    assert torch.allclose(layered(students, tokens), wanted, rtol=1e-6)


def test_compile_and_opcheck(rng: Generator) -> None:
    students, teacher = [leaf(rng, 8, 3), leaf(rng, 8, 4)], torch.randn(8, 5, generator=rng)
    layered = pc_kernels.MultiLayerPerceptionCoherenceLoss()
    compiled = torch.compile(layered, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(students, teacher), layered(students, teacher))
    options = ("euclidean", "cosine", "logistic", 0.1, "std", "squared", None, "auto", "ieee")
    arguments = (students, teacher, None, None, torch.rand(2, 8), None, 0, False, *options)
    op = torch.ops.pc_kernels.ranking_loss.default
    torch.library.opcheck(op, (*arguments, False), test_utils=UTILS)
    torch.library.opcheck(op, (*arguments, True), test_utils=UTILS)


def test_errors(rng: Generator) -> None:
    x, maps = torch.randn(5, 3, generator=rng), torch.randn(5, 3, 2, 2, generator=rng)
    layered = pc_kernels.MultiLayerPerceptionCoherenceLoss
    for call, words in (
        (lambda: layered()([], []), "no layers"),
        (lambda: layered()({"a": x}, {"b": x}), r"teacher must have the layers.*'a'.*'b'"),
        (lambda: layered([1.0, 2.0])([x], [x]), "layer_weights must have the layers"),
        (lambda: layered()({"a": maps}, {"a": x}), r"student\['a'\] has shape"),
        (lambda: layered(pool="max")([x, x[:4]], [x, x]), "same inputs"),
        (lambda: layered(pool="sum"), "pool must be one of"),
        (lambda: layered(temperature=-1.0), "temperature"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    for call in (lambda: layered()(x, x), lambda: layered(3.0)([x], [x])):
        with pytest.raises(TypeError, match="a mapping or a sequence"):
            call()
