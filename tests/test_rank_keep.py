"""The compiled rank stages with `keep`: what is absent changes nothing, and has no result."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import tolerances
import torch
import truth
from compare import RELAXATIONS, SCALES, assert_near, assert_norm_near, own_leaf
from inputs import ROWS, make_rows
from shim import ShimBackend
from torch import Generator, Tensor

from pc_kernels import reference
from pc_kernels.backends import BACKENDS, CompiledBackend, extension_obstacle
from pc_kernels.recipe import Recipe

NO_EXTENSION = extension_obstacle()
COMPILED = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(NO_EXTENSION is not None, reason=str(NO_EXTENSION))
    ),
    "cuda",
    "cuda in global memory",
]
TEMPERATURES = [1e-4, 1e-2, 0.1, 100.0]


@pytest.fixture(params=COMPILED)
def backend(request: pytest.FixtureRequest) -> Iterator[CompiledBackend]:
    """The kernels of csrc/cpu, and those of csrc/cuda on the CPU."""
    if request.param == "cpu":
        found = BACKENDS["cpu"]
        assert isinstance(found, CompiledBackend)
        yield found
    else:
        yield ShimBackend(**({} if request.param == "cuda" else {"shared_bytes": 15000}))


def masks(rng: Generator, rows: int, m: int) -> Tensor:
    """Random ones; the first rows keep none, one, two and all."""
    keep = torch.rand(rows, m, generator=rng) < 0.6
    for row, kept in enumerate((0, 1, 2, m)[:rows]):
        keep[row] = (torch.arange(m) < kept)[torch.randperm(m, generator=rng)]
    return keep


def poisoned(x: Tensor, keep: Tensor, rng: Generator) -> Tensor:
    """x with NaN and infinities where nothing is kept."""
    bad = torch.tensor([math.nan, math.inf, -math.inf])
    return torch.where(keep, x, bad[torch.randint(3, x.shape, generator=rng)])


def check_rows(
    backend: CompiledBackend, x: Tensor, keep: Tensor, options: Recipe, rng: Generator
) -> None:
    """All stages on x [N, m], against the reference in float64 and against rows without the absent."""
    upstream = poisoned(torch.randn(x.shape, generator=rng), keep, rng)
    x = poisoned(x, keep, rng)
    hard = backend.hard_rank(x, keep)
    rank, density = backend.soft_rank(x, options, True, keep)
    grad = backend.soft_rank_backward(upstream, x, density, options, keep)
    plain, nothing = backend.soft_rank(x, options, False, keep)
    assert torch.equal(plain, rank) and nothing.numel() == 0
    for result in (hard, rank, density, grad):
        assert (result[~keep] == 0).all()
    assert_near("hard rank", hard, reference.hard_rank(x.double(), keep=keep), 2 * tolerances.U)
    leaf = own_leaf(x.double())
    form = options.temperature, options.relaxation, options.scale
    wanted = reference.soft_rank(leaf, *form, keep=keep)
    assert_near("rank", rank, wanted.detach(), tolerances.RANK)
    wanted.backward(torch.where(keep, upstream, 0).double())
    assert leaf.grad is not None
    for i, there in enumerate(keep):
        alone, incoming = x[i, there][None], upstream[i, there][None]
        if alone.numel() < 2:
            assert (rank[i, there] == 0.5).all() and (hard[i, there] == 0.5).all()
            assert (grad[i] == 0).all()
            continue
        if backend.name == "cpu":  # cuda may go another way in a shorter row, with less room
            own, own_density = backend.soft_rank(alone, options, True)
            own_grad = backend.soft_rank_backward(incoming, alone, own_density, options)
            assert torch.equal(rank[i, there], own[0])
            assert torch.equal(grad[i, there], own_grad[0])
        assert torch.equal(hard[i, there], backend.hard_rank(alone)[0])
        exact = truth.soft_rank(alone, incoming, *form)
        allowed = tolerances.GRAD * exact.grad.norm(dim=1)
        allowed += tolerances.rounding(torch.float32) * exact.magnitude.norm(dim=1)
        allowed += tolerances.subnormal_floor(torch.float32, alone.shape[1])
        assert_norm_near("gradient", grad[i, there][None], exact.grad, allowed)
        near = torch.allclose(leaf.grad[i, there], exact.grad[0], rtol=1e-6, atol=1e-9)
        assert near or form[0] < 0.1, "the reference has another gradient"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 33, 97])
def test_lengths(
    backend: CompiledBackend, m: int, relaxation: str, scale: str | None, rng: Generator
) -> None:
    for temperature in TEMPERATURES:
        options = Recipe(relaxation=relaxation, temperature=temperature, scale=scale)
        x = torch.randn(6, m, generator=rng)
        check_rows(backend, x, masks(rng, 6, m), options, rng)


@pytest.mark.parametrize("name", ["integers", "all equal", "outlier of 1e3", "two far clumps"])
def test_hostile_rows(backend: CompiledBackend, name: str, rng: Generator) -> None:
    assert name in ROWS
    x = make_rows(name, rng, 5, 67)
    for relaxation in RELAXATIONS:
        for scale in SCALES:
            options = Recipe(relaxation=relaxation, scale=scale)
            check_rows(backend, x, masks(rng, 5, 67), options, rng)


def test_a_mask_that_keeps_all_changes_nothing(backend: CompiledBackend, rng: Generator) -> None:
    x, upstream = torch.randn(2, 4, 130, generator=rng)
    options = Recipe()
    results = []
    for keep in (None, torch.ones(4, 130, dtype=torch.bool)):
        rank, density = backend.soft_rank(x, options, True, keep)
        grad = backend.soft_rank_backward(upstream, x, density, options, keep)
        results.append((backend.hard_rank(x, keep), rank, density, grad))
    for without, with_mask in zip(*results, strict=True):
        assert torch.equal(without, with_mask)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_count_where_they_are_kept(
    backend: CompiledBackend, bad: float, rng: Generator
) -> None:
    x, keep = torch.randn(3, 12, generator=rng), torch.rand(3, 12, generator=rng) < 0.7
    keep[:, 4] = torch.tensor([True, False, True])
    x[0, 4] = x[1, 4] = bad
    keep[2] = torch.arange(12) == 4  # alone
    x[2, 4] = bad
    options = Recipe()
    hard = backend.hard_rank(x, keep)
    rank, density = backend.soft_rank(x, options, True, keep)
    grad = backend.soft_rank_backward(torch.ones_like(x), x, density, options, keep)
    assert rank[0][keep[0]].isnan().all() and grad[0][keep[0]].isnan().all()
    assert rank[2, 4].isnan() and hard[2, 4].isnan() == math.isnan(bad)
    assert hard[0][keep[0]].isnan().all() == math.isnan(bad)
    assert math.isnan(bad) or (hard[0, 4] == 1 and hard[2, 4] == 0.5)
    for result in (hard, rank, density, grad):
        assert (result[~keep] == 0).all() and result[1].isfinite().all()


@pytest.mark.skipif(NO_EXTENSION is not None, reason=str(NO_EXTENSION))
def test_masks_are_checked() -> None:
    hard_rank, x = torch.ops.pc_kernels.cpu_hard_rank, torch.rand(3, 4)
    for keep in (torch.ones(3, 4), torch.ones(4, 3).bool(), torch.ones(4, 3).bool().T):
        with pytest.raises(ValueError, match="keep must"):
            hard_rank(x, keep)
