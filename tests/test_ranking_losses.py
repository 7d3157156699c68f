"""Losses of retrieval, lists, correlation and pools, against their sources' formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import ranking_truth
import tolerances
import torch
from compare import own_leaf
from inputs import make_rows
from test_errors import raises
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import metrics

NEAR = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Relative, of the loss and in norm of the gradient. float32 and float64: the rows of tolerances.py;
bfloat16: the results are rounded to 8 bits. Losses of float32 are at least 1e-2 here."""
LISTS = ranking_truth.LIST_LOSSES


def reduced(losses: list[Tensor | None], reduction: str) -> Tensor:
    """0 for what does not count, which the mean leaves out."""
    counted = [loss for loss in losses if loss is not None]
    if reduction == "none":
        return torch.stack([losses_0() if loss is None else loss for loss in losses])
    total = torch.stack(counted).sum() if counted else losses_0()
    return total / max(len(counted), 1) if reduction == "mean" else total


def losses_0() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def check(
    got: Tensor, wanted: Tensor, leaves: list[Tensor], truths: list[Tensor], floor: float = 1e-12
) -> None:
    """Values and gradients; the losses are weighted if there are several.

    `floor`: what a gradient's norm may be off by beside its share.
    """
    dtype = leaves[0].dtype
    near = NEAR[dtype]
    upstream = torch.linspace(0.5, 1.5, wanted.numel(), dtype=torch.float64).view(wanted.shape)
    assert got.shape == wanted.shape
    assert ((got.detach().double() - wanted).abs() <= near * wanted.abs() + near * 1e-2).all()
    got.backward(upstream.to(got.dtype))
    if wanted.requires_grad:
        wanted.backward(upstream)
    for leaf, truth in zip(leaves, truths, strict=True):
        assert leaf.grad.dtype == dtype and leaf.grad.shape == truth.shape
        expected = torch.zeros_like(truth) if truth.grad is None else truth.grad
        error = (leaf.grad.double() - expected).norm()
        assert error <= near * expected.norm() + floor, (error / expected.norm()).item()


def lists_of(name: str, rng: Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Padded lists of 0 to 12 items: one without, some with equal labels, tied scores too."""
    shape = (9, 12)
    scores = torch.randn(shape, generator=rng).mul(8).round().div(8)
    if name in ("SpearmanLoss", "KendallLoss"):
        labels = torch.randn(shape, generator=rng).mul(2).round()
    elif name in ("ApproxNDCGLoss", "RankNetLoss"):
        labels = torch.randint(0, 5, shape, generator=rng)
    else:
        labels = torch.rand(shape, generator=rng) < 0.4
    labels[1], labels[2] = 0, 1
    lengths = torch.tensor([12, 7, 12, 0, 1, 2, 3, 12, 9])
    return scores.to(dtype), labels, torch.arange(12) < lengths[:, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LISTS)
def test_lists(name: str, dtype: torch.dtype, rng: Generator) -> None:
    """Padded with a mask, and laid one after the other: the formula of each list."""
    scores, labels, mask = lists_of(name, rng, dtype)
    cases = [("logistic", 0.3, "none"), ("logistic", 1.0, "mean"), ("normal", 0.5, "sum")]
    for relaxation, temperature, reduction in cases:
        options = {"relaxation": relaxation, "temperature": temperature}
        truth = own_leaf(scores.double())
        each = [
            LISTS[name](s[k], y[k].double(), temperature, relaxation)
            for s, y, k in zip(truth, labels, mask, strict=True)
        ]
        wanted = reduced(each, reduction)
        loss_fn = getattr(pc_kernels, name)(reduction=reduction, **options)
        leaf = own_leaf(torch.where(mask, scores, math.nan))  # padding is never looked at
        check(loss_fn(leaf, labels, mask), wanted, [leaf], [truth])
        flat = scores[mask]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        got = loss_fn(flat, labels[mask], offsets=offsets)
        assert torch.equal(got, loss_fn(leaf, labels, mask))
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", LISTS)
def test_a_single_list_and_any_shape(name: str, rng: Generator) -> None:
    scores, labels, _ = lists_of(name, rng, torch.float64)
    loss_fn = getattr(pc_kernels, name)(reduction="none", temperature=0.4)
    wanted = LISTS[name](scores[0], labels[0].double(), 0.4, "logistic")
    assert loss_fn(scores[0], labels[0]).shape == ()
    assert abs(loss_fn(scores[0], labels[0]) - wanted) <= 1e-10
    shaped = loss_fn(scores.view(3, 3, 12), labels.view(3, 3, 12))
    assert shaped.shape == (3, 3) and torch.equal(shaped.view(-1), loss_fn(scores, labels))
    transposed = loss_fn(scores.T.contiguous().T, labels)
    assert torch.equal(transposed, loss_fn(scores, labels))


@pytest.mark.parametrize("name", LISTS)
def test_nothing_to_rank(name: str) -> None:
    """0, with a gradient of 0, and not in the mean."""
    for shape in ((0,), (0, 5), (3, 0), (2, 1)):
        scores = torch.zeros(shape, requires_grad=True)
        for reduction in ("mean", "sum"):
            loss = getattr(pc_kernels, name)(reduction=reduction)(scores, torch.zeros(shape))
            assert loss == 0 and loss.shape == ()
            loss.backward()
        assert scores.grad.abs().sum() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LISTS)
def test_nan_stays_in_its_list(name: str, bad: float, rng: Generator) -> None:
    scores, labels, _ = lists_of(name, rng, torch.float32)
    loss_fn = getattr(pc_kernels, name)(reduction="none")
    fine = loss_fn(scores, labels)
    scores[0, 3] = bad
    losses = loss_fn(scores, labels)
    assert losses[0].isnan() and torch.allclose(losses[1:], fine[1:], rtol=1e-5)
    if labels.is_floating_point():
        labels[7, 2] = bad
        assert loss_fn(scores, labels)[7].isnan()


HOSTILE = (
    "far from zero, a few steps apart",
    "outlier of -1e9",
    "two far tight clumps",
    "three values",
)


@pytest.mark.parametrize("temperature", [1e-4, 1.0])
@pytest.mark.parametrize("name", LISTS)
def test_hostile_scores(name: str, temperature: float, rng: Generator) -> None:
    """Against the formulas on the same float32 scores.

    Where scores are many τ apart gradients are nearly 0. The floor is that of tolerances.py, the rounding
    of an item's term with itself, φ(0)/τ = 1/4τ, at a slope ∂L/∂R of 1, which none exceeds.
    """
    floor = tolerances.ROUNDINGS * tolerances.U / (4 * temperature)
    for kind in HOSTILE:
        scores = make_rows(kind, rng, 1, 40)[0]
        labels = torch.randint(0, 2, scores.shape, generator=rng)
        leaf, truth = own_leaf(scores), own_leaf(scores.double())
        wanted = LISTS[name](truth, labels.double(), temperature, "logistic")
        got = getattr(pc_kernels, name)(temperature=temperature)(leaf, labels)
        check(got, wanted, [leaf], [truth], floor)


def test_labels_beyond_any_float(rng: Generator) -> None:
    """A gain of 2^1000 is all there is; the other items do not matter."""
    scores, labels = torch.randn(5, generator=rng), torch.tensor([0.0, 3.0, 1000.0, 2000.0, 1.0])
    loss = pc_kernels.ApproxNDCGLoss(temperature=0.5)(scores, labels)
    place = 0.5 + torch.sigmoid((scores - scores[3]) / 0.5).sum()
    assert abs(loss - (1 - 1 / torch.log2(1 + place))) <= 1e-6
    assert metrics.ndcg(scores, labels) == 1 / torch.log2(
        1 + 1 + (scores > scores[3]).sum().double()
    )


@pytest.mark.clean_memory
def test_under_autocast_and_compiled(rng: Generator) -> None:
    x, labels = torch.randn(12, 5, generator=rng), torch.arange(12) // 3
    scores = torch.randn(3, 9, generator=rng)
    for loss_fn, data in (
        (pc_kernels.SmoothAPLoss(), (x, labels)),
        (pc_kernels.RankNetLoss(), (scores, scores > 0)),
    ):
        wanted = loss_fn(*data)
        with torch.autocast("cpu", torch.bfloat16):
            assert loss_fn(*data) == wanted
        leaf = own_leaf(data[0])
        compiled = torch.compile(loss_fn, backend="aot_eager")
        compiled(leaf, *data[1:]).backward()
        again = own_leaf(data[0])
        loss_fn(again, *data[1:]).backward()
        assert torch.allclose(leaf.grad, again.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LISTS)
def test_cold_losses_are_the_metrics_of_the_order(name: str, rng: Generator) -> None:
    """At a temperature near 0, the perfect order costs nothing."""
    labels = torch.arange(30).div(6, rounding_mode="floor")[torch.randperm(30, generator=rng)]
    if name in ("ApproxMRRLoss", "AUCLoss", "AveragePrecisionLoss"):
        labels = labels == 4
    scores = labels + 0.5 * torch.rand(30, generator=rng)
    loss = getattr(pc_kernels, name)(temperature=1e-3)(scores, labels)
    best = {"ApproxMRRLoss": 1 - (1 / torch.arange(1, 7)).mean()}.get(name, 0.0)
    allowed = 0.03 if name == "SpearmanLoss" else 1e-4  # its targets are tied, its ranks are not
    assert abs(loss - best) <= allowed


CLASSES = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 2, 7])
"""Of sizes 3, 2, 2, 5 and 1."""
REFERENCE_CLASSES = torch.tensor([3, 0, 0, 9, 2, 3, 1, 1, 3, 0, 3])
"""None of class 7, some of class 9."""
RETRIEVAL = {"SmoothAPLoss": ranking_truth.smooth_ap, "RecallAtKLoss": ranking_truth.recall_at_k}


def retrieval_loss(name: str, **options: Any) -> pc_kernels.losses.RetrievalLoss:
    if name == "RecallAtKLoss":
        options["k"] = (1, 2, 4)
    return getattr(pc_kernels, name)(**options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_query", [True, False])
@pytest.mark.parametrize("with_refs", [False, True])
@pytest.mark.parametrize("name", RETRIEVAL)
def test_retrieval(
    name: str, with_refs: bool, with_query: bool, dtype: torch.dtype, rng: Generator
) -> None:
    """Classes of any size, in any order, chunk by chunk; references of their own."""
    x = torch.randn(len(CLASSES), 5, generator=rng).to(dtype)
    order = torch.randperm(len(CLASSES), generator=rng)
    labels = CLASSES[order]
    refs = torch.randn(len(REFERENCE_CLASSES), 5, generator=rng).to(dtype) if with_refs else None
    ref_labels = REFERENCE_CLASSES if with_refs else None
    cases = [
        ("logistic", 0.2, "mean", None),
        ("normal", 0.3, "sum", 1),
        ("logistic", 0.1, "none", 1),
    ]
    for relaxation, tau, reduction, chunk_bytes in cases:
        truths = [own_leaf(t.double()) for t in (x, refs) if t is not None]
        each = ranking_truth.retrieval(
            RETRIEVAL[name],
            truths[0],
            labels,
            truths[1] if with_refs else None,
            ref_labels,
            with_query,
            relaxation,
            tau,
        )
        leaves = [own_leaf(t) for t in (x, refs) if t is not None]
        loss_fn = retrieval_loss(
            name,
            relaxation=relaxation,
            temperature=tau,
            reduction=reduction,
            chunk_bytes=chunk_bytes,
            with_query=with_query,
        )
        got = loss_fn(leaves[0], labels, None, *(leaves[1:] or [None]), ref_labels)
        check(got, reduced(each, reduction), leaves, truths)


@pytest.mark.parametrize("name", [*LISTS, *RETRIEVAL])
def test_gradcheck(name: str, rng: Generator) -> None:
    if name in RETRIEVAL:
        points = [torch.randn(n, 3, generator=rng).double().requires_grad_() for n in (7, 5)]
        of_points = retrieval_loss(name, temperature=0.5, reduction="none")
        labels = (torch.arange(7) % 3, torch.arange(5) % 2)

        def loss(x: Tensor, refs: Tensor) -> Tensor:
            among_refs = of_points(x, labels[0], ref_emb=refs, ref_labels=labels[1])
            return torch.stack([of_points(x, labels[0]), among_refs])

        assert torch.autograd.gradcheck(loss, points)
        return
    scores, labels, mask = lists_of(name, rng, torch.float64)
    scores = torch.randn(scores.shape, generator=rng).double().requires_grad_()
    of_lists = getattr(pc_kernels, name)(temperature=0.5, reduction="none")
    assert torch.autograd.gradcheck(lambda x: of_lists(x, labels[4:], mask[4:]), scores[4:])


@pytest.mark.parametrize("name", RETRIEVAL)
def test_retrieval_without_positives(name: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    loss = retrieval_loss(name)(x, torch.arange(4))
    loss.backward()
    assert loss == 0 and x.grad.abs().sum() == 0
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = retrieval_loss(name)(empty, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert retrieval_loss(name, reduction="none")(x, torch.arange(4)).shape == (4,)


@pytest.mark.parametrize("name", RETRIEVAL)
def test_retrieval_nan(name: str, rng: Generator) -> None:
    x = torch.randn(6, 3, generator=rng)
    x[2, 1] = math.nan
    assert retrieval_loss(name)(x, torch.tensor([0, 0, 1, 1, 2, 2])).isnan()


def test_dot_products(rng: Generator) -> None:
    x = torch.randn(8, 4, generator=rng)
    labels = torch.arange(8) // 4
    unit = torch.nn.functional.normalize(x)
    cosine = pc_kernels.SmoothAPLoss()
    dot = pc_kernels.SmoothAPLoss(normalize=False)
    assert dot(unit, labels) == cosine(x, labels) != dot(x, labels)
    cosine.temperature = 0.5
    assert cosine.recipe.temperature == 0.5 and "temperature=0.5" in repr(cosine)


X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
S, L = torch.zeros(2, 5), torch.zeros(2, 5)
smooth_ap = pc_kernels.SmoothAPLoss()
ndcg = pc_kernels.ApproxNDCGLoss()

BAD: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "a miner": (lambda: smooth_ap(X, Y, (Y, Y, Y)), ValueError, ("indices_tuple", "None", "tuple")),
    "labels of floats": (
        lambda: smooth_ap(X, X[:, 0]),
        TypeError,
        ("labels", "integers", "float32"),
    ),
    "too few labels": (lambda: smooth_ap(X, Y[:3]), ValueError, ("labels", "(4,)", "(3,)")),
    "a vector": (lambda: smooth_ap(X[0], Y), ValueError, ("embeddings", "(3,)")),
    "no labels of references": (
        lambda: smooth_ap(X, Y, ref_emb=X),
        ValueError,
        ("ref_labels", "missing"),
    ),
    "another width": (
        lambda: smooth_ap(X, Y, None, X[:, :2], Y),
        ValueError,
        ("ref_emb", "width", "3", "2"),
    ),
    "k of 0": (lambda: pc_kernels.RecallAtKLoss(k=(1, 0)), ValueError, ("k must be > 0", "(1, 0)")),
    "no k": (lambda: pc_kernels.RecallAtKLoss(k=()), TypeError, ("k must be", "()")),
    "half a k": (lambda: pc_kernels.RecallAtKLoss(k=1.5), TypeError, ("k must be", "1.5")),
    "other temperatures": (
        lambda: pc_kernels.RecallAtKLoss(k=(1, 2), k_temperature=(1.0,)),
        ValueError,
        ("k_temperature", "2"),
    ),
    "a cold one": (
        lambda: pc_kernels.RecallAtKLoss(k=1, k_temperature=0.0),
        ValueError,
        ("k_temperature", "0"),
    ),
    "an option": (
        lambda: pc_kernels.SmoothAPLoss(penalty="squared"),
        TypeError,
        ("penalty", "temperature"),
    ),
    "a temperature": (lambda: pc_kernels.AUCLoss(temperature=0), ValueError, ("temperature", "0")),
    "a backend": (lambda: pc_kernels.AUCLoss(backend="gpu"), ValueError, ("backend", "gpu")),
    "a scalar": (lambda: ndcg(S[0, 0], L[0, 0]), ValueError, ("scores", "scalar")),
    "a list": (lambda: ndcg([1.0], L), TypeError, ("scores", "list")),
    "integers": (lambda: ndcg(S.long(), L), TypeError, ("scores", "int64")),
    "another shape": (lambda: ndcg(S, L[:, :4]), ValueError, ("labels", "(2, 5)", "(2, 4)")),
    "a mask of floats": (lambda: ndcg(S, L, L), TypeError, ("mask", "bool", "float32")),
    "a small mask": (lambda: ndcg(S, L, L[0] == 0), ValueError, ("mask", "(2, 5)", "(5,)")),
    "offsets of a matrix": (
        lambda: ndcg(S, L, offsets=torch.tensor([0, 5, 10])),
        ValueError,
        ("offsets", "(2, 5)"),
    ),
    "offsets of floats": (
        lambda: ndcg(S[0], L[0], offsets=torch.tensor([0.0, 5.0])),
        TypeError,
        ("offsets", "int64"),
    ),
    "short offsets": (
        lambda: ndcg(S[0], L[0], offsets=torch.tensor([0, 4])),
        ValueError,
        ("offsets", "5", "4"),
    ),
    "descending offsets": (
        lambda: ndcg(S[0], L[0], offsets=torch.tensor([0, 4, 3, 5])),
        ValueError,
        ("not ascending",),
    ),
    "predictions": (
        lambda: pc_kernels.SpearmanLoss()(S, L[:1]),
        ValueError,
        ("targets", "predictions"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str) -> None:
    call, error, words = BAD[name]
    raises(error, *words, call=call)
