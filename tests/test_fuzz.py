"""Every public function on inputs that hypothesis draws, against the definitions in float64.

A few examples of each in every run; FUZZ_EXAMPLES says how many, and `make fuzz` a thousand. An input
that fails is kept as an `@example`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import ranking_truth
import test_nearly_hard
import test_projection
import test_ranking_losses
import tolerances
import torch
from compare import (
    DISSIMILARITIES,
    PENALTIES,
    REDUCTIONS,
    SCALES,
    assert_near,
    check_features,
    check_matrices,
    check_smooth_cdf,
    check_soft_rank,
    own_leaf,
    usable,
)
from contrast_cases import KINDS, Case
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inputs import BEYOND_PLAIN_FLOAT32, HOSTILE_FEATURES, ROWS, make_rows, quantised
from test_smooth_cdf import CASES
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import formulas, reference

fuzzed = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "6")))

BACKENDS = [p.values[0] for p in usable() if not p.marks and p.values[0] != "reference"]
EVERYDAY = [name for name in ROWS if name not in BEYOND_PLAIN_FLOAT32]
IN_HALF = ["normal", "uniform", "integers", "three values", "all equal", "signed zeros"]

Layout = Callable[[Tensor], Tensor]


def every_other(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def inside(x: Tensor) -> Tensor:
    """Part of a larger tensor, at an address of no vector's size."""
    large = torch.full((x.shape[0] + 1, x.shape[1] + 3), torch.nan, dtype=x.dtype)
    large[1:, 1 : 1 + x.shape[1]] = x
    return large[1:, 1 : 1 + x.shape[1]]


LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every other": every_other,
    "inside": inside,
    "one row, expanded": lambda x: x[:1].expand(x.shape),
}

seeds = st.integers(0, 2**31 - 1)
layouts = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.__getitem__)
temperatures = st.floats(-4, 2).map(lambda power: 1.0123 * 10**power)
"""Of no round ratio to round values: a projection has a kink where these are τ/(m − 1) apart."""
relaxations = st.sampled_from(list(formulas.RELAXATIONS))
everything = st.sampled_from([*formulas.RELAXATIONS, *formulas.PROJECTIONS])
lengths = st.integers(1, 150)


class Rows(NamedTuple):
    """Rows of one kind, in a dtype and layout."""

    x: Tensor
    kind: str
    rng: Generator


@st.composite
def rows_of(draw: Any, columns: Any = lengths) -> Rows:
    """Any of the rows of inputs.py and test_nearly_hard.py that the dtype can hold."""
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    names = [*ROWS, *test_nearly_hard.ROWS] if dtype == torch.float32 else IN_HALF
    kind, m = draw(st.sampled_from(names)), draw(columns)
    rng = Generator().manual_seed(draw(seeds))
    if kind in ROWS:
        x = make_rows(kind, rng, draw(st.integers(1, 4)), m)
    else:  # these have clumps, of no fewer
        x = test_nearly_hard.make(kind, rng, 2, max(m, 40))
    return Rows(draw(layouts)(x.to(dtype)), kind, rng)


backends = st.sampled_from(BACKENDS)
scales = st.sampled_from(SCALES)


@fuzzed
@given(rows_of(), backends, everything, temperatures, scales)
def test_soft_rank(
    rows: Rows, backend: str, relaxation: str, temperature: float, scale: str | None
) -> None:
    if rows.x.dtype == torch.float16 and temperature < 0.01:
        return  # gradients leave its range
    if relaxation in formulas.PROJECTIONS:
        test_projection.check(backend, rows.x, rows.rng, temperature, relaxation, scale)
        return
    options = {"temperature": temperature, "relaxation": relaxation, "scale": scale}
    check_soft_rank(backend, rows.x, rows.rng, **options)


@fuzzed
@given(st.sampled_from(EVERYDAY), lengths, seeds, layouts, everything, temperatures, scales)
def test_soft_rank_in_float64(
    kind: str,
    m: int,
    seed: int,
    layout: Layout,
    relaxation: str,
    temperature: float,
    scale: str | None,
) -> None:
    rng = Generator().manual_seed(seed)
    x = layout(make_rows(kind, rng, 2, m).double())
    if relaxation in formulas.PROJECTIONS:
        test_projection.check("torch", x, rng, temperature, relaxation, scale)
        return
    check_soft_rank("torch", x, rng, temperature=temperature, relaxation=relaxation, scale=scale)


@fuzzed
@given(rows_of(), backends)
def test_hard_rank(rows: Rows, backend: str) -> None:
    rank = pc_kernels.hard_rank(rows.x, backend=backend)
    wanted = reference.hard_rank(rows.x.double())
    assert_near("rank", rank, wanted, tolerances.rank_tolerance(rows.x.dtype))
    along = pc_kernels.hard_rank(rows.x.t(), dim=0, backend=backend).t()
    assert torch.equal(along, rank)


@fuzzed
@given(rows_of(st.integers(2, 150)), backends, relaxations, temperatures, st.sampled_from(CASES))
def test_smooth_cdf(
    rows: Rows, backend: str, relaxation: str, temperature: float, case: dict[str, Any]
) -> None:
    if case["integral"] and rows.kind in BEYOND_PLAIN_FLOAT32:
        return
    x = rows.x.float()
    cut = int(torch.randint(1, x.shape[1], (1,), generator=rows.rng))
    w = torch.randn(x[:, :cut].shape, generator=rows.rng)
    inputs = x[:, :cut], x[:, cut:], w
    options = {"temperature": temperature, "relaxation": relaxation, **case}
    check_smooth_cdf(backend, inputs, rows.rng, **options)


@fuzzed
@given(
    rows_of(st.integers(2, 60)),
    backends,
    relaxations,
    temperatures,
    scales,
    st.sampled_from(PENALTIES),
    st.booleans(),
)
def test_loss_of_matrices(
    rows: Rows,
    backend: str,
    relaxation: str,
    temperature: float,
    scale: str | None,
    penalty: str,
    masked: bool,
) -> None:
    teacher = make_rows("integers", rows.rng, *rows.x.shape)
    mask = torch.rand(rows.x.shape, generator=rows.rng) < 0.7 if masked else None
    check_matrices(
        backend,
        rows.x.float(),
        teacher,
        rows.rng,
        relaxation=relaxation,
        temperature=temperature,
        scale=scale,
        penalty=penalty,
        pair_mask=mask,
    )


@fuzzed
@given(
    st.integers(2, 40),
    st.integers(1, 40),
    seeds,
    layouts,
    backends,
    st.sampled_from(DISSIMILARITIES),
    relaxations,
    st.sampled_from(REDUCTIONS),
    st.floats(-3, 1).map(lambda power: 10**power),
)
def test_loss_of_features(
    rows: int,
    width: int,
    seed: int,
    layout: Layout,
    backend: str,
    metric: str,
    relaxation: str,
    reduction: str,
    temperature: float,
) -> None:
    rng = Generator().manual_seed(seed)
    student = torch.randn(rows, width, generator=rng)
    if layout is not LAYOUTS["one row, expanded"]:
        student = layout(student)
    teacher = layout(quantised(rng, rows, 6))
    options = {"relaxation": relaxation, "temperature": temperature, "reduction": reduction}
    options |= {"dissimilarity": metric, "teacher_dissimilarity": "euclidean"}
    check_features(backend, student, teacher, rng, strict_batch=False, **options)


@fuzzed
@given(st.sampled_from(list(HOSTILE_FEATURES)), st.integers(4, 40), seeds, layouts)
def test_dissimilarities_and_coherence(kind: str, rows: int, seed: int, layout: Layout) -> None:
    rng = Generator().manual_seed(seed)
    x, y = layout(HOSTILE_FEATURES[kind](rng, rows, 12)), quantised(rng, rows, 5)
    for metric in ("euclidean", "sqeuclidean", "cityblock"):
        d = pc_kernels.pairwise_dissimilarity(x, metric=metric)
        wanted = reference.pairwise_dissimilarity(x.double(), metric=metric)
        assert_near("δ", d, wanted, 2 * 64 * tolerances.U * wanted)
    coherence = pc_kernels.coherence(y[:, :3], y, dissimilarity="cityblock")
    wanted_pair = reference.coherence(y[:, :3].double(), y.double(), dissimilarity="cityblock")
    for got, wanted in zip(coherence, wanted_pair, strict=True):
        assert_near("coherence", got, wanted, tolerances.LOSS)


@fuzzed
@example("distillation", 1, 1, 988, "torch")  # two distributions that are nearly equal
@given(st.sampled_from(list(KINDS)), st.integers(1, 30), st.integers(0, 9), seeds, backends)
def test_contrastive(kind: str, anchors: int, more: int, seed: int, backend: str) -> None:
    rng = Generator().manual_seed(seed)
    case = Case(rng, kind, (anchors, more, 8))
    case.check(backend, torch.rand(anchors, generator=rng) + 0.1, chunk_bytes=1 << 12)
    case.check(backend, pair_mask=case.mask(rng), temperature=0.5)


@fuzzed
@example("SpearmanLoss", 329, "logistic", 1.0, "mean")  # a list whose scores are all equal
@given(
    st.sampled_from(list(ranking_truth.LIST_LOSSES)),
    seeds,
    relaxations,
    st.floats(0.1, 10),
    st.sampled_from(REDUCTIONS),
)
def test_losses_of_lists(
    name: str, seed: int, relaxation: str, temperature: float, reduction: str
) -> None:
    rng = Generator().manual_seed(seed)
    scores, labels, mask = test_ranking_losses.lists_of(name, rng, torch.float64)
    truth, leaf = own_leaf(scores), own_leaf(scores)
    formula = ranking_truth.LIST_LOSSES[name]
    each = [
        formula(s[k], y[k].double(), temperature, relaxation)
        for s, y, k in zip(truth, labels, mask, strict=True)
    ]
    loss_fn = getattr(pc_kernels, name)(
        relaxation=relaxation, temperature=temperature, reduction=reduction
    )
    got, wanted = loss_fn(leaf, labels, mask), test_ranking_losses.reduced(each, reduction)
    test_ranking_losses.check(got, wanted, [leaf], [truth])


@fuzzed
@given(
    st.sampled_from(list(test_ranking_losses.RETRIEVAL)),
    st.integers(2, 14),
    seeds,
    relaxations,
    st.floats(0.1, 2),
    st.booleans(),
)
def test_retrieval(
    name: str, queries: int, seed: int, relaxation: str, tau: float, with_query: bool
) -> None:
    rng = Generator().manual_seed(seed)
    x = torch.randn(queries, 5, generator=rng).double()
    labels = torch.randint(0, 4, (queries,), generator=rng)
    truth, leaf = own_leaf(x), own_leaf(x)
    formula = test_ranking_losses.RETRIEVAL[name]
    options = (labels, None, None, with_query, relaxation, tau)
    wanted = test_ranking_losses.reduced(ranking_truth.retrieval(formula, truth, *options), "mean")
    loss_fn = test_ranking_losses.retrieval_loss(
        name, relaxation=relaxation, temperature=tau, with_query=with_query
    )
    test_ranking_losses.check(loss_fn(leaf, labels), wanted, [leaf], [truth])


@fuzzed
@given(st.sampled_from(EVERYDAY), lengths, seeds, layouts, temperatures, st.booleans(), backends)
def test_sorting(
    kind: str,
    m: int,
    seed: int,
    layout: Layout,
    temperature: float,
    descending: bool,
    backend: str,
) -> None:
    """A sort is a projection: of its definition's value; a mask adds up to k."""
    rng = Generator().manual_seed(seed)
    x = layout(make_rows(kind, rng, 2, m))
    got = pc_kernels.soft_sort(x, temperature, descending=descending, backend=backend)
    sign = 1 if descending else -1
    w = (sign * x.double()).sort(1, descending=True).values
    s = (torch.arange(m, 0, -1).double() / temperature).expand_as(w)
    largest = x.double().abs().amax(1, keepdim=True)
    allowed = 4 * tolerances.U * largest + 1e-12 * m * m / temperature
    assert_near("sorted", got, sign * (s - reference.isotonic(s, w)), allowed)
    k = int(torch.randint(0, m + 1, (1,), generator=rng))
    mask = pc_kernels.soft_topk(x, k, temperature, backend=backend).mask
    s, order = (x.double() / temperature).sort(1, descending=True)
    s = s - s[:, :1]
    chosen = (torch.arange(m) < k).double().expand_as(s)
    wanted = torch.zeros_like(s).scatter(1, order, s - reference.isotonic(s, chosen))
    assert_near("mask", mask, wanted, tolerances.RANK + 1e-14 * m * largest / temperature)


@fuzzed
@given(st.integers(2, 60), seeds)
def test_metrics(m: int, seed: int) -> None:
    """From their definitions over pairs, ties and all."""
    rng = Generator().manual_seed(seed)
    scores, labels = torch.randint(0, 12, (2, 1, m), generator=rng).double()
    labels[0, 0], labels[0, 1] = 0, 1
    first, second = (v.sign() for v in (scores.mT - scores, labels.mT - labels))
    ranks = [reference.hard_rank(v)[0] for v in (scores, labels)]
    wanted = torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num(0.0)
    assert_near("ρ", pc_kernels.metrics.spearman(scores, labels).nan_to_num(0.0), wanted, 1e-9)
    ties = (first.square().sum() * second.square().sum()).sqrt()
    wanted = ((first * second).sum() / ties).nan_to_num(0.0)
    assert_near("τ_b", pc_kernels.metrics.kendall_tau(scores, labels).nan_to_num(0.0), wanted, 1e-9)
    limit = 1 - pc_kernels.ApproxNDCGLoss(temperature=1e-4)(scores, labels)
    assert_near("NDCG", pc_kernels.metrics.ndcg(scores, labels), limit, 1e-9)
    positive = labels > 0
    limit = 1 - pc_kernels.AveragePrecisionLoss(temperature=1e-4)(scores[0], positive[0])
    precision = pc_kernels.metrics.average_precision(scores, positive)
    assert_near("AP", precision, limit, 1e-9)
    first_place = (m - (m - 1) * reference.hard_rank(scores))[positive].min()
    assert_near("MRR", pc_kernels.metrics.mrr(scores, labels), 1 / first_place, 1e-9)
    above = (scores[positive][:, None] - scores[~positive]).sign()
    area = pc_kernels.metrics.auc(scores[0], positive[0])
    assert_near("AUC", area, (above.mean() + 1) / 2, 1e-9)
