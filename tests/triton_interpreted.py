"""The Triton kernels in Triton's interpreter, against the truth in float64.

`test_triton.py` runs this file in a process of its own, since Triton must be loaded with
TRITON_INTERPRET=1. By hand: TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import tolerances
import torch
import truth
from compare import (
    DISSIMILARITIES,
    PENALTIES,
    RELAXATIONS,
    SCALES,
    assert_near,
    assert_norm_near,
    check_features,
    check_matrices,
    check_soft_rank,
    own_leaf,
)
from inputs import HOSTILE_FEATURES, ROWS, make_rows, quantised, two_clumps
from long_rows import LENGTH, LONG_ROWS
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import reference
from pc_kernels.backends import BACKENDS
from pc_kernels.dissimilarities import Chunk, Pairs, Points, Rows, make_side
from pc_kernels.dissimilarities.row_maker import PLAIN
from pc_kernels.recipe import Recipe
from pc_kernels.triton_kernels import hard_rank, launch, settings

BACKEND = "triton"


@pytest.fixture(params=["all pairs", "grid"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Short rows go the long rows' way too: products of matrices, grid and buckets.

    Two programs share the rows.
    """
    monkeypatch.setattr(settings, "_processors", lambda device: 2)
    if request.param == "grid":
        monkeypatch.setattr(launch, "ALL_PAIRS", 1)
        monkeypatch.setattr(launch, "ALL_COMPARED", 1)
        monkeypatch.setattr(launch, "NARROW", 0)
    return request.param


def batch(rng: Generator, rows: int, width: int = 5) -> tuple[Tensor, Tensor]:
    """Student features, and teacher features whose distances are exact."""
    return torch.randn(rows, width, generator=rng), quantised(rng, rows, 3)


def mask(rng: Generator, rows: int, columns: int) -> Tensor:
    """About two thirds of the pairs; the first two anchors keep none and one."""
    keep = torch.rand(rows, columns, generator=rng) < 0.67
    keep[:2] = False
    keep[1, -1] = True
    return keep


COMBINATIONS = [
    (way, metric, relaxation, penalty)
    for way in ("all pairs", "grid")
    for metric in DISSIMILARITIES
    for relaxation in RELAXATIONS
    for penalty in PENALTIES
    # The formulas are compared by themselves too (formulas_interpreted.py): one of two things varies.
    if metric == "euclidean" or (relaxation, penalty) == ("logistic", "huber")
]


@pytest.mark.parametrize(("way", "metric", "relaxation", "penalty"), COMBINATIONS, indirect=["way"])
def test_combinations(way: str, metric: str, relaxation: str, penalty: str, rng: Generator) -> None:
    options: dict[str, Any] = {"relaxation": relaxation, "penalty": penalty, "temperature": 0.3}
    options |= {"dissimilarity": metric, "teacher_dissimilarity": "euclidean"}
    refs = batch(rng, 9)
    keep = mask(rng, 4, 9)
    check_features(BACKEND, *batch(rng, 4), rng, refs=refs, pair_mask=keep, **options)
    check_features(BACKEND, *batch(rng, 6), rng, **options)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("masked", [False, True])
def test_options(way: str, masked: bool, scale: str | None, rng: Generator) -> None:
    d_s, d_t = torch.rand(2, 6, 6, generator=rng)
    check_matrices(
        BACKEND,
        d_s,
        d_t,
        rng,
        reduction="mean" if masked else "none",
        scale=scale,
        exclude_self=True,
        pair_mask=mask(rng, 6, 6) if masked else None,
        weights=torch.rand(6, generator=rng) if masked else None,
        chunk_bytes=150,
    )


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0), (1, 1), (3, 1), (1, 2), (3, 2)])
def test_shapes(way: str, shape: tuple[int, int], rng: Generator) -> None:
    d_s, d_t = torch.rand(2, *shape, generator=rng)
    check_matrices(BACKEND, d_s, d_t, rng)
    if shape[0] == shape[1]:
        check_matrices(BACKEND, d_s, d_t, rng, exclude_self=True)


def test_relaxations_without_kernels(rng: Generator) -> None:
    """Ranks in plain PyTorch, by the chain of stages; the dissimilarities are the kernels'."""
    x, options = make_rows("normal", rng, 2, 9), {"relaxation": "laplace", "temperature": 0.3}
    check_soft_rank(BACKEND, x, rng, **options)
    check_features(BACKEND, *batch(rng, 6), rng, **options)
    features = batch(rng, 6)
    loss, wanted = (
        pc_kernels.perception_coherence_loss(*features, relaxation="projection", backend=backend)
        for backend in (BACKEND, "torch")
    )
    assert (loss - wanted).abs() <= tolerances.LOSS * wanted


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 31, 33, 64, 300])
def test_lengths(way: str, m: int, relaxation: str, rng: Generator) -> None:
    rows = torch.cat([make_rows(name, rng, 1, m) for name in ("normal", "integers")])
    scale, temperature = ("std", 0.1) if relaxation == "logistic" else (None, 0.5)
    options: dict[str, Any] = {"relaxation": relaxation, "scale": scale}
    check_soft_rank(BACKEND, rows, rng, temperature=temperature, **options)


@pytest.mark.parametrize(
    ("scale", "temperature"),
    [("std", 1e-4), ("std", 100.0), (None, 1.0)],
)
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_make_trouble(
    way: str, name: str, scale: str | None, temperature: float, rng: Generator
) -> None:
    relaxation = RELAXATIONS[int(temperature < 0.1)]
    options: dict[str, Any] = {"relaxation": relaxation, "scale": scale}
    check_soft_rank(BACKEND, make_rows(name, rng, 1, 50), rng, temperature=temperature, **options)


@pytest.mark.parametrize("temperature", [1e-2, 0.1])
@pytest.mark.parametrize("name", ROWS)
def test_losses_of_rows_that_make_trouble(
    way: str, name: str, temperature: float, rng: Generator
) -> None:
    d_s, d_t = make_rows(name, rng, 1, 50), make_rows(name, rng, 1, 50)
    check_matrices(BACKEND, d_s, d_t, rng, temperature=temperature)


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-10, 1e10, 1e300])
def test_extreme_temperatures(way: str, temperature: float, rng: Generator) -> None:
    """Below every gap ranks are hard; above every gap they are ½, and nothing pushes."""
    x = own_leaf(make_rows("integers", rng, 2, 40))
    for scale in SCALES:
        rank = pc_kernels.soft_rank(x, temperature, scale=scale, backend=BACKEND)
        wanted = reference.hard_rank(x.detach().double()) if temperature < 1 else 0.5 + 0 * x
        assert_near("rank", rank, wanted.detach().double(), tolerances.RANK)
        (grad,) = torch.autograd.grad(rank.square().sum(), x)
        assert grad.isfinite().all()
        assert temperature < 1 or grad.abs().max() <= 1 / temperature


def test_subnormal_values(way: str, rng: Generator) -> None:
    x = torch.randint(-50, 50, (2, 33), generator=rng) * torch.tensor(2.0**-149)
    check_soft_rank(BACKEND, x, rng, temperature=0.1, with_grad=False)
    check_soft_rank(BACKEND, x, rng, temperature=1e-43, scale=None, with_grad=False)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_upstream_gradients_of_any_size(way: str, size: float, rng: Generator) -> None:
    x, upstream = torch.randn(2, 2, 40, generator=rng)
    grads = []
    for factor in (1.0, size):
        leaf = own_leaf(x)
        pc_kernels.soft_rank(leaf, 0.3, backend=BACKEND).backward(upstream * factor)
        assert leaf.grad is not None
        grads.append(leaf.grad.double() / factor)
    error = (grads[1] - grads[0]).norm() / grads[0].norm()
    assert error <= (1e-5 if size > 1e-37 else 1e-2)


@pytest.mark.parametrize("m", [1, 2, 3, 33, 64, 600])
def test_hard_rank(way: str, m: int, rng: Generator) -> None:
    """Exact but for the last division, ties and all."""
    names = ROWS if m < 100 else ("normal", "three values", "far from zero")
    x = torch.cat([make_rows(name, rng, 1, m) for name in names])
    rank = pc_kernels.hard_rank(x, backend=BACKEND)
    assert_near("rank", rank, reference.hard_rank(x.double()), 2 * tolerances.U)
    if m > 1:
        ends = pc_kernels.hard_rank(torch.randperm(m, generator=rng).float(), backend=BACKEND)
        assert ends.min() == 0 and ends.max() == 1


def check_ranks_under_a_mask(x: Tensor, keep: Tensor, recipe: Recipe, rng: Generator) -> None:
    """Against the reference; what is absent is NaN or infinite, and written to nevertheless."""
    engine = BACKENDS[BACKEND]
    absent = torch.tensor([math.nan, math.inf, -math.inf])
    absent = absent[torch.randint(3, x.shape, generator=rng)]
    upstream = torch.randn(x.shape, generator=rng)
    poisoned, poisoned_upstream = (torch.where(keep, values, absent) for values in (x, upstream))
    hard = engine.hard_rank(poisoned, keep)
    rank, density = engine.soft_rank(poisoned, recipe, True, keep)
    density = torch.where(keep, density, absent)
    grad = engine.soft_rank_backward(poisoned_upstream, poisoned, density, recipe, keep)
    assert torch.equal(rank, engine.soft_rank(poisoned, recipe, False, keep)[0])
    assert_near("hard rank", hard, reference.hard_rank(x.double(), keep=keep), 2 * tolerances.U)
    leaf = own_leaf(x.double())
    how = (recipe.temperature, recipe.relaxation, recipe.scale)
    wanted = reference.soft_rank(leaf, *how, keep=keep)
    wanted.backward(torch.where(keep, upstream, 0).double())
    assert_near("rank", rank, wanted.detach(), tolerances.RANK)
    assert leaf.grad is not None
    allowed = tolerances.GRAD * leaf.grad.norm(dim=1)
    for i, (row, kept) in enumerate(zip(x.double(), keep, strict=True)):
        if kept.sum() > 1:
            terms = truth.sum_of_pairs(row[None, kept], upstream[i][None, kept].abs(), *how)
            allowed[i] += tolerances.rounding(x.dtype) * terms.norm() / (kept.sum() - 1)
    assert_norm_near("gradient", grad, leaf.grad, allowed)
    for result in (hard, rank, grad):
        assert (result[~keep] == 0).all()


@pytest.mark.parametrize(("relaxation", "scale"), [("logistic", "std"), ("normal", None)])
def test_ranks_under_a_mask(way: str, relaxation: str, scale: str | None, rng: Generator) -> None:
    """Rows of which none, one, two, many and all values are kept."""
    names = (
        "normal",
        "normal",
        "integers",
        "far from zero",
        "outlier of 1e3",
        "all equal",
        "normal",
    )
    x = torch.cat([make_rows(name, rng, 1, 40) for name in names])
    keep = mask(rng, len(x), 40)
    keep[2] = False
    keep[2, :2] = True
    keep[-1] = True
    check_ranks_under_a_mask(
        x, keep, Recipe(relaxation=relaxation, temperature=0.3, scale=scale), rng
    )


def test_a_mask_that_keeps_all(way: str, rng: Generator) -> None:
    """The same bits as without; and a mask need not be contiguous."""
    x, upstream = torch.randn(2, 3, 40, generator=rng)
    engine, recipe = BACKENDS[BACKEND], Recipe(temperature=0.3)
    results = []
    for keep in (None, torch.ones(40, 3, dtype=torch.bool).T):
        rank, density = engine.soft_rank(x, recipe, True, keep)
        grad = engine.soft_rank_backward(upstream, x, density, recipe, keep)
        results.append((engine.hard_rank(x, keep), rank, density, grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_undefined_rows_under_a_mask(way: str, bad: float, rng: Generator) -> None:
    """NaN at what is kept, 0 at what is absent; the other rows are not affected."""
    x, keep = torch.randn(4, 20, generator=rng), mask(rng, 4, 20)
    keep[2, 3], x[2, 3] = True, bad
    keep[3, 4], upstream = True, torch.ones(4, 20)
    engine, recipe = BACKENDS[BACKEND], Recipe(temperature=0.3)
    undefined = keep & (torch.arange(4) == 2)[:, None]
    rank, density = engine.soft_rank(x, recipe, True, keep)
    results = [rank, density, engine.soft_rank_backward(upstream, x, density, recipe, keep)]
    results += [engine.hard_rank(x, keep)] if math.isnan(bad) else []
    for result in results:
        assert torch.equal(result.isnan(), undefined) and (result[~keep] == 0).all()
    upstream[3, 4] = bad
    finite = engine.soft_rank_backward(upstream[3:], x[3:], density[3:], recipe, keep[3:])
    assert torch.equal(finite.isnan(), keep[3:])


def test_hard_rank_of_infinities(way: str) -> None:
    inf = math.inf
    x = torch.tensor([[1, inf, 2, -inf, inf], [inf, 1, 1, 1, -inf], [inf, inf, -inf, -inf, inf]])
    rank = pc_kernels.hard_rank(x, backend=BACKEND)
    assert_near("rank", rank, reference.hard_rank(x.double()), tolerances.U)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_only_rows_with_a_nan_or_infinity_are_nan(way: str, bad: float, rng: Generator) -> None:
    for m in (2, 11):
        x = torch.randn(3, m, generator=rng)
        x[1, m // 2] = bad
        touched = torch.arange(3) == 1
        leaf = own_leaf(x)
        rank = pc_kernels.soft_rank(leaf, backend=BACKEND)
        rank.backward(torch.ones_like(x))
        assert leaf.grad is not None
        hard = pc_kernels.hard_rank(x, backend=BACKEND)
        assert hard[touched].isnan().all() == math.isnan(bad)
        good = torch.randn(3, m, generator=rng)
        results = [rank, leaf.grad]
        for d_s, d_t in ((x, good), (good, x)):
            leaf = own_leaf(d_s)
            losses = pc_kernels.coherence_loss_from_dissimilarities(
                leaf, d_t, reduction="none", backend=BACKEND
            )
            losses.sum().backward()
            assert leaf.grad is not None
            results += [losses, leaf.grad]
        for result in results:
            assert result[touched].isnan().all() and result[~touched].isfinite().all()


def test_masked_nan_is_absent(way: str, rng: Generator) -> None:
    """Whatever stands where a pair is masked out: it does not show."""
    d_s, d_t = torch.rand(2, 5, 20, generator=rng)
    keep = mask(rng, 5, 20)
    results = []
    for filler in (0.0, math.nan, math.inf):
        leaf = own_leaf(torch.where(keep, d_s, filler))
        losses = pc_kernels.coherence_loss_from_dissimilarities(
            leaf,
            torch.where(keep, d_t, filler),
            pair_mask=keep,
            reduction="none",
            backend=BACKEND,
        )
        losses.sum().backward()
        assert leaf.grad is not None
        results.append((losses.detach(), leaf.grad))
    for losses, grad in results:
        assert torch.equal(losses, results[0][0]) and torch.equal(grad, results[0][1])
        assert (grad[~keep] == 0).all() and (losses[:2] == 0).all()


def test_features_of_nan_stay_with_the_pairs_that_count(way: str, rng: Generator) -> None:
    """Anchors without the reference are not affected; those with it have a loss of NaN."""
    (student, teacher), refs = batch(rng, 4), batch(rng, 9)
    keep = mask(rng, 4, 9)
    keep[:, 5] = torch.arange(4) == 2
    for which in (0, 1):
        spoilt = list(refs)
        spoilt[which] = refs[which].clone()
        spoilt[which][5, 0] = math.nan
        losses = pc_kernels.perception_coherence_loss(
            student, teacher, *spoilt, pair_mask=keep, reduction="none", backend=BACKEND
        )
        assert torch.equal(losses.isnan(), torch.arange(4) == 2)


def test_nan_stays_with_the_pairs_that_count(way: str, rng: Generator) -> None:
    d_s, d_t = torch.rand(2, 5, 20, generator=rng)
    keep = mask(rng, 5, 20)
    keep[3, 7] = True
    for bad_s, bad_t in ((math.nan, 0.0), (0.0, math.nan)):
        leaf, target = own_leaf(d_s), d_t.clone()
        with torch.no_grad():
            leaf[3, 7] += bad_s
            target[3, 7] += bad_t
        losses = pc_kernels.coherence_loss_from_dissimilarities(
            leaf, target, pair_mask=keep, reduction="none", backend=BACKEND
        )
        losses.sum().backward()
        assert leaf.grad is not None
        assert torch.equal(losses.isnan(), torch.arange(5) == 3)
        wanted = keep & (torch.arange(5) == 3)[:, None]
        assert torch.equal(leaf.grad.isnan(), wanted) and not leaf.grad[~keep].nan_to_num(1).any()


@pytest.mark.parametrize("name", HOSTILE_FEATURES)
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize(("straight", "width"), [(False, 11), (True, 1), (True, 64)])
def test_dissimilarity(width: int, straight: bool, metric: str, name: str, rng: Generator) -> None:
    """As the PyTorch kernels have it in float64, near duplicates and far anchors too."""
    engine = BACKENDS[BACKEND]
    x = HOSTILE_FEATURES[name](rng, 67 if straight else 24, width)
    for anchors, references in ((x[:35], x), (x[:24], None)):
        maker = engine if straight else PLAIN
        side = make_side(metric, Points(anchors, references), with_grad=False, maker=maker)
        rows = side.rows(0, len(anchors))
        assert rows.ready == straight and rows.gram is not None
        gram = type(rows.gram)(*(x.double() if x.is_floating_point() else x for x in rows.gram))
        wide = Rows(gram.anchors @ gram.references.T, metric, gram)
        wanted = BACKENDS["torch"].dissimilarity(wide)
        offsets = rows.gram.offsets
        far = (offsets > 0)[:, None]
        common = rows.gram.anchor_sq[:, None] if metric == "sqeuclidean" else offsets[:, None]
        got = rows.values if straight else engine.dissimilarity(rows)
        # A product rounds once a feature, and the square is no less than 1/64 of what it comes from;
        # or it is a far anchor's, less what is common.
        rounding = (width + 4) * tolerances.U
        allowed = 64 * rounding * wanted.abs() + torch.where(far, rounding * common, 0)
        assert_near("δ", got, wanted, allowed)


def test_wide_features_go_through_a_product(rng: Generator) -> None:
    x = torch.randn(3, launch.NARROW + 1, generator=rng)
    side = make_side("euclidean", Points(x, None), with_grad=False, maker=BACKENDS[BACKEND])
    assert not side.rows(0, 3).ready


@pytest.mark.parametrize("name", HOSTILE_FEATURES)
def test_hostile_features(way: str, name: str, rng: Generator) -> None:
    """The gradient is no worse than PyTorch's on the same chain, by the grid or directly.

    Where the true gradient is 0, all three are nothing but rounding, and the smallest says little.
    """
    student, teacher = HOSTILE_FEATURES[name](rng, 10, 11), quantised(rng, 10, 4)
    wide = student.double().requires_grad_()
    reference.perception_coherence_loss(wide, teacher.double()).backward()
    errors = []
    for backend in (BACKEND, "torch", "reference"):
        leaf = own_leaf(student)
        pc_kernels.perception_coherence_loss(leaf, teacher, backend=backend).backward()
        assert leaf.grad is not None and wide.grad is not None
        errors.append(((leaf.grad - wide.grad).norm() / wide.grad.norm()).item())
    assert errors[0] <= max(2 * errors[1], 2 * errors[2], tolerances.GRAD)


@pytest.mark.parametrize("width", [16, launch.NARROW + 1])
def test_far_anchors_keep_their_neighbours(width: int, rng: Generator) -> None:
    """Rows of far anchors are kept less their offset, which would cost a near reference its digits."""
    student, teacher = two_clumps(rng, 33, width, 16), quantised(rng, 33, 8)
    leaf, wide = own_leaf(student), own_leaf(student.double())
    pc_kernels.perception_coherence_loss(leaf, teacher, backend=BACKEND).backward()
    reference.perception_coherence_loss(wide, teacher.double()).backward()
    assert leaf.grad is not None and wide.grad is not None
    assert (leaf.grad - wide.grad).norm() <= tolerances.GRAD * wide.grad.norm()


def test_duplicates_and_constant_rows(way: str, rng: Generator) -> None:
    student, teacher = batch(rng, 9)
    student = student[torch.randint(0, 4, (9,), generator=rng)]
    check_features(BACKEND, student, teacher, rng, temperature=0.3)
    leaf = own_leaf(student[:1].expand(9, 5))
    loss = pc_kernels.perception_coherence_loss(leaf, teacher, backend=BACKEND)
    assert loss.isfinite() and loss > 0  # ½ everywhere, and the teacher ranks
    (grad,) = torch.autograd.grad(loss, leaf)
    assert (grad == 0).all()


def test_long_rows(rng: Generator) -> None:
    """As long as a GPU has them go through grid and buckets, in several blocks."""
    student, teacher = torch.randn(2, 4, generator=rng), quantised(rng, 2, 3)
    refs = torch.randn(1100, 4, generator=rng), quantised(rng, 1100, 3)
    keep = torch.rand(2, 1100, generator=rng) < 0.9
    check_features(BACKEND, student, teacher, rng, refs=refs, pair_mask=keep)
    rows = torch.cat([make_rows(name, rng, 1, 2000) for name in ("outlier of 1e3", "normal")])
    check_soft_rank(BACKEND, rows, rng, temperature=0.1)
    check_soft_rank(BACKEND, rows, rng, temperature=0.3, relaxation="normal")


@pytest.mark.parametrize("name", LONG_ROWS)
def test_work_of_a_long_row(name: str, rng: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hard ranks of many values in one bucket: right, and by as many steps as are said to be needed."""
    monkeypatch.setattr(settings, "LONGEST_ROWS", (settings.Setting(LENGTH // 8, 4, 4),))
    splits, fullest = 0, -1
    split, rank = hard_rank.split_crowds, hard_rank.rank_in_buckets

    def split_and_count(*arguments: Any) -> None:
        nonlocal splits
        splits += 1
        split(*arguments)

    def rank_and_look(*arguments: Any) -> None:
        nonlocal fullest
        fullest = int(arguments[4].handle.data.item())
        rank(*arguments)

    monkeypatch.setattr(hard_rank, "split_crowds", split_and_count)
    monkeypatch.setattr(hard_rank, "rank_in_buckets", rank_and_look)
    row = LONG_ROWS[name]
    x = row.make(rng, LENGTH)[None]
    assert_near("rank", pc_kernels.hard_rank(x, backend=BACKEND), sorted_ranks(x), tolerances.U)
    if name == "everyday":
        assert splits == 0 and row.work.fullest <= fullest <= 16
    elif row.work.splits < 0:
        assert fullest == -1
    else:
        assert splits <= row.work.splits and 0 <= fullest <= row.work.fullest
    x = x.double()
    cells = (x.max() - x.min()) / x.std(correction=0).clamp(min=1e-9) * 40 + 2
    assert name == "everyday" or cells <= row.work.cells


def sorted_ranks(x: Tensor) -> Tensor:
    """Mid-ranks in float64 of a single long row, by sorting."""
    ordered = x[0].sort().values
    below = torch.searchsorted(ordered, x[0], right=False)
    at_most = torch.searchsorted(ordered, x[0], right=True)
    return ((below + at_most - 1).double() / (2 * (x.shape[1] - 1)))[None]


def test_crowds_are_split(rng: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until none is left: values over all of float32's range, infinite, of both signs, and ties."""
    monkeypatch.setattr(launch, "ALL_COMPARED", 1)
    m = 500
    sign = 1 - 2.0 * torch.randint(2, (m,), generator=rng)
    some = torch.rand(m, generator=rng) < 0.3
    wide = sign * 10 ** (76 * torch.rand(m, generator=rng) - 38)
    clumps = 2.0 ** torch.randint(-100, 100, (m,), generator=rng)
    x = torch.stack(
        [
            wide,
            torch.where(some, math.inf, wide),
            torch.where(some, -0.0, 0.0 * wide),
            torch.where(some, sign * math.inf, torch.randint(3, (m,), generator=rng)),
            1e-45 * torch.randint(60, (m,), generator=rng),
            clumps * (1 + 1e-6 * torch.randn(m, generator=rng)),
            (torch.randint(2, (m, 14), generator=rng) / 10 ** torch.arange(14.0)).sum(1),
            torch.where(torch.arange(m) < 17, 1e30, torch.randn(m, generator=rng)),
        ]
    )
    keep = torch.rand(x.shape, generator=rng) < 0.8
    rank = BACKENDS[BACKEND].hard_rank(x, keep)
    assert_near("rank", rank, reference.hard_rank(x.double(), keep=keep), 2 * tolerances.U)


def test_a_row_does_not_depend_on_the_rows_beside_it(way: str, rng: Generator) -> None:
    """Nor on what a row before it left in scratch memory; and again, it gives the same bits."""
    names = ("normal", "integers", "outlier of -1e9", "all equal", "three values")
    x = torch.cat([make_rows(name, rng, 1, 70) for name in names])
    recipe = Recipe(temperature=0.3)
    engine = BACKENDS[BACKEND]

    def results(rows: Tensor) -> list[Tensor]:
        rank, density = engine.soft_rank(rows, recipe, True)
        grad = engine.soft_rank_backward(rows.flip(1), rows, density, recipe)
        return [rank, density, grad, engine.hard_rank(rows)]

    together = results(x)
    for i in range(len(x)):
        for part, alone in zip(together, results(x[i : i + 1]), strict=True):
            assert torch.equal(part[i : i + 1], alone)


def test_without_gradient(way: str, rng: Generator) -> None:
    """The same losses, to the bit."""
    student, teacher = batch(rng, 9)
    leaf = own_leaf(student)
    one, other = (
        pc_kernels.perception_coherence_loss(x, teacher, reduction="none", backend=BACKEND)
        for x in (student, leaf)
    )
    assert torch.equal(one, other.detach())


def test_several_students_share_a_teachers_ranks(way: str, rng: Generator) -> None:
    """The same losses and gradients as with ranks of their own; the ranks stay as they are."""
    d_t, *students = torch.rand(3, 6, 9, generator=rng)
    keep = mask(rng, 6, 9)
    engine, recipe, weights = BACKENDS[BACKEND], Recipe(temperature=0.3), torch.ones(6)
    pairs = Pairs(2, keep)
    ranks = engine.hard_rank_rows(Rows(d_t.clone()), pairs)
    for d_s in students:
        results = []
        for teacher in (ranks, Rows(d_t.clone())):
            rows = Rows(d_s.clone())
            losses = engine.coherence_rows(Chunk(rows, teacher, weights, pairs), recipe, True)
            results.append((losses, rows.values))
        for shared, own in zip(*results, strict=True):
            assert torch.equal(shared, own)
