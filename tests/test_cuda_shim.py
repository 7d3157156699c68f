"""The CUDA kernels on the CPU (tests/cuda_shim), against the truth in float64."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import points
import pytest
import tolerances
import torch
from compare import (
    PENALTIES,
    RELAXATIONS,
    SCALES,
    assert_near,
    check_features,
    check_matrices,
    check_soft_rank,
    own_leaf,
)
from inputs import HOSTILE_FEATURES, ROWS, make_rows, quantised, two_clumps
from shim import ALL_SHARED, ShimBackend
from torch import Generator, Tensor

import pc_kernels
from pc_kernels import reference
from pc_kernels.backends import BACKENDS, ReferenceBackend
from pc_kernels.dissimilarities import Chunk, Pairs, Points, Rows, make_side
from pc_kernels.dissimilarities.gram_rows import dissimilarities
from pc_kernels.recipe import Recipe

REFERENCE = ReferenceBackend()
LENGTHS = [1, 2, 3, 7, 31, 33, 64, 513]
DISSIMILARITIES = ("euclidean", "sqeuclidean", "cosine", "cityblock")

DEVICES = {
    "narrow warps": {"threads": 16, "warp": 8},
    "a warp": {"threads": 8, "warp": 8},
    "global memory": {"threads": 16, "warp": 8, "shared_bytes": 15000},
    "a full multiprocessor": {"threads": 16, "warp": 8, "shared_bytes": 40000},
    "whole warps": {"threads": 64, "warp": 32},
}


@pytest.fixture(params=["narrow warps"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend that runs the kernels on a device of DEVICES."""
    BACKENDS["cuda_shim"] = ShimBackend(**DEVICES[request.param])
    yield "cuda_shim"
    del BACKENDS["cuda_shim"]


on_every_device = pytest.mark.parametrize("backend", DEVICES, indirect=True)
in_both_memories = pytest.mark.parametrize(
    "backend", ["a full multiprocessor", "global memory"], indirect=True
)


@on_every_device
@pytest.mark.parametrize("m", LENGTHS)
def test_soft_rank_lengths(backend: str, m: int, rng: Generator) -> None:
    for name in ("normal", "integers"):
        x = make_rows(name, rng, 2, m)
        for relaxation in RELAXATIONS:
            for scale in SCALES:
                options = {"relaxation": relaxation, "scale": scale}
                check_soft_rank(backend, x, rng, temperature=0.1, **options)


@in_both_memories
@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 0.1, 100.0])
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_make_trouble(
    backend: str, name: str, temperature: float, rng: Generator
) -> None:
    x = make_rows(name, rng, 1, 97)
    for relaxation in RELAXATIONS:
        for scale in SCALES:
            options = {"relaxation": relaxation, "scale": scale}
            check_soft_rank(backend, x, rng, temperature=temperature, **options)


@pytest.mark.parametrize(
    "name", ["normal", "outlier of 1e3", "two far tight clumps", "three values"]
)
def test_long_rows(backend: str, name: str, rng: Generator) -> None:
    """On the grid, with gaps to close; many points in a cell, and thousands of cells."""
    for temperature in (0.1, 0.01):
        check_soft_rank(backend, make_rows(name, rng, 1, 3000), rng, temperature=temperature)


@in_both_memories
@pytest.mark.parametrize(
    "name", ["heavy tails", "clumps and sparse values", "powers of two", "tiers"]
)
def test_crowds_among_scattered_points(backend: str, name: str, rng: Generator) -> None:
    """Crowds have grids of their own, several where they are wide, points between them their pairs."""
    m = 400
    if name == "tiers":  # widths of all sizes, each with as many points
        width = 10.0 ** (torch.arange(m) % 7).float()
        x = (width * torch.randn(1, m, generator=rng))[:, torch.randperm(m, generator=rng)]
    else:
        x = make_rows(name, rng, 1, m)
    for i, (temperature, scale) in enumerate(
        ((1e-3, "std"), (1.0, "std"), (0.05, None), (1.0, None))
    ):
        options = {"relaxation": RELAXATIONS[i % 2], "scale": scale, "temperature": temperature}
        check_soft_rank(backend, x, rng, **options)
    check_matrices(backend, x, torch.rand(1, m, generator=rng), rng, temperature=1e-3)


def test_a_crowd_is_not_summed_over_all_pairs(backend: str, rng: Generator) -> None:
    def seconds(m: int) -> float:
        """Half of the points in one place, the others everywhere."""
        x = 1e6 * torch.rand(1, m, generator=rng)
        x[:, ::2] = torch.rand(1, (m + 1) // 2, generator=rng)
        started = time.process_time()
        pc_kernels.soft_rank(own_leaf(x), 1.0, backend=backend).sum().backward()
        return time.process_time() - started

    seconds(1024)
    assert seconds(16384) < 64 * seconds(1024)  # all pairs take 256 times as long


def test_nearly_hard_rows_are_not_summed_over_all_pairs(backend: str, rng: Generator) -> None:
    """Neighbours ten temperatures apart see each other and no one else: known ranks and gradients."""

    def seconds(m: int) -> float:
        x = own_leaf(torch.randperm(m, generator=rng)[None].float())
        upstream = torch.randn(1, m, generator=rng)
        started = time.process_time()
        rank = pc_kernels.soft_rank(x, 0.1, backend=backend)
        rank.backward(upstream)
        taken = time.process_time() - started
        order = x.detach().long()[0]
        place = torch.arange(m, dtype=torch.float64)
        wrong = 1 / (1 + math.exp(10))  # of the step to a neighbour
        hard = place - wrong * (place > 0) + wrong * (place < m - 1)
        assert_near("rank", rank[0], hard[order] / (m - 1), tolerances.RANK)
        g = torch.empty(m, dtype=torch.float64)
        g[order] = upstream[0].double()
        push = g.diff() * wrong * (1 - wrong) / 0.1 / (m - 1)
        wanted = torch.zeros(m, dtype=torch.float64)
        wanted[1:] += push
        wanted[:-1] -= push
        assert x.grad is not None
        allowed = tolerances.grad_tolerance(torch.float32) * wanted.norm()
        assert (x.grad[0] - wanted[order]).norm() <= allowed
        return taken

    seconds(2048)
    assert seconds(32768) < 64 * seconds(2048)  # all pairs take 256 times as long


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-10, 1e10, 1e45, 1e300])
def test_temperatures_beyond_every_gap(backend: str, temperature: float, rng: Generator) -> None:
    for m in (5, 40):
        x = make_rows("integers", rng, 1, m)
        rank = pc_kernels.soft_rank(x, temperature, backend=backend)
        hard = reference.hard_rank(x.double())
        wanted = hard if temperature < 1 else torch.full_like(hard, 0.5)
        assert_near("rank", rank, wanted, tolerances.RANK)


@pytest.mark.parametrize("scale", SCALES)
def test_subnormal_values(backend: str, scale: str | None, rng: Generator) -> None:
    x = torch.randint(-50, 50, (2, 33), generator=rng) * torch.tensor(2.0**-149)
    temperature = 0.1 if scale == "std" else 1e-43
    check_soft_rank(backend, x, rng, temperature=temperature, scale=scale, with_grad=False)


@on_every_device
@pytest.mark.parametrize("m", LENGTHS)
def test_hard_rank(backend: str, m: int, rng: Generator) -> None:
    """Exact but for the last division, ties and all."""
    x = torch.cat([make_rows(name, rng, 1, m) for name in ROWS])
    rank = pc_kernels.hard_rank(x, backend=backend)
    assert_near("rank", rank, reference.hard_rank(x.double()), 2 * tolerances.U)
    distinct = torch.randperm(m, generator=rng).float()
    if m > 1:
        ends = pc_kernels.hard_rank(distinct, backend=backend)
        assert ends.min() == 0 and ends.max() == 1


def test_hard_rank_of_infinities(backend: str) -> None:
    inf = math.inf
    for row, wanted in (
        ([1, inf, 2, -inf, inf], [0.25, 0.875, 0.5, 0, 0.875]),
        ([inf, -inf, inf], [0.75, 0, 0.75]),
        ([inf, inf], [0.5, 0.5]),
        ([math.nan, inf, 1], [math.nan] * 3),
    ):
        rank = pc_kernels.hard_rank(torch.tensor(row), backend=backend)
        assert torch.equal(rank.nan_to_num(9), torch.tensor(wanted).nan_to_num(9))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_only_rows_with_a_nan_or_infinity_are_nan(backend: str, bad: float, rng: Generator) -> None:
    for m in (2, 3, 16, 40):
        x = torch.randn(3, m, generator=rng)
        x[1, m // 2] = bad
        leaf = own_leaf(x)
        rank = pc_kernels.soft_rank(leaf, scale="std", backend=backend)
        rank.backward(torch.ones_like(x))
        touched = torch.arange(3) == 1
        assert leaf.grad is not None
        for result in (rank, leaf.grad):
            assert result[touched].isnan().all() and result[~touched].isfinite().all()


def batch(rng: Generator, rows: int, width: int = 12) -> tuple[Tensor, Tensor]:
    """Student features, and teacher features whose distances are exact."""
    return torch.randn(rows, width, generator=rng), quantised(rng, rows, 8)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("metric", DISSIMILARITIES)
def test_every_combination(
    backend: str, metric: str, relaxation: str, penalty: str, rng: Generator
) -> None:
    metrics = {"dissimilarity": metric, "teacher_dissimilarity": "euclidean"}
    for scale in SCALES:
        options = {"relaxation": relaxation, "penalty": penalty, "scale": scale}
        check_features(backend, *batch(rng, 17), rng, **metrics, **options)
        refs = batch(rng, 22)
        check_features(
            backend, *batch(rng, 9), rng, refs=refs, reduction="sum", **metrics, **options
        )


@on_every_device
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 8, 32, 34, 65])
def test_batch_sizes(backend: str, rows: int, rng: Generator) -> None:
    for metric in DISSIMILARITIES[: 4 if rows < 32 else 1]:
        check_features(
            backend,
            *batch(rng, rows),
            rng,
            dissimilarity=metric,
            teacher_dissimilarity="sqeuclidean",
        )


@pytest.mark.parametrize("anchors", [1, 9])
@pytest.mark.parametrize("references", [0, 1, 2, 513])
def test_rectangular(backend: str, anchors: int, references: int, rng: Generator) -> None:
    refs = batch(rng, references)
    check_features(
        backend,
        *batch(rng, anchors),
        rng,
        refs=refs,
        dissimilarity="cosine",
        teacher_dissimilarity="euclidean",
        reduction="none",
    )


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_temperatures(
    backend: str, relaxation: str, scale: str | None, temperature: float, rng: Generator
) -> None:
    options = {"relaxation": relaxation, "scale": scale, "temperature": temperature}
    check_features(backend, *batch(rng, 33), rng, teacher_dissimilarity="euclidean", **options)


@pytest.mark.parametrize("width", [1, 3, 127, 600])
def test_widths(backend: str, width: int, rng: Generator) -> None:
    check_features(backend, *batch(rng, 12, width), rng, teacher_dissimilarity="cityblock")


@in_both_memories
@pytest.mark.parametrize("metric", DISSIMILARITIES[:3])
@pytest.mark.parametrize("name", HOSTILE_FEATURES)
def test_hostile_features(backend: str, name: str, metric: str, rng: Generator) -> None:
    """Near pairs are summed again from differences, far anchors keep their digits."""
    student = HOSTILE_FEATURES[name](rng, 24, 16)
    teacher = quantised(rng, 24, 8)
    check_features(
        backend, student, teacher, rng, dissimilarity=metric, teacher_dissimilarity="euclidean"
    )


def test_a_far_teacher(backend: str, rng: Generator) -> None:
    """Ranked as the dissimilarities in float64 are, in digits that |a|² would have cost."""
    teacher = quantised(rng, 24, 8)
    teacher[5] += 4096
    check_features(backend, torch.randn(24, 6, generator=rng), teacher, rng, temperature=0.5)


@pytest.mark.parametrize("far", [8, 34])
def test_two_clumps(backend: str, far: int, rng: Generator) -> None:
    """References beside a far anchor keep their digits, and what pulls at them does not cancel."""
    student, teacher = two_clumps(rng, 40, 16, far), quantised(rng, 40, 8)
    for mask in (None, torch.rand(40, 40, generator=rng) < 0.8):
        check_features(
            backend, student, teacher, rng, pair_mask=mask, teacher_dissimilarity="euclidean"
        )


def test_ties(backend: str, rng: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    points.check_ties(backend, rng, monkeypatch)


def test_a_zero_beside_poison(backend: str, rng: Generator) -> None:
    points.check_a_zero_beside_poison(backend, rng)


def test_features_of_any_size(backend: str, rng: Generator) -> None:
    points.check_features_of_any_size(backend, rng)


def test_duplicates_and_constant_rows(backend: str, rng: Generator) -> None:
    student, teacher = batch(rng, 24)
    student = student[torch.randint(0, 6, (24,), generator=rng)]
    check_features(backend, student, teacher, rng, teacher_dissimilarity="euclidean")
    leaf = own_leaf(student[:1].expand(24, 12))
    loss = pc_kernels.perception_coherence_loss(leaf, teacher, backend=backend)
    loss.backward()
    assert loss.isfinite() and loss > 0  # ½ everywhere, and the teacher ranks
    assert leaf.grad is not None and (leaf.grad == 0).all()


@in_both_memories
@pytest.mark.parametrize("m", [5, 33, 70])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_given_matrices(backend: str, m: int, penalty: str, rng: Generator) -> None:
    d_s, d_t = torch.rand(5, m, generator=rng), make_rows("integers", rng, 5, m)
    check_matrices(backend, d_s, d_t, rng, penalty=penalty)
    d_s, d_t = torch.rand(m, m, generator=rng), make_rows("integers", rng, m, m)
    check_matrices(backend, d_s, d_t, rng, exclude_self=True, penalty=penalty)


@in_both_memories
@pytest.mark.parametrize("m", [5, 33, 70])
def test_masks(backend: str, m: int, rng: Generator) -> None:
    """Rows with all, some, two, one and none of their references; with and without the anchor."""
    d_s, d_t = torch.rand(m, m, generator=rng), make_rows("integers", rng, m, m)
    mask = torch.rand(m, m, generator=rng) < 0.5
    mask[0], mask[1], mask[2], mask[3] = True, False, torch.arange(m) < 2, torch.arange(m) == 2
    check_matrices(backend, d_s[:5], d_t[:5], rng, pair_mask=mask[:5])
    check_matrices(backend, d_s, d_t, rng, exclude_self=True, pair_mask=mask)
    student, teacher = batch(rng, m)
    pairs = torch.rand(m, m, generator=rng) < 0.7
    check_features(
        backend, student, teacher, rng, pair_mask=pairs, teacher_dissimilarity="euclidean"
    )


@in_both_memories
def test_ranks_of_a_teacher_of_several_students(backend: str, rng: Generator) -> None:
    """Ranked once, in place, a teacher gives each student the loss that it gives it alone."""
    engine, recipe = BACKENDS[backend], Recipe()
    matrix = make_rows("integers", rng, 6, 40)
    matrix[3, 7] = math.nan
    keep = torch.rand(6, 40, generator=rng) < 0.7
    for mask, start in ((None, None), (None, 3), (keep, 3), (keep | True, None)):
        pairs = Pairs(start, mask)
        ranked = engine.hard_rank_rows(Rows(matrix.clone()), pairs)
        assert ranked.dissimilarity == "ranked"
        values = torch.rand(6, 40, generator=rng)
        outcomes = []
        for teacher in (Rows(matrix.clone()), ranked):
            student = Rows(values.clone())
            chunk = Chunk(student, teacher, torch.ones(6), pairs)
            losses = engine.coherence_rows(chunk, recipe, True)
            outcomes.append((losses.nan_to_num(9), student.values.nan_to_num(9)))
        for alone, shared in zip(*outcomes, strict=True):
            assert torch.equal(alone, shared)
        there = torch.ones(6, 40, dtype=torch.bool) if mask is None else mask.clone()
        if start is not None:
            there.diagonal(start)[:6] = False
        wanted = REFERENCE.hard_rank_rows(Rows(matrix.double()), pairs)
        expected = torch.where(there, wanted.values.nan_to_num(9), 0)
        assert_near("ranks", ranked.values.nan_to_num(9), expected, 2 * tolerances.U)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_count_where_they_are_kept(backend: str, bad: float, rng: Generator) -> None:
    d_s, d_t = own_leaf(torch.rand(3, 9, generator=rng)), torch.rand(3, 9, generator=rng)
    with torch.no_grad():
        d_s[0, 4] = d_s[1, 4] = bad
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 4] = mask[0, 2] = False
    options = {"pair_mask": mask, "reduction": "none", "backend": backend}
    loss = pc_kernels.coherence_loss_from_dissimilarities(d_s, d_t, **options)
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, False, False]
    assert d_s.grad is not None
    assert d_s.grad[0][mask[0]].isnan().all() and d_s.grad[1:].isfinite().all()
    assert d_s.grad[0, 2] == 0 and d_s.grad[1, 4] == 0
    d_t[2, 3] = bad
    loss = pc_kernels.coherence_loss_from_dissimilarities(d_s.detach(), d_t, **options)
    assert loss.isnan().tolist() == [True, False, True]


def test_the_same_again(backend: str, rng: Generator) -> None:
    """Atomics come in another order every time; results do not show it."""
    student, teacher = torch.randn(9, 400, generator=rng), make_rows("integers", rng, 9, 400)

    def once() -> tuple[Tensor, ...]:
        leaf = own_leaf(student)
        loss = pc_kernels.coherence_loss_from_dissimilarities(leaf, teacher, backend=backend)
        loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad, pc_kernels.hard_rank(student, backend=backend)

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_rows_at_any_address(backend: str, rng: Generator) -> None:
    """Rows that do not start at a multiple of 16 bytes."""
    engine, m = BACKENDS[backend], 41
    x = make_rows("integers", rng, 3, m)
    moved = torch.empty(3 * m + 1)[1:].view(3, m).copy_(x)
    assert moved.data_ptr() % 16 != x.data_ptr() % 16
    assert torch.equal(engine.hard_rank(x), engine.hard_rank(moved))


def test_the_limit_of_shared_memory_does_not_depend_on_the_launch(backend: str) -> None:
    """It is the kernel's: a thread of the host that lowered it would spoil another's launch."""
    engine = BACKENDS[backend]
    assert isinstance(engine, ShimBackend)
    for m in (300, 3):
        engine.hard_rank(torch.rand(1, m))
        assert engine.library.latest_limit() == ALL_SHARED


def test_dissimilarities_alone(backend: str, rng: Generator) -> None:
    """The stage that writes over its inner products."""
    for metric in DISSIMILARITIES:
        x = HOSTILE_FEATURES["near-duplicates"](rng, 20, 7)
        wide, narrow = Points(x.double(), x.double()), Points(x, x)
        wanted = dissimilarities(make_side(metric, wide, with_grad=False).rows(0, 20))
        rows = make_side(metric, narrow, with_grad=False).rows(0, 20)
        got = BACKENDS[backend].dissimilarity(rows)
        assert_near(metric, got, wanted, 4e-6 * wanted + 1e-6)


@pytest.mark.parametrize("table", ["relaxation", "penalty", "dissimilarity"])
def test_an_unknown_code_ends_the_program(table: str, python: Callable[..., Any]) -> None:
    """Whoever goes around the operators' checks does not get the formulas of another code."""
    done = python("-c", UNKNOWN_CODE, table, PYTHONPATH="tests")
    assert done.returncode == -signal.SIGABRT and "computed" not in done.stdout
    assert table != "relaxation" or "has no row with code 99" in done.stderr


UNKNOWN_CODE = """
import sys
import torch
import shim
table = sys.argv[1]
codes = {"relaxation": 0, "penalty": 0, "dissimilarity": 0, table: 99}
x, weights, losses = torch.rand(2, 5), torch.ones(2), torch.ones(2)
rows = shim.Rows(shim.address(x), *[None] * 7, 5, 0, codes["dissimilarity"])
options = shim.RankOptions(codes["relaxation"], codes["penalty"], 0.1, True)
stage = shim.CoherenceRows(rows, rows, shim.Present(None, -1), shim.address(weights), options)
stage.losses = shim.address(losses)
shim.ShimBackend().run("coherence_rows", 2, stage)
print("computed")
"""
