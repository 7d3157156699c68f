# mypy: ignore-errors
"""Stages `contrast_columns` and `contrast_rows`: a row of logits, log-sum-exp -> loss -> slope.

The formulas are in backends/contrast_rows.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .row import finite

SOFTMAX, SIGMOID, DISTILLATION = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
CODES = {"softmax": 0, "sigmoid": 1, "distillation": 2}

NONE = tl.constexpr(float("-inf"))
"""In place of a logit that is absent, or of the positive among the negatives."""


class Logits(NamedTuple):
    """A row of logits in memory."""

    z: tl.tensor
    """Pointer to them."""
    count: tl.tensor
    positive: tl.tensor
    """The positive's place; -1: none is special."""
    keep: tl.tensor
    """Pointer to the mask, where there is one."""
    HAS_KEEP: tl.constexpr
    BLOCK: tl.constexpr


class Columns(NamedTuple):
    """What the columns add to slopes: factor_j exp(z_j − shift_j) for the first `count` keys."""

    shift: tl.tensor
    factor: tl.tensor
    own: tl.tensor
    """To the positive's."""
    count: tl.tensor


class Sums(NamedTuple):
    """Of a row's exponentials."""

    top: tl.tensor
    """What was subtracted: the largest logit, 0 if there is none."""
    total: tl.tensor
    fit: tl.tensor
    """Whether all that are there are finite."""


@triton.jit
def is_there(j, row):
    """Which of the places j hold a logit."""
    valid = j < row.count
    if row.HAS_KEEP:
        valid = valid & (tl.load(row.keep + j, mask=valid, other=0) != 0)
    return valid


@triton.jit
def negatives(j, row):
    """The logits at the places j, NONE for the positive and where nothing is."""
    valid = is_there(j, row) & (j != row.positive)
    return tl.load(row.z + j, mask=valid, other=float("-inf"))


@triton.jit
def log1p_unit(e):
    """log(1 + e) for 0 ≤ e ≤ 1: 2 artanh(e/(2 + e))."""
    s = e / (e + 2.0)
    t = s * s
    series = t / 15 + 1.0 / 13
    series = series * t + 1.0 / 11
    series = series * t + 1.0 / 9
    series = series * t + 1.0 / 7
    series = series * t + 1.0 / 5
    series = series * t + 1.0 / 3
    return 2.0 * (s + s * (series * t))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), float64."""
    e = tl.exp(-tl.abs(x))
    small = e - e * e / 2 + e * e * e / 3  # to rounding, below 1e-6
    return tl.maximum(x, 0.0) + tl.where(e < 1e-6, small, tl.log(1.0 + e))


@triton.jit
def softplus_slope(x):
    """Of softplus, float64."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sums_of(row):
    """The `Sums` of a row's negatives."""
    high = tl.full((row.BLOCK,), float("-inf"), tl.float32)
    unfit = tl.full((row.BLOCK,), 0, tl.int32)
    for first in range(0, row.count, row.BLOCK):
        j = first + tl.arange(0, row.BLOCK)
        z = negatives(j, row)
        valid = is_there(j, row) & (j != row.positive)
        unfit = unfit | (valid & (finite(z) == 0)).to(tl.int32)
        high = tl.maximum(high, tl.where(finite(z), z, float("-inf")))
    top = tl.max(high, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.full((row.BLOCK,), 0.0, tl.float64)
    for first in range(0, row.count, row.BLOCK):
        j = first + tl.arange(0, row.BLOCK)
        total += tl.exp(negatives(j, row) - top).to(tl.float64)
    return Sums(top, tl.sum(total, axis=0), tl.max(unfit, axis=0) == 0)


@triton.jit
def store_slopes(j, slope, fit, row):
    """Slopes where something is there, 0 elsewhere; NaN throughout a row that is not finite."""
    slope = tl.where(fit, slope, float("nan"))
    if row.HAS_KEEP:
        slope = tl.where(is_there(j, row), slope, 0.0)
    tl.store(row.z + j, slope, mask=j < row.count)


@triton.jit
def softmax_row(row, positive, weight, columns, HAS_COLUMNS: tl.constexpr, WITH_GRAD: tl.constexpr):
    """The row's loss; WITH_GRAD, the slopes replace it."""
    sums = sums_of(row)
    fit = sums.fit & (positive == positive) & (positive != float("-inf"))
    margin = sums.top.to(tl.float64) - positive + tl.log(sums.total)
    if WITH_GRAD:
        pull = weight.to(tl.float64) * softplus_slope(margin)
        own = -pull.to(tl.float32)
        if HAS_COLUMNS:
            own += columns.own
        rate = tl.where(sums.total > 0.0, pull / tl.maximum(sums.total, 1e-300), 0.0)
        rate = rate.to(tl.float32)
        tl.debug_barrier()
        for first in range(0, row.count, row.BLOCK):
            j = first + tl.arange(0, row.BLOCK)
            z = negatives(j, row)
            slope = tl.exp(z - sums.top) * rate
            if HAS_COLUMNS:
                valid = j < columns.count
                shift = tl.load(columns.shift + j, mask=valid, other=0.0)
                factor = tl.load(columns.factor + j, mask=valid, other=0.0)
                slope += tl.where(valid, tl.exp(z - shift) * factor, 0.0)
            store_slopes(j, tl.where(j == row.positive, own, slope), fit, row)
    return tl.where(fit, softplus(margin), float("nan"))


@triton.jit
def sigmoid_row(row, positive, weight, WITH_GRAD: tl.constexpr):
    """As `softmax_row`."""
    fit = sums_of(row).fit & (positive == positive) & (positive != float("-inf"))
    total = tl.full((row.BLOCK,), 0.0, tl.float64)
    own = (-weight.to(tl.float64) * softplus_slope(-positive)).to(tl.float32)
    tl.debug_barrier()
    for first in range(0, row.count, row.BLOCK):
        j = first + tl.arange(0, row.BLOCK)
        z = negatives(j, row)
        e = tl.exp(-tl.abs(z))
        total += (tl.maximum(z, 0.0) + log1p_unit(e)).to(tl.float64)
        if WITH_GRAD:
            slope = weight * tl.where(z > 0, 1.0, e) / (1.0 + e)
            store_slopes(j, tl.where(j == row.positive, own, slope), fit, row)
    return tl.where(fit, tl.sum(total, axis=0) + softplus(-positive), float("nan"))


@triton.jit
def distillation_row(row, target, weight, WITH_GRAD: tl.constexpr):
    """As `softmax_row`, of a row of the student and one of the teacher."""
    student, teacher = sums_of(row), sums_of(target)
    fit = student.fit & teacher.fit
    ahead = tl.full((row.BLOCK,), 0.0, tl.float64)
    of_student = tl.maximum(student.total, 1.0)
    of_teacher = tl.maximum(teacher.total, 1.0)
    rate = (weight.to(tl.float64) / of_student).to(tl.float32)
    target_rate = (weight.to(tl.float64) / of_teacher).to(tl.float32)
    tl.debug_barrier()
    for first in range(0, row.count, row.BLOCK):
        j = first + tl.arange(0, row.BLOCK)
        z, y = negatives(j, row) - student.top, negatives(j, target) - teacher.top
        t = tl.exp(y)
        ahead += tl.where(t > 0.0, t * (y - z), 0.0).to(tl.float64)
        if WITH_GRAD:
            store_slopes(j, tl.exp(z) * rate - t * target_rate, fit, row)
    loss = tl.sum(ahead, axis=0) / of_teacher + tl.log(of_student / of_teacher)
    return tl.where(fit, tl.maximum(loss, 0.0), float("nan"))


@triton.jit(do_not_specialize=["start", "columns"])
def contrast_rows_kernel(
    values_ptr,
    keep_ptr,
    target_ptr,
    shift_ptr,
    factor_ptr,
    own_ptr,
    weights_ptr,
    losses_ptr,
    count,
    start,
    columns,
    FORM: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of a row a program; WITH_GRAD, the slopes replace the values."""
    i = tl.program_id(0)
    row = tl.cast(i, tl.int64) * count
    weight = tl.load(weights_ptr + i)
    if FORM == DISTILLATION:
        loss = distillation_row(
            Logits(values_ptr + row, count, -1, keep_ptr + row, HAS_KEEP, BLOCK),
            Logits(target_ptr + row, count, -1, keep_ptr + row, HAS_KEEP, BLOCK),
            weight,
            WITH_GRAD,
        )
    else:
        place = start + i
        positive = tl.load(values_ptr + row + place).to(tl.float64)
        positive = tl.where(positive == float("inf"), float("nan"), positive)
        if HAS_KEEP:  # an absent one pulls nothing
            there = tl.load(keep_ptr + row + place) != 0
            positive = tl.where(there, positive, float("inf"))
        if FORM == SIGMOID:
            loss = sigmoid_row(
                Logits(values_ptr + row, count, place, keep_ptr + row, HAS_KEEP, BLOCK),
                positive,
                weight,
                WITH_GRAD,
            )
        else:
            own = tl.load(own_ptr + i)
            loss = softmax_row(
                Logits(values_ptr + row, count, place, keep_ptr + row, HAS_KEEP, BLOCK),
                positive,
                weight,
                Columns(shift_ptr, factor_ptr, own, columns),
                HAS_COLUMNS,
                WITH_GRAD,
            )
    tl.store(losses_ptr + i, loss.to(tl.float32))


@triton.jit(do_not_specialize=["start", "rows", "columns"])
def contrast_columns_kernel(
    values_ptr,
    keep_ptr,
    top_ptr,
    total_ptr,
    positive_ptr,
    rows,
    count,
    start,
    columns,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds rows to the online log-sum-exps of BLOCK columns a program, and notes their positives."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = j < columns
    top = tl.load(top_ptr + j, mask=valid, other=float("-inf"))
    total = tl.load(total_ptr + j, mask=valid, other=0.0)
    positive = tl.load(positive_ptr + j, mask=valid, other=0.0)
    for i in range(rows):
        place = tl.cast(i, tl.int64) * count + j
        there = valid
        if HAS_KEEP:
            there = there & (tl.load(keep_ptr + place, mask=valid, other=0) != 0)
        z = tl.load(values_ptr + place, mask=there, other=float("-inf"))
        own = j == start + i
        positive = tl.where(own, tl.where(there, z, float("inf")).to(tl.float64), positive)
        z = tl.where(own, float("-inf"), z)
        higher = tl.where(z > top, z, top)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base).to(tl.float64) + tl.exp(z - base).to(tl.float64)
        top = higher
    tl.store(top_ptr + j, top, mask=valid)
    tl.store(total_ptr + j, total, mask=valid)
    tl.store(positive_ptr + j, positive, mask=valid)
