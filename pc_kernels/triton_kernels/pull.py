"""Gradients of points from V, Σ_j v_ij (x_i − y_j), after the product of matrices.

Nothing waits for the device: which rows have cancelled, the kernel sees (docs/method.md, "Distances").
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .points import inverse_of


@triton.jit
def tile_of(v_ptr, i, j, inside, stride, TURNED: tl.constexpr):
    """V at rows i [ROWS, 1] and columns j [1, COLUMNS]; TURNED: what is in memory is its transpose."""
    place = j.to(tl.int64) * stride + i if TURNED else i.to(tl.int64) * stride + j
    return tl.load(v_ptr + place, mask=inside, other=0.0)


class Pull(NamedTuple):
    """Pointers to weights, points and what is pulled; their sizes, and 1 over the unit."""

    pulled: tl.tensor
    v: tl.tensor
    x: tl.tensor
    y: tl.tensor
    count: tl.tensor
    width: tl.tensor
    stride: tl.tensor
    """Of the rows of v in memory."""
    inverse: tl.tensor
    TURNED: tl.constexpr


@triton.jit
def pull_by_differences(pull, i, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pulled_i <- Σ_j v_ij (x_i − y_j) over the unit, from the differences."""
    start = tl.cast(i, tl.int64) * pull.width
    for first in range(0, pull.width, COLUMNS):
        k = first + tl.arange(0, COLUMNS)[None, :]
        x = tl.load(pull.x + start + k, mask=k < pull.width, other=0.0)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for row in range(0, pull.count, ROWS):
            j = row + tl.arange(0, ROWS)[:, None]
            v = tile_of(pull.v, i, j, j < pull.count, pull.stride, pull.TURNED)
            inside = (j < pull.count) & (k < pull.width)
            y = tl.load(pull.y + j.to(tl.int64) * pull.width + k, mask=inside, other=0.0)
            total += v * (x - y)
        pulled = tl.sum(total, 0, keep_dims=True) * pull.inverse
        tl.store(pull.pulled + start + k, pulled, mask=k < pull.width)


@triton.jit
def pull_kernel(
    pulled_ptr,
    v_ptr,
    x_ptr,
    y_ptr,
    unit_ptr,
    rows,
    count,
    width,
    stride,
    cancelled,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Pulled [rows, width] <- Σ_j v_ij (x_i − y_j) over the unit, of the product that is there.

    Where that is smaller than `cancelled` times |v_i| |x_i|, from the differences.
    """
    first_row = tl.program_id(0) * ROWS
    own = tl.arange(0, ROWS)[:, None]
    i = first_row + own
    lane = tl.arange(0, COLUMNS)[None, :]
    inverse = inverse_of(tl.load(unit_ptr))
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, COLUMNS):
        j = first + lane
        v = tile_of(v_ptr, i, j, (i < rows) & (j < count), stride, TURNED)
        total += v
        squares += v * v
    weight = tl.sum(total, 1, keep_dims=True)
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    sizes = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, width, COLUMNS):
        k = first + lane
        place, inside = i.to(tl.int64) * width + k, (i < rows) & (k < width)
        x = tl.load(x_ptr + place, mask=inside, other=0.0)
        pulled = weight * x - tl.load(pulled_ptr + place, mask=inside, other=0.0)
        tl.store(pulled_ptr + place, pulled * inverse, mask=inside)
        found += pulled * pulled
        sizes += x * x
    terms = tl.sum(squares, 1, keep_dims=True) * tl.sum(sizes, 1, keep_dims=True)
    lost = (tl.sum(found, 1, keep_dims=True) < cancelled * cancelled * terms).to(tl.int32)
    if tl.max(tl.max(lost, 1), 0) > 0:
        tl.debug_barrier()  # all threads have stored what is now overwritten
        for r in range(ROWS):
            if tl.max(tl.max(tl.where(own == r, lost, 0), 1), 0) > 0:
                pull_by_differences(
                    Pull(pulled_ptr, v_ptr, x_ptr, y_ptr, count, width, stride, inverse, TURNED),
                    first_row + r,
                    ROWS,
                    COLUMNS,
                )
