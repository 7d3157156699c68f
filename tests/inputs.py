"""Rows of dissimilarities and features that make trouble, by name; all float32, all fresh."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

Maker = Callable[[Generator, int], Tensor]


def _normal(rng: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng)


def _integers(rng: Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=rng).float()


def _outlier(size: float) -> Maker:
    def make(rng: Generator, m: int) -> Tensor:
        x = _normal(rng, m)
        x[torch.randint(m, (1,), generator=rng)] = size
        return x

    return make


def _few_values(rng: Generator, m: int) -> Tensor:
    values = 5 * torch.rand(3, generator=rng)
    return values[torch.randint(3, (m,), generator=rng)]


def _nearly_all_equal(rng: Generator, m: int) -> Tensor:
    x = torch.full((m,), 0.3)
    x[: min(m, 5)] = torch.rand(min(m, 5), generator=rng)
    return x


def _clumps(rng: Generator, m: int, spread: float) -> Tensor:
    return spread * _normal(rng, m) + 1e4 * _integers(rng, 0, 2, m)


def _signed_zeros(rng: Generator, m: int) -> Tensor:
    return _integers(rng, -1, 2, m) * torch.where(_normal(rng, m) > 0, 1.0, -0.0)


def _steps_and_spread(rng: Generator, m: int) -> Tensor:
    """Two clumps 1 apart and, for the rest, values so sparse that no grid fits at temperature 1."""
    quarter = m // 4
    parts = [torch.zeros(quarter), torch.ones(quarter), 40.0 * torch.arange(1, m - 2 * quarter + 1)]
    return torch.cat(parts)[torch.randperm(m, generator=rng)]


def _lopsided(rng: Generator, m: int) -> Tensor:
    """Finite, but the difference of its largest value and its mean is not, in float32."""
    x = -3.4e38 + 1e33 * torch.rand(m, generator=rng)
    x[torch.randint(m, (1,), generator=rng)] = 3.4e38
    return x


ROWS: dict[str, Maker] = {
    "normal": _normal,
    "uniform": lambda rng, m: torch.rand(m, generator=rng),
    "far from zero": lambda rng, m: 1000 + _normal(rng, m),
    "far from zero, a few steps apart": lambda rng, m: 1e6 + 0.0625 * _integers(rng, 0, 9, m),
    "integers": lambda rng, m: _integers(rng, 0, 10, m),
    "three values": _few_values,
    "nearly all equal": _nearly_all_equal,
    "all equal": lambda rng, m: torch.full((m,), 0.3),
    "signed zeros": _signed_zeros,
    "outlier of 1e3": _outlier(1e3),
    "outlier of -1e9": _outlier(-1e9),
    "two far clumps": lambda rng, m: _clumps(rng, m, 1.0),
    "two far tight clumps": lambda rng, m: _clumps(rng, m, 1e-3),
    "clumps and sparse values": _steps_and_spread,
    "powers of two": lambda rng, m: 2.0 ** torch.linspace(-60, 60, m),
    "heavy tails": lambda rng, m: _normal(rng, m) / _normal(rng, m),
    "ascending": lambda rng, m: _normal(rng, m).sort().values,
    "descending": lambda rng, m: _normal(rng, m).sort(descending=True).values,
    "times 1e30": lambda rng, m: 1e30 * _normal(rng, m),
    "times 1e-30": lambda rng, m: 1e-30 * _normal(rng, m),
    "up to the largest number": lambda rng, m: 3e38 * (2 * torch.rand(m, generator=rng) - 1),
    "lopsided and huge": _lopsided,
}

BEYOND_PLAIN_FLOAT32 = (
    "far from zero",
    "far from zero, a few steps apart",
    "times 1e30",
    "times 1e-30",
    "up to the largest number",
    "lopsided and huge",
)
"""Rows whose mean or variance, computed as written in float32, is no good."""


def make_rows(name: str, rng: Generator, count: int, m: int) -> Tensor:
    """[count, m] of one kind."""
    return torch.stack([ROWS[name](rng, m) for _ in range(count)])


def quantised(rng: Generator, rows: int, width: int) -> Tensor:
    """Features in [-4, 4] whose distances are exact in float32 (and full of ties): multiples of 1/8."""
    return _integers(rng, -32, 33, rows, width) / 8


def tight_clusters(rng: Generator, rows: int, width: int) -> Tensor:
    """Four clusters ten thousand times narrower than they are apart, in turn."""
    centres = 10 * _normal(rng, 4, width)
    return centres[torch.arange(rows) % 4] + 1e-3 * _normal(rng, rows, width)


def near_duplicates(rng: Generator, rows: int, width: int) -> Tensor:
    """Every row twice, up to 1e-5."""
    x = _normal(rng, (rows + 1) // 2, width).repeat(2, 1)[:rows]
    return x + 1e-5 * _normal(rng, rows, width)


def one_far_outlier(rng: Generator, rows: int, width: int) -> Tensor:
    """A row a thousand times as far as the others."""
    x = _normal(rng, rows, width)
    x[torch.randint(rows, (1,), generator=rng)] *= 1000
    return x


def shifted(rng: Generator, rows: int, width: int) -> Tensor:
    """All rows around (1000, ..., 1000)."""
    return 1000 + _normal(rng, rows, width)


def small_clump_at_home(rng: Generator, rows: int, width: int) -> Tensor:
    """Most rows together far from the origin, the others close to it and to each other."""
    x = 1e-4 * _normal(rng, rows, width)
    x[: rows * 9 // 10] += 1e4
    return x


def two_clumps(rng: Generator, rows: int, width: int, far: int, offset: float = 1e3) -> Tensor:
    """Rows close to each other at the origin, and `far` of them close to each other far from it."""
    x = 1e-3 * _normal(rng, rows, width)
    x[:far] += offset
    return x


HOSTILE_FEATURES: dict[str, Callable[[Generator, int, int], Tensor]] = {
    "near-duplicates": near_duplicates,
    "one far outlier": one_far_outlier,
    "shifted by 1000": shifted,
    "tight clusters": tight_clusters,
    "small clump at home": small_clump_at_home,
}


POINTS: dict[str, Maker] = {
    "centred": lambda rng, n: torch.randn(n, 37, generator=rng),
    "far from zero": lambda rng, n: torch.randn(n, 37, generator=rng) + 1000,
    "one constant feature": lambda rng, n: torch.cat(
        [torch.randn(n, 36, generator=rng), torch.full((n, 1), 7.0)], 1
    ),
    "huge": lambda rng, n: torch.randn(n, 37, generator=rng) * 1e30,
    "tiny": lambda rng, n: torch.randn(n, 37, generator=rng) * 1e-30,
    "zero": lambda rng, n: torch.zeros(n, 37),
    "some equal": lambda rng, n: torch.randn(n, 37, generator=rng)[
        torch.randint((n + 2) // 3, (n,), generator=rng)
    ],
    "one far": lambda rng, n: torch.cat(
        [torch.randn(n - 1, 37, generator=rng), torch.full((1, 37), 1e4)]
    ),
    "one NaN": lambda rng, n: torch.randn(n, 37, generator=rng).index_fill_(
        0, torch.tensor([n // 2]), math.nan
    ),
    "one infinity": lambda rng, n: torch.randn(n, 37, generator=rng).index_fill_(
        0, torch.tensor([n // 2]), math.inf
    ),
}
"""Features of n points, by what is hard about bringing them near the origin."""
