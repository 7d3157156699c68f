"""The scalar maths inside the kernels: relaxations, penalties, which references count."""

import triton
import triton.language as tl

LOGISTIC = tl.constexpr(0)
NORMAL = tl.constexpr(1)

SQUARED = tl.constexpr(0)
ABSOLUTE = tl.constexpr(1)
HUBER = tl.constexpr(2)
HUBER_DELTA = tl.constexpr(0.1)

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def step_and_density(z, RELAXATION: tl.constexpr):
    """Φ(z) and φ(z) from one exponential each."""
    if RELAXATION == LOGISTIC:
        e = tl.exp(-tl.abs(z))
        r = 1.0 / (1.0 + e)
        step = tl.where(z >= 0.0, r, e * r)
        density = e * r * r
    else:
        step = 0.5 + 0.5 * tl.erf(z * 0.70710678118654752440)
        density = 0.39894228040143267794 * tl.exp(-0.5 * z * z)
    return step, density


@triton.jit
def penalty_value(e, PENALTY: tl.constexpr):
    """ℓ of a rank residual."""
    a = tl.abs(e)
    if PENALTY == SQUARED:
        value = e * e
    elif PENALTY == ABSOLUTE:
        value = a
    else:
        value = tl.where(a <= HUBER_DELTA, 0.5 * e * e, (a - 0.5 * HUBER_DELTA) * HUBER_DELTA)
    return value


@triton.jit
def penalty_slope(e, PENALTY: tl.constexpr):
    """ℓ′ of a rank residual."""
    if PENALTY == SQUARED:
        slope = 2.0 * e
    elif PENALTY == ABSOLUTE:
        slope = (e > 0.0).to(tl.float32) - (e < 0.0).to(tl.float32)
    else:
        slope = tl.minimum(tl.maximum(e, -HUBER_DELTA), HUBER_DELTA)
    return slope


@triton.jit
def counted(j, count, own, keep_ptr, HAS_KEEP: tl.constexpr):
    """Which of the references j count: those of the row that are not the anchor, nor masked out."""
    valid = (j < count) & (j != own)
    if HAS_KEEP:
        valid = valid & (tl.load(keep_ptr + j, mask=j < count, other=0) != 0)
    return valid


@triton.jit
def finite(x):
    """Neither NaN nor infinite."""
    return tl.abs(x) <= LARGEST
