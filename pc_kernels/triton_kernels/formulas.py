"""The rows of pc_kernels/formulas.py as Triton bodies: one for each relaxation and each penalty.

Kernels know a row by its code. Where a row has no body here, the launch says so; a code without a branch
does not compile. tests/test_formulas_triton.py holds the bodies equal by value to the Python table.
"""

import triton
import triton.language as tl

from .. import formulas
from ..formulas import PENALTIES, RELAXATIONS, Penalty, Relaxation
from . import tables

LOGISTIC = tl.constexpr(RELAXATIONS["logistic"].code)
NORMAL = tl.constexpr(RELAXATIONS["normal"].code)

SQUARED = tl.constexpr(PENALTIES["squared"].code)
ABSOLUTE = tl.constexpr(PENALTIES["absolute"].code)
HUBER = tl.constexpr(PENALTIES["huber"].code)
NORMAL_RATE = tl.constexpr(tables.NORMAL_RATE)
NORMAL_CDF = tl.constexpr(tables.NORMAL_CDF)
NORMAL_INTEGRAL = tl.constexpr(tables.NORMAL_INTEGRAL)
LOGISTIC_INTEGRAL = tl.constexpr(tables.LOGISTIC_INTEGRAL)
HUBER_DELTA = tl.constexpr(formulas.HUBER_DELTA)

BODIES = {Relaxation: (LOGISTIC, NORMAL), Penalty: (SQUARED, ABSOLUTE, HUBER)}


def code_of(row: Relaxation | Penalty) -> int:
    """What the kernels call a row of the table; raises ValueError if it has no body here."""
    if row.code not in [code.value for code in BODIES[type(row)]]:
        raise ValueError(f"{type(row).__name__.lower()} {row.name!r} has no Triton body")
    return row.code


@triton.jit
def step_and_density(z, RELAXATION: tl.constexpr):
    """Φ(z) and φ(z) of a relaxation, from one exponential each."""
    if RELAXATION == LOGISTIC:
        e = tl.exp(-tl.abs(z))
        r = 1.0 / (1.0 + e)
        step = tl.where(z >= 0.0, r, e * r)
        density = e * r * r
    elif RELAXATION == NORMAL:
        step = 0.5 + 0.5 * tl.erf(z * 0.70710678118654752440)
        density = 0.39894228040143267794 * tl.exp(-0.5 * z * z)
    else:
        tl.static_assert(False, "a relaxation without a Triton body")
    return step, density


@triton.constexpr_function
def coefficient(polynomial, k):
    """Of xᵏ, of a polynomial of degree 9."""
    return polynomial[k]


@triton.jit
def polynomial_at(x, POLYNOMIAL: tl.constexpr):
    """A polynomial of degree 9 at x."""
    value = x * 0.0 + coefficient(POLYNOMIAL, 9)
    for k in tl.static_range(1, 10):
        value = value * x + coefficient(POLYNOMIAL, 9 - k)
    return value


@triton.jit
def kernels_at(z, RELAXATION: tl.constexpr):
    """φ(z), Φ(z) and ∫Φ up to z of a relaxation, each with an error in proportion to itself."""
    a = tl.abs(z)
    if RELAXATION == LOGISTIC:
        e = tl.exp(-a)
        r = 1.0 / (1.0 + e)
        density = e * r * r
        tail = e * r
        step = tl.where(z >= 0.0, r, tail)
        integral = e * polynomial_at(e, LOGISTIC_INTEGRAL)
    elif RELAXATION == NORMAL:
        e = tl.exp(-0.5 * a * a)
        t = 1.0 / (1.0 + NORMAL_RATE * a)
        density = 0.39894228040143267794 * e
        tail = e * t * polynomial_at(t, NORMAL_CDF)
        step = tl.where(z >= 0.0, 1.0 - tail, tail)
        integral = e * t * t * polynomial_at(t, NORMAL_INTEGRAL)
    else:
        tl.static_assert(False, "a relaxation without a Triton body")
    return density, step, tl.maximum(z, 0.0) + integral


@triton.jit
def value_and_slope(e, PENALTY: tl.constexpr):
    """ℓ(e) and ℓ′(e) of a penalty; e is a rank residual."""
    a = tl.abs(e)
    if PENALTY == SQUARED:
        value = e * e
        slope = 2.0 * e
    elif PENALTY == ABSOLUTE:
        value = a
        slope = (e > 0.0).to(tl.float32) - (e < 0.0).to(tl.float32)
    elif PENALTY == HUBER:
        value = tl.where(a <= HUBER_DELTA, 0.5 * e * e, (a - 0.5 * HUBER_DELTA) * HUBER_DELTA)
        slope = tl.minimum(tl.maximum(e, -HUBER_DELTA), HUBER_DELTA)
    else:
        tl.static_assert(False, "a penalty without a Triton body")
    return value, slope
