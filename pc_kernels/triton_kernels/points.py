"""Features brought near the origin, in two kernels: what dissimilarities/row_maker.py says in PyTorch.

Nothing waits for the device: what has to be looked at is looked at there.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .twins import NOBODY, enter, find_twins, hash_of


class PointSet(NamedTuple):
    """Pointers to points [count, width] and what becomes of them; stand-ins for what is not there."""

    x: tl.tensor
    moved: tl.tensor
    squares: tl.tensor
    poison: tl.tensor
    """[count], NaN for points that count as 0, if they are POISONED."""
    count: tl.tensor
    POISONED: tl.constexpr


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
    """Of each column whether the shift costs a digit of some point, and the largest |x| [COLUMNS]."""
    bad = tl.zeros((ROWS, column.shape[0]), tl.int32)
    largest = tl.zeros((ROWS, column.shape[0]), tl.float32)
    for first in range(0, count, ROWS):
        x, inside = tile_of(x_ptr, first, count, column, width, ROWS)
        moved = x - shift[None, :]
        exact = (moved + shift[None, :] == x) & whole_in_parts(moved, PARTS)
        bad |= (inside & ~exact).to(tl.int32)
        largest = tl.maximum(largest, tl.where(x == x, tl.abs(x), float("inf")))
    return tl.max(bad, 0), tl.max(largest, 0)


@triton.jit
def zeros_of(inverse_ptr, count, BLOCK: tl.constexpr):
    """How many of count points of length 1 were zeros."""
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        found += (tl.load(inverse_ptr + i, mask=i < count, other=1.0) == 0.0).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def shift_kernel(
    anchors_ptr,
    references_ptr,
    anchor_inverse_ptr,
    reference_inverse_ptr,
    shift_ptr,
    largest_ptr,
    table_ptr,
    progress_ptr,
    anchors,
    references,
    width,
    room,
    SHARED: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Shift [width] <- each feature's mean, to a power of two's multiple, where that costs no digit.

    Largest <- of the program's features. UNIT: of points of length 1, none of which moves if one was
    zeros. What the next kernel begins with: an empty table, and in `progress` 0 and whether one was.
    """
    program = tl.program_id(0)
    column = program * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for first in range(0, references, ROWS):
        x, _ = tile_of(references_ptr, first, references, column, width, ROWS)
        total += x.to(tl.float64)
    number = tl.maximum(references, 1)
    mean = tl.sum(total, 0) / number
    squares = tl.zeros((ROWS, COLUMNS), tl.float64)
    for first in range(0, references, ROWS):
        x, inside = tile_of(references_ptr, first, references, column, width, ROWS)
        deviation = tl.where(inside, x.to(tl.float64) - mean[None, :], 0.0)
        squares += deviation * deviation
    deviation = tl.sqrt(tl.sum(squares, 0) / number).to(tl.float32)
    mean = mean.to(tl.float32)
    # Twice the least power of two that is not below it, by the bits of its exponent.
    exponent = (deviation.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    quantum = ((exponent + 1) << 23).to(tl.float32, bitcast=True)
    shift = tl.where(deviation > 0, tl.floor(mean / quantum + 0.5) * quantum, mean)
    shift = tl.where(shift - shift == 0, shift, 0.0)  # neither NaN nor infinite
    bad, largest = lossy(references_ptr, references, column, width, shift, PARTS, ROWS)
    if not SHARED:
        also_bad, also = lossy(anchors_ptr, anchors, column, width, shift, PARTS, ROWS)
        bad |= also_bad
        largest = tl.maximum(largest, also)
    BLOCK: tl.constexpr = ROWS * COLUMNS
    zeros = 0
    if UNIT:
        zeros = zeros_of(reference_inverse_ptr, references, BLOCK)
        if not SHARED:
            zeros += zeros_of(anchor_inverse_ptr, anchors, BLOCK)
    tl.store(shift_ptr + column, tl.where((bad > 0) | (zeros > 0), 0.0, shift), mask=column < width)
    tl.store(largest_ptr + program, tl.max(largest, 0))
    if program == 0:
        tl.store(progress_ptr, 0)
        tl.store(progress_ptr + 1, zeros)
    for first in range(program * BLOCK, room + 1, tl.num_programs(0) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(table_ptr + i, tl.full([BLOCK], NOBODY, tl.int64), mask=i < room + 1)


@triton.jit
def unit_of(largest_ptr, tiles, BLOCK: tl.constexpr):
    """A unit 2^k in which the squares of features up to the largest neither over- nor underflow."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tiles, BLOCK):
        i = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(largest_ptr + i, mask=i < tiles, other=0.0))
    largest = tl.max(largest, 0)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 126
    moderate = (exponent > -31) & (exponent < 31) | (largest == 0.0) | (largest == float("inf"))
    power = tl.where(moderate, 0, tl.minimum(exponent, 126))
    return ((power + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_of(unit):
    """1 over a power of two from 2⁻¹²⁶ to 2¹²⁶, by the bits of its exponent."""
    return ((254 << 23) - unit.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def move_tile(
    points,
    first,
    shift_ptr,
    width,
    unit,
    zeros,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Moves ROWS points and stores their squared norms; returns their hashes."""
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    hashes = tl.zeros((ROWS, COLUMNS), tl.int64)
    row = first + tl.arange(0, ROWS)
    inverse = inverse_of(unit)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x, inside = tile_of(points.x, first, points.count, column, width, ROWS)
        shift = tl.load(shift_ptr + column, mask=column < width, other=0.0)
        moved = tl.where(inside, (x - shift[None, :]) * inverse, 0.0)
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(points.moved + place, moved, mask=inside)
        squares += moved * moved
        hashes += tl.where(inside, hash_of(column[None, :], moved), 0)
    square = tl.where(zeros > 0, 1.0, tl.sum(squares, 1))
    if points.POISONED:
        square += tl.load(points.poison + row, mask=row < points.count, other=0.0)
    tl.store(points.squares + row, square, mask=row < points.count)
    return tl.sum(hashes, 1)


DIGITS = tl.constexpr(256)


@triton.jit
def selected_bits(x_ptr, count, rank, BLOCK: tl.constexpr):
    """The bits of the number of given rank among x [count], none negative: a digit of 8 bits a round.

    Such floats are in the order of their bits, and NaN the last.
    """
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
def store_offsets(
    anchor_sq_ptr, reference_sq_ptr, offsets_ptr, anchors, references, far, BLOCK: tl.constexpr
):
    """Offsets [anchors] <- |a| where |a|² is `far` times the median of the references', else 0."""
    defined = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, references, BLOCK):
        place = first + tl.arange(0, BLOCK)
        squares = tl.load(reference_sq_ptr + place, mask=place < references, other=float("nan"))
        defined += (squares == squares).to(tl.int32)
    number = tl.sum(defined, 0)
    bits = selected_bits(reference_sq_ptr, references, (number - 1) // 2, BLOCK)
    threshold = far * bits.to(tl.float32, bitcast=True)
    threshold = tl.where(number > 0, threshold, float("inf"))
    for first in range(0, anchors, BLOCK):
        place = first + tl.arange(0, BLOCK)
        squares = tl.load(anchor_sq_ptr + place, mask=place < anchors, other=0.0)
        offset = tl.where(squares > threshold, tl.sqrt_rn(squares), 0.0)
        tl.store(offsets_ptr + place, offset, mask=place < anchors)


@triton.jit
def move_kernel(
    anchors_ptr,
    anchors_moved_ptr,
    anchor_sq_ptr,
    anchor_poison_ptr,
    references_ptr,
    references_moved_ptr,
    reference_sq_ptr,
    reference_poison_ptr,
    shift_ptr,
    largest_ptr,
    unit_ptr,
    offsets_ptr,
    twins_ptr,
    table_ptr,
    progress_ptr,
    anchors,
    references,
    width,
    tiles,
    room,
    far,
    SHARED: tl.constexpr,
    POISONED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Moves references, then anchors, unless they are SHARED, ROWS of them a program.

    The last program to get here finds who is far, and which references are equal.
    """
    unit = unit_of(largest_ptr, tiles, COLUMNS)
    zeros = tl.load(progress_ptr + 1)
    program = tl.program_id(0)
    of_references = tl.cdiv(references, ROWS)
    if program < of_references:
        first = program * ROWS
        hashes = move_tile(
            PointSet(
                references_ptr,
                references_moved_ptr,
                reference_sq_ptr,
                reference_poison_ptr,
                references,
                POISONED,
            ),
            first,
            shift_ptr,
            width,
            unit,
            zeros,
            ROWS,
            COLUMNS,
        )
        row = first + tl.arange(0, ROWS)
        place = enter(table_ptr, room, row, hashes, row < references)
        tl.store(twins_ptr + row, place, mask=row < references)
    else:
        move_tile(
            PointSet(
                anchors_ptr,
                anchors_moved_ptr,
                anchor_sq_ptr,
                anchor_poison_ptr,
                anchors,
                POISONED,
            ),
            (program - of_references) * ROWS,
            shift_ptr,
            width,
            unit,
            zeros,
            ROWS,
            COLUMNS,
        )
    tl.debug_barrier()  # all of the program's threads have stored what the last one will read
    arrived = tl.atomic_add(progress_ptr, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        tl.store(unit_ptr, unit)
        find_twins(
            twins_ptr, table_ptr, references_moved_ptr, references, width, BLOCK, ROWS, COLUMNS
        )
        store_offsets(anchor_sq_ptr, reference_sq_ptr, offsets_ptr, anchors, references, far, BLOCK)
