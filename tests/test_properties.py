"""What must hold whatever the numbers are: symmetries of ranks, of the loss and of its gradient."""

from __future__ import annotations

import itertools

import pytest
import tolerances
import torch
from compare import BACKEND_NAMES, DISSIMILARITIES, PENALTIES, RELAXATIONS, SCALES, own_leaf
from hypothesis import given
from hypothesis import strategies as st
from inputs import BEYOND_PLAIN_FLOAT32, ROWS, make_rows
from torch import Generator, Tensor

import pc_kernels

seeds = st.integers(0, 2**31 - 1)
temperatures = st.floats(0.02, 20.0)
relaxations = st.sampled_from(RELAXATIONS)
scales = st.sampled_from(SCALES)
penalties = st.sampled_from(PENALTIES)
widths = st.integers(1, 12)
lengths = st.integers(2, 70)
kinds = st.sampled_from(list(ROWS))
metrics = st.sampled_from(DISSIMILARITIES)
smooth_penalties = st.sampled_from(["squared", "huber"])

for_each_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)


def generator(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def pair(seed: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    rng = generator(seed)
    return torch.randn(rows, width, generator=rng), torch.randn(rows, 5, generator=rng)


@for_each_backend
@given(seed=seeds, rows=lengths, width=widths, exponent=st.integers(-20, 20), metric=metrics)
def test_scaling_the_student_by_a_power_of_two_changes_no_bit(
    backend: str, seed: int, rows: int, width: int, exponent: int, metric: str
) -> None:
    student, teacher = pair(seed, rows, width)
    options = {"dissimilarity": metric, "teacher_dissimilarity": "euclidean", "backend": backend}
    loss = pc_kernels.perception_coherence_loss(student, teacher, **options)
    scaled = pc_kernels.perception_coherence_loss(student * 2.0**exponent, teacher, **options)
    assert torch.equal(loss, scaled)


@for_each_backend
@given(seed=seeds, rows=st.integers(3, 70), factor=st.floats(1e-3, 1e3), metric=metrics)
def test_scaling_the_student_leaves_the_loss(
    backend: str, seed: int, rows: int, factor: float, metric: str
) -> None:
    """Scaled features are rounded, by u each; the loss may feel it κ = δ/τ ≲ 100 times."""
    student, teacher = pair(seed, rows, 8)
    options = {"dissimilarity": metric, "teacher_dissimilarity": "euclidean", "backend": backend}
    loss = pc_kernels.perception_coherence_loss(student, teacher, **options)
    scaled = pc_kernels.perception_coherence_loss(student * factor, teacher, **options)
    assert abs(loss - scaled) <= 100 * tolerances.U


@for_each_backend
@given(seed=seeds, rows=lengths, penalty=penalties, relaxation=relaxations, metric=metrics)
def test_permuting_the_batch_leaves_the_loss(
    backend: str, seed: int, rows: int, penalty: str, relaxation: str, metric: str
) -> None:
    student, teacher = pair(seed, rows, 6)
    order = torch.randperm(rows, generator=generator(seed + 1))
    options = {
        "dissimilarity": metric,
        "teacher_dissimilarity": "euclidean",
        "penalty": penalty,
        "relaxation": relaxation,
        "reduction": "none",
        "backend": backend,
    }
    losses = pc_kernels.perception_coherence_loss(student, teacher, **options)
    permuted = pc_kernels.perception_coherence_loss(student[order], teacher[order], **options)
    assert (permuted - losses[order]).abs().max() <= 100 * tolerances.U


@for_each_backend
@given(seed=seeds, rows=lengths)
def test_moving_all_features_leaves_the_loss(backend: str, seed: int, rows: int) -> None:
    """By whole numbers, on features that are multiples of 1/8: exactly the same distances."""
    rng = generator(seed)
    student = torch.randint(-32, 33, (rows, 6), generator=rng).float() / 8
    teacher = torch.randint(-32, 33, (rows, 6), generator=rng).float() / 8
    shift = torch.randint(-1000, 1001, (6,), generator=rng)
    loss = pc_kernels.perception_coherence_loss(student, teacher, backend=backend)
    moved = pc_kernels.perception_coherence_loss(student + shift, teacher + shift, backend=backend)
    assert abs(loss - moved) <= tolerances.LOSS * loss


@for_each_backend
@given(seed=seeds, m=lengths, kind=kinds)
def test_the_loss_sees_only_the_order_of_the_teacher(
    backend: str, seed: int, m: int, kind: str
) -> None:
    rng = generator(seed)
    d_s, d_t = torch.rand(3, m, generator=rng), make_rows("integers", rng, 3, m)
    loss = pc_kernels.coherence_loss_from_dissimilarities(d_s, d_t, backend=backend)
    for transformed in (d_t.exp(), d_t**3 - 5, (d_t + 1).log(), d_t * 1e30):
        again = pc_kernels.coherence_loss_from_dissimilarities(d_s, transformed, backend=backend)
        assert torch.equal(loss, again)


@for_each_backend
@given(seed=seeds, m=lengths, relaxation=relaxations, penalty=penalties)
def test_a_monotone_student_has_no_loss_as_the_temperature_falls(
    backend: str, seed: int, m: int, relaxation: str, penalty: str
) -> None:
    rng = generator(seed)
    d_t = torch.stack([torch.randperm(m, generator=rng) for _ in range(3)]).float()
    for d_s in (d_t, d_t.square() + 3, d_t * 1e3 - 7):
        losses = [
            pc_kernels.coherence_loss_from_dissimilarities(
                d_s,
                d_t,
                temperature=temperature,
                relaxation=relaxation,
                penalty=penalty,
                backend=backend,
            ).item()
            for temperature in (1.0, 1e-1, 1e-2, 1e-4)
        ]
        for warmer, colder in itertools.pairwise(losses):
            assert colder <= warmer + tolerances.RANK
        assert losses[-1] <= tolerances.RANK


@for_each_backend
@given(seed=seeds, m=lengths, kind=kinds, t=temperatures, relaxation=relaxations, scale=scales)
def test_symmetries_of_soft_ranks(
    backend: str, seed: int, m: int, kind: str, t: float, relaxation: str, scale: str | None
) -> None:
    x = make_rows(kind, generator(seed), 2, m)
    rank = pc_kernels.soft_rank(x, t, relaxation, scale, backend=backend).double()
    near = tolerances.RANK
    if backend == "reference" and kind in BEYOND_PLAIN_FLOAT32:
        return  # its formulas, as written, lose or overflow the mean and the variance of such rows
    assert rank.min() >= -near and rank.max() <= 1 + near
    assert (rank.sum(1) - m / 2).abs().max() <= m * near  # Φ(z) + Φ(−z) = 1
    mirrored = pc_kernels.soft_rank(-x, t, relaxation, scale, backend=backend)
    assert (rank + mirrored - 1).abs().max() <= 2 * near
    ordered = rank.gather(1, x.argsort(dim=1))
    assert ordered.diff(dim=1).min() >= -2 * near  # who is larger ranks no lower
    order = torch.randperm(m, generator=generator(seed + 1))
    permuted = pc_kernels.soft_rank(x[:, order], t, relaxation, scale, backend=backend)
    assert (permuted - rank[:, order]).abs().max() <= 2 * near


@for_each_backend
@given(seed=seeds, m=lengths, kind=kinds)
def test_symmetries_of_hard_ranks(backend: str, seed: int, m: int, kind: str) -> None:
    x = make_rows(kind, generator(seed), 2, m)
    rank = pc_kernels.hard_rank(x, backend=backend)
    assert rank.min() >= 0 and rank.max() <= 1
    assert (rank.double().sum(1) - m / 2).abs().max() <= m * 2 * tolerances.U
    order = torch.randperm(m, generator=generator(seed + 1))
    assert torch.equal(pc_kernels.hard_rank(x[:, order], backend=backend), rank[:, order])
    for a, r in zip(x, rank, strict=True):
        place = a.argsort()
        assert torch.equal(r[place].diff() > 0, a[place].diff() > 0)  # tied as the values are


@for_each_backend
@given(seed=seeds, m=st.integers(3, 70), t=temperatures, penalty=smooth_penalties, scale=scales)
def test_symmetries_of_the_gradient(
    backend: str, seed: int, m: int, t: float, penalty: str, scale: str | None
) -> None:
    """A row's loss does not change when the row is moved, nor, under "std", when it is stretched."""
    rng = generator(seed)
    d_s, d_t = own_leaf(torch.randn(4, m, generator=rng)), torch.randn(4, m, generator=rng)
    pc_kernels.coherence_loss_from_dissimilarities(
        d_s, d_t, temperature=t, penalty=penalty, scale=scale, reduction="sum", backend=backend
    ).backward()
    assert d_s.grad is not None
    grad, x = d_s.grad.double(), d_s.detach().double()
    # Terms are slopes up to 2/m, times φ ≤ 0.25 over τ, m of them over m − 1.
    sigma = x.std(1, correction=0, keepdim=True) if scale == "std" else torch.ones(4, 1)
    floor = 16 * tolerances.U * 2 / (t * sigma[:, 0] * m)
    allowed = tolerances.GRAD * grad.abs().sum(1) + floor * m**0.5
    assert (grad.sum(1).abs() <= allowed).all()
    if scale == "std":
        centred = (x - x.mean(1, keepdim=True)) / sigma
        assert ((grad * centred).sum(1).abs() <= allowed).all()


@for_each_backend
@given(seed=seeds, rows=st.integers(3, 40), penalty=penalties, t=temperatures)
def test_the_loss_is_bounded(backend: str, seed: int, rows: int, penalty: str, t: float) -> None:
    student, teacher = pair(seed, rows, 4)
    losses = pc_kernels.perception_coherence_loss(
        student, teacher, penalty=penalty, temperature=t, reduction="none", backend=backend
    )
    assert (losses >= 0).all() and (losses <= 1).all()


@given(seed=seeds, rows=st.integers(3, 40), width=widths, metric=metrics)
def test_coherence_is_symmetric_and_bounded(seed: int, rows: int, width: int, metric: str) -> None:
    a, b = pair(seed, rows, width)
    there = pc_kernels.coherence(a, b, dissimilarity=metric)
    back = pc_kernels.coherence(b, a, dissimilarity=metric)
    assert 0 <= there.agreement <= 1 and abs(there.spearman) <= 1 + 1e-6
    assert abs(there.agreement - back.agreement) <= 1e-6
    assert abs(there.spearman - back.spearman) <= 1e-6
