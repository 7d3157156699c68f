# mypy: ignore-errors
"""A row of values, and which of them count."""

from typing import NamedTuple

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)


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


class Extent(NamedTuple):
    """Of the values that count: how many, their sum and range, and whether all are finite."""

    number: tl.tensor
    total: tl.tensor
    low: tl.tensor
    high: tl.tensor
    fit: tl.tensor


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
def finite(x):
    """Neither NaN nor infinite."""
    return tl.abs(x) <= LARGEST


@triton.jit
def row_range(row, BLOCK: tl.constexpr):
    """The `Extent` of a row."""
    number = tl.full((), 0, tl.int32)
    unfit = tl.full((), 0, tl.int32)
    total = tl.full((), 0.0, tl.float64)
    low = tl.full((), float("inf"), tl.float32)
    high = tl.full((), float("-inf"), tl.float32)
    for first in range(0, row.count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        valid = counted(j, row)
        x = tl.load(row.x + j, mask=valid, other=0.0)
        fit = valid & finite(x)
        number += tl.sum(valid.to(tl.int32), axis=0)
        unfit += tl.sum((valid & (fit == 0)).to(tl.int32), axis=0)
        total += tl.sum(tl.where(fit, x, 0.0).to(tl.float64), axis=0)
        low = tl.minimum(low, tl.min(tl.where(fit, x, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(fit, x, float("-inf")), axis=0))
    return Extent(number, total, low, high, unfit == 0)


@triton.jit
def store_undefined(ptr, row, BLOCK: tl.constexpr):
    """NaN where something counts, else 0."""
    for first in range(0, row.count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        undefined = tl.where(counted(j, row), float("nan"), 0.0)
        tl.store(ptr + j, undefined, mask=j < row.count)
