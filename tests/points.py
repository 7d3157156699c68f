"""Checks of a backend that brings points near the origin, beside `compare.check_near_origin`."""

from __future__ import annotations

import math

import torch
from torch import Generator

from pc_kernels.dissimilarities.row_maker import FAR, PLAIN, RowMaker
from pc_kernels.products import Products

RESCALED = ("huge", "tiny")
"""Of `inputs.POINTS`, what is rescaled where looking is free, on the CPU."""


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
