"""Rows whose range is large against the temperature: crowds and isolated values side by side."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from compare import FAST_BACKENDS, RELAXATIONS, check_matrices, check_soft_rank
from torch import Generator, Tensor

import pc_kernels


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """Where others compute as well, threads wait for each other."""
    threads(1)


Maker = Callable[[Generator, int], Tensor]


def uniform(rng: Generator, m: int) -> Tensor:
    return torch.rand(m, generator=rng, dtype=torch.float64)


def clump_and_isolated(rng: Generator, m: int) -> Tensor:
    crowd = m * 7 // 8
    return torch.cat([uniform(rng, crowd), 40.0 * torch.arange(1, m - crowd + 1)])


def log_uniform(rng: Generator, m: int) -> Tensor:
    return 10 ** (12 * uniform(rng, m) - 3)


def hierarchy(rng: Generator, m: int) -> Tensor:
    """Clumps of clumps: at every scale a third of the values is moved by about it."""
    x = torch.zeros(m, dtype=torch.float64)
    for level in range(1, 13):
        x += (uniform(rng, m) < 0.3) * 3.0**level * (1 + uniform(rng, m) / 10)
    return x


def densities(rng: Generator, m: int) -> Tensor:
    """Clumps of halving sizes, with isolated values in between that some of them see."""
    parts, place, size = [], 0.0, m // 2
    while size > 0:
        parts += [place + 10 * uniform(rng, size), place + 20 + 16.9 * torch.arange(size // 2)]
        place, size = place + 60 + 17 * size, size // 2
    far = 1e5 + 100.0 * torch.arange(m)
    return torch.cat([*parts, far])[:m]


def around_the_threshold(rng: Generator, m: int) -> Tensor:
    """Clumps that are just small enough for pairs or large enough for a grid, seen by few others."""
    sizes = torch.randint(38, 44, (m // 40 + 1,), generator=rng)
    parts = [
        torch.cat([100.0 * i + uniform(rng, int(size)), 100.0 * i + torch.tensor([17.5, 34.0])])
        for i, size in enumerate(sizes)
    ]
    far = 1e6 + 60.0 * torch.arange(m // 4)
    return torch.cat([far, *parts])[:m]


def ties_and_isolated(rng: Generator, m: int) -> Tensor:
    return torch.cat([torch.zeros(m // 2), 17.5 * torch.arange(m - m // 2)])


ROWS: dict[str, Maker] = {
    "a clump and isolated values": clump_and_isolated,
    "log-uniform": log_uniform,
    "clumps of clumps": hierarchy,
    "clumps of several densities": densities,
    "around the threshold": around_the_threshold,
    "ties and isolated values": ties_and_isolated,
}


def make(name: str, rng: Generator, count: int, m: int) -> Tensor:
    rows = [ROWS[name](rng, m)[torch.randperm(m, generator=rng)] for _ in range(count)]
    return torch.stack(rows).float()


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_ranks(backend: str, name: str, relaxation: str, rng: Generator) -> None:
    """At the temperature that the rows are made for, and at others."""
    x = make(name, rng, 2, 400)
    for temperature in (1.0, 0.05, 30.0):
        check_soft_rank(backend, x, rng, temperature=temperature, relaxation=relaxation, scale=None)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_losses(backend: str, name: str, rng: Generator) -> None:
    """With normal rows beside them, and a mask."""
    d_s = torch.cat([torch.randn(2, 150, generator=rng), make(name, rng, 2, 150)])
    d_t = torch.randn(4, 150, generator=rng)
    for pair_mask in (None, torch.rand(4, 150, generator=rng) < 0.7):
        check_matrices(backend, d_s, d_t, rng, pair_mask=pair_mask, temperature=1.0, scale=None)


def seconds(backend: str, x: Tensor, relaxation: str = "logistic", runs: int = 1) -> float:
    """The shortest of some runs, forward and backward."""
    best = torch.inf
    for _ in range(runs):
        leaf = x.clone().requires_grad_()
        start = time.perf_counter()
        rank = pc_kernels.soft_rank(leaf, 1.0, relaxation, backend=backend)
        rank.backward(torch.ones_like(rank))
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.clean_memory
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_long_rows_take_no_longer(backend: str, name: str, relaxation: str, rng: Generator) -> None:
    """A row of 30,000 takes milliseconds, in `torch` tenths of a second; over all pairs, a minute."""
    x = make(name, rng, 1, 30_000)
    assert seconds(backend, x, relaxation) < (0.5 if backend == "cpu" else 3.0)


@pytest.mark.clean_memory
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_one_such_row_does_not_slow_the_others(backend: str, name: str, rng: Generator) -> None:
    """Three times a normal batch at most, and what a loaded machine adds; it was a hundred times."""
    normal = 10 * torch.randn(60, 1000, generator=rng)
    mixed = normal.clone()
    mixed[7] = make(name, rng, 1, 1000)
    mixed[8] = 2 * torch.arange(1000)  # on a grid of 8 cells a point
    seconds(backend, normal[:2])
    assert seconds(backend, mixed, runs=3) <= 3 * seconds(backend, normal, runs=3) + 0.05
