# mypy: ignore-errors
"""A row of values, and which of them count."""

from typing import NamedTuple

import triton
import triton.language as tl

class Row(NamedTuple):
    """A row in memory. A value counts unless it is the anchor's own or masked out.

    Bundles with constants are built where they are passed: assigned to a name, Triton makes tensors of
    the constants.
    """

    x: tl.tensor
    """Pointer to the values."""
    count: tl.tensor
    own: tl.tensor
    """The anchor's place among them, or -1."""
    keep: tl.tensor
    """Pointer to the mask, where there is one."""
    HAS_KEEP: tl.constexpr


class Tally(NamedTuple):
    """What the `Extent` is made of, lane by lane: tensors that a block of threads sums once, at the end."""

    number: tl.tensor
    limited: tl.tensor
    total: tl.tensor
    low: tl.tensor
    high: tl.tensor


class Extent(NamedTuple):
    """Of the values that count: how many, the sum and range of those that are no infinities, and flags."""

    number: tl.tensor
    total: tl.tensor
    low: tl.tensor
    high: tl.tensor
    defined: tl.tensor
    """None is NaN."""
    limited: tl.tensor
    """None is an infinity."""


@triton.jit
def counted(j, row):
    """Which of the places j hold a value that counts."""
    valid = (j < row.count) & (j != row.own)
    if row.HAS_KEEP:
        valid = valid & (tl.load(row.keep + j, mask=j < row.count, other=0) != 0)
    return valid


@triton.jit
def present(value, valid, row):
    """The value where one counts, else 0; without a mask all of them, as they are."""
    return tl.where(valid, value, 0.0) if row.HAS_KEEP else value


@triton.jit
def empty_tally(BLOCK: tl.constexpr):
    """The `Tally` of nothing."""
    none = tl.zeros([BLOCK], tl.int32)
    inf = tl.full([BLOCK], float("inf"), tl.float32)
    return Tally(none, none, tl.zeros([BLOCK], tl.float64), inf, -inf)


@triton.jit
def tallied(tally, x, valid):
    """The `Tally` with a block of values more."""
    limited = valid & (tl.abs(x) != float("inf"))
    return Tally(
        tally.number + valid.to(tl.int32),
        tally.limited + limited.to(tl.int32),
        tally.total + tl.where(limited, x, 0.0).to(tl.float64),
        tl.minimum(tally.low, tl.where(limited, x, float("inf"))),
        tl.maximum(tally.high, tl.where(limited, x, float("-inf"))),
    )


@triton.jit
def extent_of(tally):
    """The `Extent` of what was tallied. Finite float32 numbers have a float64 sum: NaN shows in it."""
    number = tl.sum(tally.number, axis=0)
    total = tl.sum(tally.total, axis=0)
    low = tl.min(tally.low, axis=0)
    high = tl.max(tally.high, axis=0)
    limited = tl.sum(tally.limited, axis=0) == number
    return Extent(number, total, low, high, total == total, limited)


@triton.jit
def store_undefined(ptr, row, BLOCK: tl.constexpr):
    """NaN where something counts, else 0."""
    for first in range(0, row.count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        undefined = tl.where(counted(j, row), float("nan"), 0.0)
        tl.store(ptr + j, undefined, mask=j < row.count)
