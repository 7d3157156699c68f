"""Coherence, the measure that the loss stands for, against the reference and against its meaning."""

from __future__ import annotations

import math

import pytest
import torch
from compare import DISSIMILARITIES, FAST_BACKENDS
from inputs import quantised
from torch import Generator

import pc_kernels
from pc_kernels import reference
from pc_kernels.agreement import agreement_rows, spearman_rows
from pc_kernels.backends import BACKENDS
from pc_kernels.pair_counts import inversions

NEAR = 1e-6
"""Both are float32 at the end; between, counts are integers and sums float64."""


@pytest.mark.parametrize("rows", [3, 4, 7, 17, 64, 65])
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cityblock"])
def test_features(metric: str, rows: int, rng: Generator) -> None:
    """On features with exact distances, hence with true ties."""
    s, t = quantised(rng, rows, 4), quantised(rng, rows, 5)
    got = pc_kernels.coherence(s, t, dissimilarity=metric)
    wanted = reference.coherence(s.double(), t.double(), dissimilarity=metric)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == () and abs(a.item() - b.item()) <= NEAR
    refs = quantised(rng, rows + 3, 4), quantised(rng, rows + 3, 5)
    got = pc_kernels.coherence(s, t, *refs, dissimilarity=metric)
    wanted = reference.coherence(
        s.double(), t.double(), *(r.double() for r in refs), dissimilarity=metric
    )
    for a, b in zip(got, wanted, strict=True):
        assert abs(a.item() - b.item()) <= NEAR


def test_teacher_metric_of_its_own(rng: Generator) -> None:
    s, t = quantised(rng, 12, 4), quantised(rng, 12, 4)
    names = {"dissimilarity": "cityblock", "teacher_dissimilarity": "sqeuclidean"}
    got = pc_kernels.coherence(s, t, **names)
    wanted = reference.coherence(s.double(), t.double(), **names)
    assert abs(got.agreement - wanted.agreement) <= NEAR
    called = pc_kernels.coherence(s, t, dissimilarity=lambda a, b: -(a @ b.T))
    wanted = reference.coherence(s.double(), t.double(), dissimilarity=lambda a, b: -(a @ b.T))
    assert abs(called.agreement - wanted.agreement) <= NEAR


@pytest.mark.parametrize("m", [2, 3, 8, 33, 200])
def test_rows(m: int, rng: Generator) -> None:
    d_s = torch.randint(0, max(m // 2, 2), (5, m), generator=rng).float()
    d_t = torch.randn(5, m, generator=rng)
    d_s[0] = 1.0
    wanted = [
        reference.coherence_from_dissimilarities(a[None].double(), b[None].double())
        for a, b in zip(d_s, d_t, strict=True)
    ]
    agreement, spearman = agreement_rows(d_s, d_t), spearman_rows(d_s, d_t)
    for i, row in enumerate(wanted):
        assert abs(agreement[i] - row.agreement) <= 1e-12
        assert abs(spearman[i] - row.spearman) <= NEAR
    assert agreement[0] == 0.5 and spearman[0] == 0


@pytest.mark.parametrize("m", [1, 2, 3, 64, 100, 129])
def test_inversions(m: int, rng: Generator) -> None:
    v = torch.randint(0, m, (6, m), generator=rng)
    later = torch.ones(m, m, dtype=torch.bool).triu(1)
    wanted = ((v[:, :, None] > v[:, None, :]) & later).sum((1, 2))
    assert torch.equal(inversions(v).sum(1), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_pair_counts(backend: str, dtype: torch.dtype, rng: Generator) -> None:
    """Of lists of any lengths: every kind of tie, signed zeros and infinities."""
    lengths = torch.tensor([0, 1, 2, 300, 0, 17, 64, 3])
    for values in (2, 40, 10**6):
        x = torch.randint(-values, values, (int(lengths.sum()),), generator=rng).to(dtype) / 7
        y = torch.randint(-values, values, x.shape, generator=rng).to(dtype) + x
        x[5], y[9], x[300] = math.inf, -math.inf, -0.0
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        counts = BACKENDS[backend].pair_counts(x, y, offsets)
        each = zip(x.split(lengths.tolist()), y.split(lengths.tolist()), strict=True)
        for i, (a, b) in enumerate(each):
            up = torch.ones(len(a), len(a)).triu(1) == 1
            by_x, by_y = (torch.sign(v[:, None] - v[None, :]) for v in (a, b))
            by_x, by_y = by_x.nan_to_num(0)[up], by_y.nan_to_num(0)[up]
            wanted = [
                by_x.numel(),
                (by_x == 0).sum(),
                (by_y == 0).sum(),
                ((by_x == 0) & (by_y == 0)).sum(),
                (by_x * by_y < 0).sum(),
            ]
            assert [int(c[i]) for c in counts] == [int(w) for w in wanted]
            assert counts.concordant[i] == (by_x * by_y > 0).sum()


@pytest.mark.parametrize("metric", DISSIMILARITIES)
def test_extremes(metric: str, rng: Generator) -> None:
    """1 for itself, however scaled; agreement 0 and correlation -1 for the other way round."""
    x = torch.randn(30, 6, generator=rng)
    for student in (x, 4 * x):
        same = pc_kernels.coherence(student, x, dissimilarity=metric)
        assert same.agreement == 1 and abs(same.spearman - 1) <= NEAR
    away = pc_kernels.coherence(
        x,
        x,
        dissimilarity=lambda a, b: -pc_kernels.pairwise_dissimilarity(a, b, metric),
        teacher_dissimilarity=metric,
    )
    assert away.agreement == 0 and abs(away.spearman + 1) <= NEAR


def test_nothing_to_rank_is_nan() -> None:
    for rows in (0, 1, 2):
        result = pc_kernels.coherence(torch.ones(rows, 3), torch.ones(rows, 3))
        assert result.agreement.isnan() and result.spearman.isnan()
    result = pc_kernels.coherence(*(torch.ones(4, 3),) * 2, *(torch.ones(1, 3),) * 2)
    assert result.agreement.isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_infinity_make_it_nan(side: int, bad: float, rng: Generator) -> None:
    features = [torch.randn(9, 3, generator=rng), torch.randn(9, 3, generator=rng)]
    features[side][2, 1] = bad
    result = pc_kernels.coherence(*features)
    assert result.agreement.isnan() and result.spearman.isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_no_gradient(dtype: torch.dtype, rng: Generator) -> None:
    s, t = (quantised(rng, 15, 4).to(dtype).requires_grad_() for _ in range(2))
    result = pc_kernels.coherence(s, t)
    wanted = reference.coherence(s.detach().double(), t.detach().double())
    assert abs(result.agreement - wanted.agreement) <= NEAR
    assert not result.agreement.requires_grad


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, rng: Generator) -> None:
    s, t = quantised(rng, 40, 4), quantised(rng, 40, 4)
    whole = pc_kernels.coherence(s, t)
    monkeypatch.setattr("pc_kernels.agreement.default_chunk_bytes", lambda device: 3 * 40 * 128)
    chunked = pc_kernels.coherence(s, t)
    assert all(abs(a - b) <= NEAR for a, b in zip(whole, chunked, strict=True))
