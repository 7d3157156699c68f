# mypy: ignore-errors
"""A row of values, and which of them count."""

from typing import NamedTuple

import triton
import triton.language as tl

SPECIALIZATION = {"do_not_specialize": ("self_start", "rows", "all_rows", "channels")}
"""One kernel serves any number of rows: the last chunk of a batch compiles nothing."""


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
    """What an `Extent` is made of, lane by lane: a block of threads sums it once, when a row ends."""

    number: tl.tensor
    total: tl.tensor
    low: tl.tensor
    high: tl.tensor


class Extent(NamedTuple):
    """Of the values that count: how many, their sum in float64 and their range."""

    number: tl.tensor
    total: tl.tensor
    """Not finite if one of them is not: finite float32 numbers have a float64 sum."""
    low: tl.tensor
    high: tl.tensor


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
    inf = tl.full([BLOCK], float("inf"), tl.float32)
    return Tally(tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float64), inf, -inf)


@triton.jit
def tallied(tally, x, valid):
    """The `Tally` with a block of values more."""
    return Tally(
        tally.number + valid.to(tl.int32),
        tally.total + tl.where(valid, x, 0.0).to(tl.float64),
        tl.minimum(tally.low, tl.where(valid, x, float("inf"))),
        tl.maximum(tally.high, tl.where(valid, x, float("-inf"))),
    )


@triton.jit
def extent_of(tally):
    """The `Extent` of what was tallied."""
    return Extent(
        tl.sum(tally.number, axis=0),
        tl.sum(tally.total, axis=0),
        tl.min(tally.low, axis=0),
        tl.max(tally.high, axis=0),
    )


@triton.jit
def finite(x):
    """Neither NaN nor infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def store_undefined(ptr, row, BLOCK: tl.constexpr):
    """NaN where something counts, else 0."""
    for first in range(0, row.count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        undefined = tl.where(counted(j, row), float("nan"), 0.0)
        tl.store(ptr + j, undefined, mask=j < row.count)
