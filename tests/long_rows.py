"""Long rows that bring most of their values into one bucket, and what they make the Triton kernels do.

`triton_interpreted.py` holds that these numbers are so, `test_triton.py` that they cost no more than they
may, and `kernel_counts.py` makes the table of docs/gpu.md of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

LENGTH = 131072
OUTLIER = 1e9


@dataclass(frozen=True)
class Work:
    """What the loops of a row's kernels depend on, beside its length."""

    splits: int = 0
    """Times that crowded buckets are split; -1: there are no buckets, since all values are equal."""
    fullest: int = 0
    """Values in the fullest bucket that is then left, unless they are all alike."""
    cells: int = 300
    """Of the grid, at a temperature of 0.1."""


@dataclass(frozen=True)
class LongRow:
    """How such a row is made, and the most work that it is."""

    make: Callable[[Generator, int], Tensor]
    work: Work


def distances(rng: Generator, m: int) -> Tensor:
    """Squared distances of normal points from one."""
    x = torch.randn(m + 1, 16, generator=rng)
    return (x[1:] - x[0]).square().sum(1)


def two_values(rng: Generator, m: int) -> Tensor:
    return torch.randint(2, (m,), generator=rng).float()


def normal(rng: Generator, m: int) -> Tensor:
    return torch.randn(m, generator=rng)


def and_an_outlier(make: Callable[[Generator, int], Tensor]) -> Callable[[Generator, int], Tensor]:
    """Rows of which one value stretches the range, so that all others share a bucket."""

    def made(rng: Generator, m: int) -> Tensor:
        x = make(rng, m)
        x[torch.randint(m, (1,), generator=rng)] = OUTLIER
        return x

    return made


FAR = 14_500
"""Cells of a row with an outlier: it is √m standard deviations away."""

MOST_SPLITS = 9
"""Each divides the range of a crowd, 2³² at first, by 16 or more; the last sees that all are alike."""

LONG_ROWS = {
    "everyday": LongRow(distances, Work(0, 8, 300)),  # at least: the others are compared with it
    "all equal": LongRow(lambda rng, m: torch.full((m,), 0.3), Work(-1, 0, 2)),
    "two values": LongRow(two_values, Work(1, 0, 84)),
    "one outlier": LongRow(and_an_outlier(distances), Work(1, 16, FAR)),
    "one outlier, values around 0": LongRow(and_an_outlier(normal), Work(2, 16, FAR)),
    "two values and an outlier": LongRow(and_an_outlier(two_values), Work(2, 1, FAR)),
}
