"""Exact metrics against SciPy and scikit-learn; against their meaning where ties count otherwise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from ranks_together import flattened
from test_errors import raises
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import metrics

NEAR = 1e-12
"""All are float64, sums of up to some hundred terms."""


def each(function: Any, scores: Tensor, labels: Tensor) -> Tensor:
    """A function of two NumPy arrays, by rows."""
    rows = zip(scores.numpy(), labels.numpy(), strict=True)
    return torch.tensor([float(function(s, y)) for s, y in rows], dtype=torch.float64)


def places(scores: Tensor) -> Tensor:
    """Mid-ranks from the top."""
    return torch.from_numpy(scipy.stats.rankdata(-scores.double().numpy(), axis=-1))


def near(got: Tensor, wanted: Tensor) -> bool:
    return got.dtype == torch.float64 and torch.allclose(got, wanted, rtol=NEAR, atol=NEAR)


@pytest.fixture(params=["all different", "tied"])
def rows(request: pytest.FixtureRequest, rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, grades and binary labels [8, 40]."""
    scores = torch.randn(8, 40, generator=rng)
    if request.param == "tied":
        scores = scores.mul(3).round()
    grades = torch.randint(0, 5, scores.shape, generator=rng)
    return scores, grades, torch.rand(scores.shape, generator=rng) < 0.3


def test_as_scipy_and_scikit_learn(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    """Ties too, where these count them by mid-ranks."""
    scores, grades, binary = rows
    auc = each(lambda s, y: sklearn.metrics.roc_auc_score(y, s), scores, binary)
    assert near(metrics.auc(scores, binary, reduction="none"), auc)
    assert near(metrics.auc(scores, binary), auc.mean())
    rho = each(lambda s, y: scipy.stats.spearmanr(s, y).statistic, scores, grades)
    assert near(metrics.spearman(scores, grades, reduction="none"), rho)
    tau = each(lambda s, y: scipy.stats.kendalltau(s, y).statistic, scores, grades)
    assert near(metrics.kendall_tau(scores, grades, reduction="none"), tau)
    assert near(metrics.kendall_tau(scores.double(), grades, reduction="none"), tau)
    first = (1 / torch.where(binary, places(scores), math.inf)).amax(1)
    assert near(metrics.mrr(scores, binary, reduction="none"), first)
    inside = (binary & (places(scores) <= 7)).sum(1) / binary.sum(1).double()
    assert near(metrics.recall_at_k(scores, binary, k=7, reduction="none"), inside)
    gain = (2.0**grades - 1).double()
    ideal = torch.log2(1 + torch.arange(1, 41).double())
    best = (gain.sort(1, descending=True).values / ideal).sum(1)
    dcg = (gain / torch.log2(1 + places(scores))).sum(1)
    assert near(metrics.ndcg(scores, grades, reduction="none"), dcg / best)


def test_as_scikit_learn_without_ties(rng: Generator) -> None:
    scores = torch.randn(8, 40, generator=rng)
    grades = torch.randint(0, 5, scores.shape, generator=rng)
    binary = torch.rand(scores.shape, generator=rng) < 0.3
    ap = each(lambda s, y: sklearn.metrics.average_precision_score(y, s), scores, binary)
    assert near(metrics.average_precision(scores, binary, reduction="none"), ap)
    for k in (None, 1, 5, 100):
        ndcg = each(
            lambda s, y, k=k: sklearn.metrics.ndcg_score([2.0**y - 1], [s], k=k), scores, grades
        )
        assert near(metrics.ndcg(scores, grades, k=k, reduction="none"), ndcg)


METRICS = {
    "AUC": "AUCLoss",
    "AveragePrecision": "AveragePrecisionLoss",
    "Spearman": "SpearmanLoss",
    "NDCG": "ApproxNDCGLoss",
}


@pytest.mark.parametrize("name", METRICS)
def test_losses_tend_to_one_less_the_metric(name: str, rng: Generator) -> None:
    """At ties, too."""
    scores = torch.randint(0, 12, (5, 30), generator=rng).double()
    labels = torch.rand(5, 30, generator=rng) < 0.4
    loss = getattr(pc_kernels, METRICS[name])(temperature=1e-3, reduction="none")(scores, labels)
    assert near(getattr(metrics, name).measure(scores, labels, reduction="none"), 1 - loss)


def test_masks_offsets_and_what_does_not_count(rng: Generator) -> None:
    scores = torch.randn(6, 9, generator=rng)
    labels = torch.randint(0, 2, scores.shape, generator=rng)
    labels[1], labels[2] = 0, 1
    mask = torch.arange(9) < torch.tensor([9, 4, 4, 0, 1, 7])[:, None]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    for name in (
        "auc",
        "average_precision",
        "kendall_tau",
        "mrr",
        "ndcg",
        "recall_at_k",
        "spearman",
    ):
        measure = getattr(metrics, name)
        padded = measure(scores, labels, mask, reduction="none")
        flat = measure(scores[mask], labels[mask], offsets=offsets, reduction="none")
        assert torch.equal(padded.nan_to_num(7), flat.nan_to_num(7))
        each_alone = [
            measure(s[k], y[k], reduction="none")
            for s, y, k in zip(scores, labels, mask, strict=True)
        ]
        assert torch.allclose(padded, torch.stack(each_alone), equal_nan=True, rtol=NEAR)
        assert padded[1].isnan() and padded[3].isnan()
        assert near(measure(scores, labels, mask), padded.nanmean())
        scores_with_nan = scores.clone()
        scores_with_nan[0, 2] = math.nan
        assert measure(scores_with_nan, labels).isnan()
        assert not measure(scores_with_nan, labels, reduction="none")[5].isnan()
        assert measure(scores[:0], labels[:0]).isnan()


def retrieval_truth(
    s: Tensor, labels: Tensor, ref_labels: Tensor | None, k: tuple[int, ...]
) -> list[Tensor]:
    """MAP@R, MAP and recall@k, query by query."""
    found = []
    for q in range(len(s)):
        others = [j for j in range(s.shape[1]) if ref_labels is not None or j != q]
        theirs = (labels if ref_labels is None else ref_labels)[others]
        place = places(s[q, others])
        hit = theirs == labels[q]
        if hit.any():
            r = int(hit.sum())
            precision = places(s[q, others][hit]) / place[hit]
            at_r = precision[place[hit] <= r].sum() / r
            found.append([at_r, precision.mean(), *((place[hit] <= c).any() for c in k)])
    return [torch.tensor(column, dtype=torch.float64).mean() for column in zip(*found, strict=True)]


@pytest.mark.parametrize("with_refs", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_retrieval(tied: bool, with_refs: bool, rng: Generator) -> None:
    x, refs = torch.randn(30, 3, generator=rng), torch.randn(25, 3, generator=rng)
    if tied:
        x, refs = x.round(), refs.round()
    labels, ref_labels = (torch.randint(0, 9, (n,), generator=rng) for n in (30, 25))
    labels[3] = 77
    given = (refs, ref_labels) if with_refs else (None, None)
    wanted = retrieval_truth(x @ (refs if with_refs else x).T, labels, given[1], (1, 3))
    for chunk_bytes in (None, 1):
        got = metrics.retrieval(
            x, labels, *given, k=(1, 3), normalize=False, chunk_bytes=chunk_bytes
        )
        flat = [got.map_at_r, got.mean_average_precision, got.recall[1], got.recall[3]]
        assert all(near(a, b) for a, b in zip(flat, wanted, strict=True))
    x[5, 1] = math.nan
    assert metrics.retrieval(x, labels, *given).map_at_r.isnan()
    assert metrics.retrieval(x[:1], labels[:1]).map_at_r.isnan()


def test_retrieval_is_what_smooth_ap_tends_to(rng: Generator) -> None:
    x, labels = torch.randn(40, 4, generator=rng).double(), torch.arange(40) // 5
    loss = pc_kernels.SmoothAPLoss(temperature=1e-6, with_query=False)(x, labels)
    assert near(metrics.retrieval(x, labels).mean_average_precision, 1 - loss)


def test_batch_by_batch(rng: Generator) -> None:
    """Lists are averaged over, pools are kept: as all at once, and again after a reset."""
    scores = torch.randn(30, 8, generator=rng)
    labels = torch.randint(0, 3, scores.shape, generator=rng)
    x, y = torch.randn(30, 5, generator=rng), torch.randn(30, 4, generator=rng)
    classes = torch.randint(0, 6, (30,), generator=rng)
    cases: list[tuple[metrics.Metric, tuple[Tensor, ...], Any]] = [
        (metrics.NDCG(k=3), (scores, labels), metrics.ndcg(scores, labels, k=3)),
        (metrics.MRR(), (scores, labels), metrics.mrr(scores, labels)),
        (metrics.RecallAtK(k=2), (scores, labels), metrics.recall_at_k(scores, labels, k=2)),
        (
            metrics.MeanAveragePrecision(),
            (scores, labels),
            metrics.average_precision(scores, labels),
        ),
        (metrics.CoherenceMetric(), (x, y), pc_kernels.coherence(x, y)),
        (metrics.RetrievalMetric(k=3), (x, classes), metrics.retrieval(x, classes, k=3)),
    ]
    for name in ("AUC", "AveragePrecision", "Spearman", "KendallTau"):
        metric = getattr(metrics, name)()
        cases.append(
            (metric, (scores, labels), type(metric).measure(scores.view(-1), labels.view(-1)))
        )
    for metric, data, wanted in cases:
        nothing = metric.compute()
        assert np.isnan(np.asarray(list(flattened(nothing)))).all()
        for _ in range(2):
            metric.reset()
            for part in zip(*(t.split(11) for t in data), strict=True):
                metric.update(*part)
            got = metric.compute()
            assert list(flattened(got)) == pytest.approx(list(flattened(wanted)), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: metrics.ndcg(torch.zeros(3), torch.zeros(3), k=0), ValueError, ("k must be > 0",)),
        (lambda: metrics.ndcg(torch.zeros(3), torch.zeros(3), n=3), TypeError, ("'n'",)),
        (
            lambda: metrics.auc(torch.zeros(3), torch.zeros(2)),
            ValueError,
            ("labels", "(3,)", "(2,)"),
        ),
        (
            lambda: metrics.auc(torch.zeros(3), torch.zeros(3), reduction="sum"),
            ValueError,
            ("reduction", "'mean', 'none'", "'sum'"),
        ),
        (lambda: metrics.AUC("ring"), TypeError, ()),
        (lambda: metrics.AUC(process_group="ring"), TypeError, ("process_group", "str")),
        (lambda: metrics.NDCG(n=3), TypeError, ("'n'",)),
        (lambda: metrics.CoherenceMetric(dissimilarity="L2"), ValueError, ("dissimilarity", "L2")),
    ],
)
def test_errors(call: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    raises(error, *words, call=call)
