"""Features brought near the origin, in three kernels: what dissimilarities/row_maker.py says in PyTorch.

Nothing waits for the device: what has to be looked at is looked at there.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(x_ptr, first, count, column, width, ROWS: tl.constexpr):
    """Rows first … of x [count, width] at these columns [ROWS, COLUMNS], and which of them are there."""
    row = first + tl.arange(0, ROWS)
    inside = (row < count)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    return tl.load(x_ptr + place, mask=inside, other=0.0), inside


@triton.jit
def whole_in_parts(x, PARTS: tl.constexpr):
    """Whether x is the sum of so many parts of bfloat16 (products.py); 0 parts: of as many as needed."""
    rest = x
    for _ in tl.static_range(PARTS):
        rest = rest - rest.to(tl.bfloat16).to(tl.float32)
    return (rest == 0) | (PARTS == 0)


@triton.jit
def lossy(x_ptr, count, column, width, shift, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """Of each column whether the shift costs a digit of some point [COLUMNS]."""
    bad = tl.zeros((ROWS, column.shape[0]), tl.int32)
    for first in range(0, count, ROWS):
        x, inside = tile_of(x_ptr, first, count, column, width, ROWS)
        moved = x - shift[None, :]
        exact = (moved + shift[None, :] == x) & whole_in_parts(moved, PARTS)
        bad |= (inside & ~exact).to(tl.int32)
    return tl.max(bad, 0) > 0


@triton.jit
def shift_kernel(
    anchors_ptr,
    references_ptr,
    shift_ptr,
    anchors,
    references,
    width,
    SHARED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Shift [width] <- each feature's mean, to a power of two's multiple, where that costs no digit."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, references, ROWS):
        x, _ = tile_of(references_ptr, first, references, column, width, ROWS)
        total += x
    mean = tl.sum(total, 0) / references
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, references, ROWS):
        x, inside = tile_of(references_ptr, first, references, column, width, ROWS)
        deviation = tl.where(inside, x - mean[None, :], 0.0)
        squares += deviation * deviation
    deviation = tl.sqrt(tl.sum(squares, 0) / references)
    # Twice the least power of two that is not below it, by the bits of its exponent.
    exponent = (deviation.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    quantum = ((exponent + 1) << 23).to(tl.float32, bitcast=True)
    shift = tl.where(deviation > 0, tl.floor(mean / quantum + 0.5) * quantum, mean)
    shift = tl.where(shift - shift == 0, shift, 0.0)  # neither NaN nor infinite
    bad = lossy(references_ptr, references, column, width, shift, PARTS, ROWS)
    if not SHARED:
        bad |= lossy(anchors_ptr, anchors, column, width, shift, PARTS, ROWS)
    tl.store(shift_ptr + column, tl.where(bad, 0.0, shift), mask=column < width)


@triton.jit
def move_kernel(x_ptr, shift_ptr, moved_ptr, squares_ptr, count, width, COLUMNS: tl.constexpr):
    """Moved <- x − shift, squares [count] <- their squared norms; a program a row."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * width
    squares = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < width
        x = tl.load(x_ptr + start + column, mask=inside, other=0.0)
        moved = x - tl.load(shift_ptr + column, mask=inside, other=0.0)
        tl.store(moved_ptr + start + column, moved, mask=inside)
        squares += moved * moved
    tl.store(squares_ptr + row, tl.sum(squares, 0))


DIGITS = tl.constexpr(256)


@triton.jit
def median_bits(x_ptr, count, BLOCK: tl.constexpr):
    """The bits of the lower median of x [count], none of it negative or NaN: a digit of 8 bits a round.

    Such floats are in the order of their bits.
    """
    rank = (count - 1) // 2
    found = 0
    bin = tl.arange(0, 2 * DIGITS)  # those past the digits count what is out of the question
    for round in range(4):
        low = 24 - 8 * round
        counts = tl.zeros((2 * DIGITS,), tl.int32)
        for first in range(0, count, BLOCK):
            place = first + tl.arange(0, BLOCK)
            bits = tl.load(x_ptr + place, mask=place < count, other=0.0).to(tl.int32, bitcast=True)
            # Above the first digit there is the sign alone, which is 0 as `found` is.
            asked = (place < count) & ((bits >> tl.minimum(low + 8, 31)) == found)
            own = tl.where(asked, (bits >> low) & (DIGITS - 1), DIGITS)
            counts += tl.histogram(own, 2 * DIGITS)
        digit = tl.sum(((tl.cumsum(counts, 0) <= rank) & (bin < DIGITS)).to(tl.int32), 0)
        rank -= tl.sum(tl.where(bin < digit, counts, 0), 0)
        found = (found << 8) | digit
    return found


@triton.jit
def offsets_kernel(
    anchor_sq_ptr, reference_sq_ptr, offsets_ptr, anchors, references, far, BLOCK: tl.constexpr
):
    """Offsets [anchors] <- |a| where |a|² is `far` times the median of the references', else 0."""
    undefined = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, references, BLOCK):
        place = first + tl.arange(0, BLOCK)
        squares = tl.load(reference_sq_ptr + place, mask=place < references, other=0.0)
        undefined |= (squares != squares).to(tl.int32)
    bits = median_bits(reference_sq_ptr, references, BLOCK)
    threshold = far * bits.to(tl.float32, bitcast=True)
    threshold = tl.where(tl.max(undefined, 0) > 0, float("inf"), threshold)
    for first in range(0, anchors, BLOCK):
        place = first + tl.arange(0, BLOCK)
        squares = tl.load(anchor_sq_ptr + place, mask=place < anchors, other=0.0)
        offset = tl.where(squares > threshold, tl.sqrt_rn(squares), 0.0)
        tl.store(offsets_ptr + place, offset, mask=place < anchors)
