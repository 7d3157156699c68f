"""Points over their norms and back, and under a mask: what dissimilarities/row_maker.py says."""

import triton
import triton.language as tl

from .points import tile_of


@triton.jit
def normalized_kernel(
    x_ptr, y_ptr, inverse_ptr, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Y <- x/|x| of points [count, width], inverse [count] <- 1/|x| in float64; 0 where x is."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS, COLUMNS), tl.float64)
    for start in range(0, width, COLUMNS):
        x, _ = tile_of(x_ptr, first, count, start + tl.arange(0, COLUMNS), width, ROWS)
        squares += x.to(tl.float64) * x.to(tl.float64)
    square = tl.sum(squares, 1)
    inverse = tl.where(square == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(square == 0.0, 1.0, square)))
    tl.store(inverse_ptr + row, inverse, mask=row < count)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x, inside = tile_of(x_ptr, first, count, column, width, ROWS)
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        y = (x.to(tl.float64) * inverse[:, None]).to(tl.float32)
        tl.store(y_ptr + place, y, mask=inside)


@triton.jit
def normalized_backward_kernel(
    grad_ptr, y_ptr, inverse_ptr, to_x_ptr, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """To_x <- the gradient in x of the gradient in y = x/|x|, points [count, width]."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    along = tl.zeros((ROWS, COLUMNS), tl.float64)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        grad, _ = tile_of(grad_ptr, first, count, column, width, ROWS)
        y, _ = tile_of(y_ptr, first, count, column, width, ROWS)
        along += grad.to(tl.float64) * y.to(tl.float64)
    factor = tl.load(inverse_ptr + row, mask=row < count, other=0.0)[:, None]
    back = tl.sum(along, 1)[:, None] * factor
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        grad, inside = tile_of(grad_ptr, first, count, column, width, ROWS)
        y, _ = tile_of(y_ptr, first, count, column, width, ROWS)
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        to_x = (grad.to(tl.float64) * factor - y.to(tl.float64) * back).to(tl.float32)
        tl.store(to_x_ptr + place, to_x, mask=inside)


@triton.jit
def quarantine_kernel(
    x_ptr, finite_ptr, poison_ptr, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Finite <- points [count, width], 0 where one is not finite; poison [count] <- NaN there, else 0."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    unfit = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, width, COLUMNS):
        x, _ = tile_of(x_ptr, first, count, start + tl.arange(0, COLUMNS), width, ROWS)
        unfit |= (x - x != 0.0).to(tl.int32)
    bad = tl.max(unfit, 1) > 0
    tl.store(poison_ptr + row, tl.where(bad, float("nan"), 0.0), mask=row < count)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x, inside = tile_of(x_ptr, first, count, column, width, ROWS)
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(finite_ptr + place, tl.where(bad[:, None], 0.0, x), mask=inside)
