"""Checks of a backend that brings points near the origin, beside `compare.check_near_origin`."""

from __future__ import annotations

import math

import pytest
import torch
from compare import check_features, own_leaf
from inputs import quantised
from torch import Generator, Tensor

import pc_kernels
from pc_kernels.backends import BACKENDS
from pc_kernels.dissimilarities import Points, make_side
from pc_kernels.dissimilarities.gram_rows import GRAM
from pc_kernels.dissimilarities.row_maker import FAR, PLAIN, RowMaker
from pc_kernels.products import Products


def check_nothing_to_look_at(maker: RowMaker, shapes: tuple[int, int]) -> None:
    """Points that are none, or have no features."""
    for points in ([torch.ones(shapes)], [torch.ones(shapes), torch.ones(0, shapes[1])]):
        got = maker.near_origin(points, Products())
        assert [x.shape for x in got.points] == [x.shape for x in points]
        assert all(
            torch.equal(sq, x.square().sum(1)) for sq, x in zip(got.squares, points, strict=True)
        )
        assert not got.offsets.any()


def check_who_is_far(maker: RowMaker, count: int, rng: Generator) -> None:
    """By the exact median, of norms over all of float32's range, and of equal ones."""
    spread = torch.rand(count, generator=rng) * 10 ** (38 * torch.rand(count, generator=rng) - 19)
    for lengths in (spread, torch.ones(count), torch.zeros(count)):
        threshold = math.sqrt(FAR * float(lengths.square().median()))
        anchors = torch.tensor([0.0, threshold * 0.99, threshold * 1.01, 1e18])[:, None]
        got = maker.near_origin([anchors, lengths[:, None]], Products("bf16x6", 3))
        wanted = PLAIN.near_origin([anchors, lengths[:, None]])
        moved = not torch.equal(got.points[0], anchors) or wanted.unit != 1
        assert moved or torch.equal(got.offsets > 0, wanted.offsets > 0)


def check_parts_stay_whole(maker: RowMaker, dtype: torch.dtype, rng: Generator) -> None:
    """A shift that would take more parts of bfloat16 is refused."""
    parts = Products("ieee", {torch.bfloat16: 1, torch.float16: 2}[dtype])
    features = torch.randn(40, 20, generator=rng) + torch.tensor([0.0, 3.0, 40.0, 1000.0]).repeat(5)
    points = features.to(dtype).float()
    (moved,) = maker.near_origin([points], parts).points
    assert parts.hold(moved).all() and not torch.equal(moved, points)


def rough_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes products round columns differently, as those of a GPU or of few rows may: by an ulp."""
    exact = Products.of_pairs

    def rough(self: Products, x: Tensor, y: Tensor, out: Tensor) -> None:
        exact(self, x, y, out)
        for step in (1, 2):
            out[:, step::3] = torch.nextafter(
                out[:, step::3], out.new_tensor((-1) ** step * torch.inf)
            )

    monkeypatch.setattr(Products, "of_pairs", rough)


def check_ties(backend: str, rng: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """References that are equal bit for bit are equally far from an anchor, whatever products do."""
    rough_products(monkeypatch)
    count, width = 21, 70
    kind = torch.randint(7, (count,), generator=rng)
    first = torch.full((7,), count).scatter_reduce(0, kind, torch.arange(count), "amin")[kind]
    student, teacher = torch.randn(3, width, generator=rng), quantised(rng, 3, width)
    kinds = torch.randn(7, width, generator=rng), quantised(rng, 7, width)
    engine = BACKENDS[backend]
    for metric in ("euclidean", "sqeuclidean", "cosine"):
        side = make_side(metric, Points(student, kinds[0][kind]), with_grad=False, maker=engine)
        d = engine.dissimilarity(side.rows(0, 3))
        assert torch.equal(d, d[:, first]) and len(d[0].unique()) > 1
    refs = kinds[0][kind], kinds[1][kind]
    check_features(backend, student, teacher, rng, refs=refs)  # ranks that are off by 1/20 are seen

    alike = own_leaf(student)
    refs = kinds[0][:1].expand(count, width), torch.randn(count, width, generator=rng)
    pc_kernels.perception_coherence_loss(alike, teacher, *refs, backend=backend).backward()
    assert alike.grad is not None and not alike.grad.any()  # rows of equal values


def check_a_zero_beside_poison(backend: str, rng: Generator) -> None:
    """Features that are not finite count as 0, but what is 0 is not one of them."""
    student, teacher = torch.randn(3, 70, generator=rng), quantised(rng, 3, 70)
    refs = torch.randn(12, 70, generator=rng), quantised(rng, 12, 70)
    refs[0][3], refs[0][9], refs[0][11, 2] = math.nan, 0.0, math.inf
    keep = torch.rand(3, 12, generator=rng) < 0.8
    keep[:, 3], keep[:, 11], keep[:, 9] = False, torch.arange(3) == 2, True
    for metric in ("euclidean", "cosine"):
        losses = pc_kernels.perception_coherence_loss(
            *(student, teacher, *refs),
            pair_mask=keep,
            reduction="none",
            backend=backend,
            dissimilarity=metric,
        )
        assert torch.equal(losses.isnan(), torch.arange(3) == 2)
        finite = refs[0].nan_to_num(0.0, 0.0, 0.0), refs[1]
        options = {"refs": finite, "pair_mask": keep[:2], "dissimilarity": metric}
        check_features(backend, student[:2], teacher[:2], rng, **options)


def check_features_of_any_size(backend: str, rng: Generator) -> None:
    """Powers of two change no digit, hence no rank; a temperature of its own is multiplied by them."""
    student, teacher = torch.randn(9, 70, generator=rng), quantised(rng, 9, 5)

    def found(exponent: int, metric: str, scale: str | None) -> tuple[Tensor, Tensor]:
        leaf = own_leaf(student * 2.0**exponent)
        power = 0 if scale == "std" else GRAM[metric].power
        loss = pc_kernels.perception_coherence_loss(
            leaf,
            teacher * 2.0**-exponent,
            dissimilarity=metric,
            teacher_dissimilarity="euclidean",
            scale=scale,
            temperature=0.5 * 2.0 ** (power * exponent),
            backend=backend,
        )
        loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad.double() * 2.0**exponent

    for metric, scale in (("euclidean", "std"), ("euclidean", None), ("sqeuclidean", None)):
        (loss, grad), *others = (found(exponent, metric, scale) for exponent in (0, -110, 110))
        for other, slope in others:
            assert abs(other - loss) <= 1e-5 * loss
            assert (slope - grad).norm() <= 2e-5 * grad.norm()


def check_quarantine(maker: RowMaker, rng: Generator) -> None:
    """Points that are not finite, by any feature."""
    x = torch.randn(19, 40, generator=rng)
    x[3, 39], x[7, 0], x[8, 20] = torch.inf, torch.nan, -torch.inf
    for given in (x, x[:0], x[:, :0]):
        got, wanted = maker.quarantine(given), PLAIN.quarantine(given)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))


def check_normalized(maker: RowMaker, rng: Generator) -> None:
    """Points of any size over their norms, and back."""
    x = torch.randn(9, 37, generator=rng) * 10.0 ** torch.arange(-38, 36, 9)[:, None]
    x[4] = 0
    grad = torch.randn(9, 37, generator=rng) * x.abs().amax(1, keepdim=True).clamp(min=1e-30)
    for points, upstream in ((x, grad), (x[:0], grad[:0]), (x[:, :0], grad[:, :0])):
        got, wanted = maker.normalized(points), PLAIN.normalized(points.double())
        for a, b in zip(got, wanted, strict=True):
            assert torch.allclose(a.double(), b, rtol=1e-6, atol=0)
        found = maker.normalized_backward(upstream, *got)
        exact = PLAIN.normalized_backward(upstream.double(), *wanted)
        assert (found - exact).norm() <= 1e-6 * exact.norm()
