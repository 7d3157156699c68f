"""The reference itself: by hand, by brute force, and its gradients by differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import truth
from compare import DISSIMILARITIES, PENALTIES, REDUCTIONS, RELAXATIONS, SCALES, assert_near
from torch import Generator, Tensor

from pc_kernels import reference

EXACT = 1e-14


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_hard_rank_by_hand() -> None:
    assert reference.hard_rank(double(3, 1, 2, 2)).tolist() == [1, 0, 0.5, 0.5]
    assert reference.hard_rank(double(5, 5, 5)).tolist() == [0.5, 0.5, 0.5]
    assert reference.hard_rank(double(0.0, -0.0, 1)).tolist() == [0.25, 0.25, 1]
    assert reference.hard_rank(double(7)).tolist() == [0.5]
    assert reference.hard_rank(double(1, math.nan, 2)).isnan().all()


def test_hard_rank_of_infinities_by_hand() -> None:
    rank = reference.hard_rank(double(1, math.inf, 2, -math.inf, math.inf))
    assert rank.tolist() == [0.25, 0.875, 0.5, 0, 0.875]


def test_soft_rank_by_hand() -> None:
    step = 1 / (1 + math.exp(-2))  # of values 1 apart at τ = ½
    rank = reference.soft_rank(double(0, 1), temperature=0.5)
    assert_near("rank", rank, double(1 - step, step), EXACT)
    # values ±1 have σ = 1
    rank = reference.soft_rank(double(-1, 1), temperature=1, scale="std")
    assert_near("rank", rank, double(1 - step, step), EXACT)
    normal = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    rank = reference.soft_rank(double(0, 1), temperature=1, relaxation="normal")
    assert_near("rank", rank, double(1 - normal, normal), EXACT)
    assert reference.soft_rank(double(4, 4, 4), scale="std").tolist() == [0.5] * 3
    assert reference.soft_rank(double(4)).tolist() == [0.5]
    assert reference.soft_rank(double(1, math.inf, 2)).isnan().all()


def test_loss_by_hand() -> None:
    step = 1 / (1 + math.exp(-2))
    d_s, d_t = double(0, 1)[None], double(9, 4)[None]  # the teacher's order is the other one
    expected = {"squared": step**2, "absolute": step, "huber": 0.1 * (step - 0.05)}
    for penalty, value in expected.items():
        loss = reference.coherence_loss_from_dissimilarities(
            d_s, d_t, temperature=0.5, scale=None, penalty=penalty
        )
        assert_near(penalty, loss, scalar(value), EXACT)


def test_reductions_by_hand(rng: Generator) -> None:
    d_s, d_t = torch.rand(2, 5, 4, generator=rng, dtype=torch.float64)
    rows = reference.coherence_loss_from_dissimilarities(d_s, d_t, reduction="none")
    assert rows.shape == (5,)
    for reduction, value in (("sum", rows.sum()), ("mean", rows.mean())):
        loss = reference.coherence_loss_from_dissimilarities(d_s, d_t, reduction=reduction)
        assert_near(reduction, loss, value, EXACT)
    for i in range(5):
        one = reference.coherence_loss_from_dissimilarities(d_s[i : i + 1], d_t[i : i + 1])
        assert_near("row", one, rows[i], EXACT)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_ranks_by_brute_force(relaxation: str, rng: Generator) -> None:
    x = torch.randint(0, 6, (9,), generator=rng).double()
    m, temperature = len(x), 0.7
    cdf = {
        "logistic": lambda z: 1 / (1 + math.exp(-z)),
        "normal": lambda z: 0.5 * math.erfc(-z / math.sqrt(2)),
    }[relaxation]
    for j in range(m):
        others = [x[k].item() for k in range(m) if k != j]
        hard = sum((o < x[j]) + 0.5 * (o == x[j]) for o in others) / (m - 1)
        soft = sum(cdf((x[j].item() - o) / temperature) for o in others) / (m - 1)
        assert_near("hard", reference.hard_rank(x)[j], scalar(hard), EXACT)
        rank = reference.soft_rank(x, temperature, relaxation)[j]
        assert_near("soft", rank, scalar(soft), 1e-12)


@pytest.mark.parametrize("metric", DISSIMILARITIES)
def test_dissimilarities_by_brute_force(metric: str, rng: Generator) -> None:
    x, y = (torch.randn(n, 3, generator=rng, dtype=torch.float64) for n in (4, 5))
    by_hand = {
        "euclidean": lambda a, b: math.dist(a, b),
        "sqeuclidean": lambda a, b: math.dist(a, b) ** 2,
        "cityblock": lambda a, b: sum(abs(p - q) for p, q in zip(a, b, strict=True)),
        "cosine": lambda a, b: (
            1 - sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
        ),
    }[metric]
    d = reference.pairwise_dissimilarity(x, y, metric)
    for i, j in itertools.product(range(4), range(5)):
        value = scalar(by_hand(x[i].tolist(), y[j].tolist()))
        assert_near("δ", d[i, j], value, 1e-12)


def test_soft_rank_becomes_hard_rank(rng: Generator) -> None:
    x = torch.randperm(50, generator=rng)[:20].double()
    for relaxation in RELAXATIONS:
        rank = reference.soft_rank(x, 1e-3, relaxation)
        assert_near("rank", rank, reference.hard_rank(x), EXACT)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_gradcheck_of_soft_rank(relaxation: str, scale: str | None, rng: Generator) -> None:
    x = torch.randn(2, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: reference.soft_rank(v, 0.5, relaxation, scale), (x,))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradcheck_of_the_loss_of_matrices(penalty: str, reduction: str, rng: Generator) -> None:
    # Far from the kinks of `absolute` and `huber`: ranks of two values are Φ(±2/t), teachers' are 0, 1.
    d_s = torch.rand(4, 2, generator=rng, dtype=torch.float64).requires_grad_()
    d_t = torch.rand(4, 2, generator=rng, dtype=torch.float64)

    def loss(d: Tensor) -> Tensor:
        return reference.coherence_loss_from_dissimilarities(
            d, d_t, temperature=1.0, scale=None, penalty=penalty, reduction=reduction
        )

    assert torch.autograd.gradcheck(loss, (d_s,))


@pytest.mark.parametrize("with_refs", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("metric", DISSIMILARITIES)
def test_gradcheck_of_the_loss(
    metric: str, relaxation: str, scale: str | None, with_refs: bool, rng: Generator
) -> None:
    student = torch.randn(5, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    refs = torch.randn(4, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 2, generator=rng, dtype=torch.float64)
    teacher_refs = torch.randn(4, 2, generator=rng, dtype=torch.float64)

    def loss(s: Tensor, r: Tensor | None = None) -> Tensor:
        return reference.perception_coherence_loss(
            s,
            teacher,
            r,
            teacher_refs if with_refs else None,
            dissimilarity=metric,
            relaxation=relaxation,
            temperature=0.5,
            scale=scale,
        )

    assert torch.autograd.gradcheck(loss, (student, refs) if with_refs else (student,))


def test_kinks_have_gradient_zero() -> None:
    x = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    for metric in ("euclidean", "sqeuclidean", "cityblock"):
        (grad,) = torch.autograd.grad(reference.pairwise_dissimilarity(x, None, metric).sum(), x)
        assert (grad == 0).all(), metric
    zero = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    d = reference.pairwise_dissimilarity(zero, None, "cosine")
    (grad,) = torch.autograd.grad(d.sum(), zero)
    assert (d == 1).all() and (grad == 0).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_long_rows_of_the_truth(relaxation: str, scale: str | None, rng: Generator) -> None:
    """tests/truth.py sums long rows by formulas of its own: the same as the reference by autograd."""
    x, g = torch.randn(2, 3, 40, generator=rng, dtype=torch.float64)
    short = truth.soft_rank(x, g, 0.3, relaxation, scale)
    for i in range(3):
        rank, grad, magnitude = truth._long_row(x[i], g[i], 0.3, relaxation, scale)
        assert_near("rank", rank, short.rank[i], EXACT)
        assert_near("gradient", grad, short.grad[i], 1e-12)
        assert_near("magnitude", magnitude, short.magnitude[i], 1e-12)


def test_coherence_by_brute_force(rng: Generator) -> None:
    d_s = torch.randint(0, 5, (3, 7), generator=rng).double()
    d_t = torch.randint(0, 5, (3, 7), generator=rng).double()
    agreement = spearman = 0.0
    for a, b in zip(d_s.tolist(), d_t.tolist(), strict=True):
        pairs = list(itertools.combinations(range(7), 2))
        same = sum(
            0.5 if a[j] == a[k] or b[j] == b[k] else float((a[j] < a[k]) == (b[j] < b[k]))
            for j, k in pairs
        )
        agreement += same / len(pairs) / 3
        ranks = torch.stack([reference.hard_rank(double(*row)) for row in (a, b)])
        flat = bool((ranks.std(1) == 0).any())
        spearman += 0.0 if flat else torch.corrcoef(ranks)[0, 1].item() / 3
    result = reference.coherence_from_dissimilarities(d_s, d_t)
    assert_near("agreement", result.agreement, scalar(agreement), EXACT)
    assert_near("Spearman", result.spearman, scalar(spearman), 1e-12)


def test_matrices_keep_their_other_half_to_themselves(rng: Generator) -> None:
    """`exclude_self` reads no diagonal, not even a NaN."""
    d_s, d_t = torch.rand(2, 6, 6, generator=rng, dtype=torch.float64)
    clean = reference.coherence_loss_from_dissimilarities(d_s, d_t, exclude_self=True)
    d_s.fill_diagonal_(math.nan)
    d_t.fill_diagonal_(math.inf)
    again = reference.coherence_loss_from_dissimilarities(d_s, d_t, exclude_self=True)
    assert clean.item() == again.item()
