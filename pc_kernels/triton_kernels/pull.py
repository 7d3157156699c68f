"""Gradients of points from V, Σ_j v_ij (x_i − y_j), beside the product of matrices: before and after it.

Nothing waits for the device: which rows have cancelled, the kernel sees (docs/method.md, "Distances").
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(v_ptr, i, j, inside, stride, TURNED: tl.constexpr):
    """V at rows i [ROWS, 1] and columns j [1, COLUMNS]; TURNED: what is in memory is its transpose."""
    place = j.to(tl.int64) * stride + i if TURNED else i.to(tl.int64) * stride + j
    return tl.load(v_ptr + place, mask=inside, other=0.0)


@triton.jit
def weigh_kernel(
    v_ptr,
    x_ptr,
    target_ptr,
    squares_ptr,
    rows,
    count,
    width,
    stride,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Target [rows, width] <- x_i Σ_j v_ij, squares [rows] <- Σ_j v_ij²; a program ROWS of them."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, COLUMNS):
        j = first + lane
        v = tile_of(v_ptr, i, j, (i < rows) & (j < count), stride, TURNED)
        total += v
        squares += v * v
    weight = tl.sum(total, 1, keep_dims=True)
    tl.store(squares_ptr + i, tl.sum(squares, 1, keep_dims=True), mask=i < rows)
    for first in range(0, width, COLUMNS):
        k = first + lane
        place, inside = i.to(tl.int64) * width + k, (i < rows) & (k < width)
        x = tl.load(x_ptr + place, mask=inside, other=0.0)
        tl.store(target_ptr + place, weight * x, mask=inside)


@triton.jit
def squared_norm(x_ptr, width, COLUMNS: tl.constexpr):
    """|x|² of a vector in memory."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, width, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + k, mask=k < width, other=0.0)
        total += x * x
    return tl.sum(total, 0)


@triton.jit
def mend_kernel(
    grad_ptr,
    squares_ptr,
    v_ptr,
    x_ptr,
    y_ptr,
    count,
    width,
    stride,
    cancelled,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grad_i <- Σ_j v_ij (x_i − y_j) from the differences, where |grad_i| < cancelled · |v_i| |x_i|.

    A program is a row.
    """
    i = tl.program_id(0)
    start = tl.cast(i, tl.int64) * width
    terms = tl.load(squares_ptr + i) * squared_norm(x_ptr + start, width, COLUMNS)
    found = squared_norm(grad_ptr + start, width, COLUMNS)
    tl.debug_barrier()  # all threads have read what is now overwritten
    if found < cancelled * cancelled * terms:
        for first in range(0, width, COLUMNS):
            k = first + tl.arange(0, COLUMNS)[None, :]
            x = tl.load(x_ptr + start + k, mask=k < width, other=0.0)
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for row in range(0, count, ROWS):
                j = row + tl.arange(0, ROWS)[:, None]
                v = tile_of(v_ptr, i, j, j < count, stride, TURNED)
                place, inside = j.to(tl.int64) * width + k, (j < count) & (k < width)
                total += v * (x - tl.load(y_ptr + place, mask=inside, other=0.0))
            pulled = tl.sum(total, 0, keep_dims=True)
            tl.store(grad_ptr + start + k, pulled, mask=k < width)
