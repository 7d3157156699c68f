"""How near is near: every tolerance of the tests, and where it comes from.

u = 2^-24 is the unit roundoff of float32, 2^-53 that of float64.

**The row.** In float32 a normalised rank may be off by 2e-6, a loss by 1e-5 of itself, a gradient by
1e-5 of its L2 norm, against the float64 reference *on the same float32 inputs*. That is 33 u for a
rank, the sum of a row of roundings (place in the cell, spread, convolution, gather: 8 to 10 operations
on numbers up to 1 each, some of them on both sides of a pair) with a margin of about three.

**The floor.** A gradient is a sum of differences, Σ_k (g_j − g_k) φ((x_j − x_k)/τ)/τ, and it may
cancel: to nothing at all (two references under scale "std", isolated points, a student that ranks as
its teacher does), while the roundings of its terms stay. So a gradient is also allowed the roundings
of its terms, `ROUNDINGS` u of each magnitude: N_j = 8u Σ_k (|g_j| + |g_k|) φ/τ, k = j included, because
the method computes g_j Σφ − Σ g_k φ. Here g = ℓ′(residual), and a residual carries the rounding of two
ranks in [0, 1], 8u together, however small it is itself; ℓ′ of `absolute` is a step, undefined within
the rank's own tolerance of 0, so that such a pair may contribute all of its 2. For a row without
cancellation N is 2e-6 of the gradient and the row above decides. The loss has the same floor: ranks
off by ε = 8u in the mean change mean ℓ by at most mean|ℓ′| ε + ε².

**Features.** From features the student's distances are float32 themselves, with a relative error of
about u (test_dissimilarity.py bounds it at every width). A rank sees δ/τ, so this weighs κ = mean(δ)/τ
times as much. At a temperature of 0.1 or more and up to 128 features κ u stays under the row, which
holds as it is. Colder, or wider (distances concentrate: σ shrinks against their mean), a gradient is
allowed 4 κ u more, and the loss as much as ranks off by Σ_k φ (δ_j + δ_k)/τ · 4u make. In these cases,
and in small batches, whose gradients may cancel almost to nothing, it is also allowed what it moves by,
in float64, if every distance is off by 4u, up or down by lot. `laplace` needs it most: its density, e^−x,
moves as much near a tie as elsewhere, where that of `logistic` is flat; and `cityblock`, a sum of as many
roundings as there are features (measured: 3.6u at a width of 40). Against the formula on their own
float32 distances the same gradients are within 2e-7. The teacher's
features in such tests are multiples of 1/8, so that its distances are exact and its ranks are strict.

**Low precision.** bfloat16 and float16 inputs are computed in float32; only the results are rounded to
the input's dtype: half a unit in the last place. Where gradients are subnormal numbers (in float16
that is soon), each of `ROUNDINGS` operations may round by half of the smallest one.

**Smooth CDFs.** Σ_k w_k K((y_j − x_k)/τ) has the tolerance of a rank, relative to Σ_k |w_k| K: the
method has an error relative to its terms, large or small. (Of the normal relaxation, whose tail is not an
exponential, relative to the sum at y + 1.5 τ.) Sources beyond the reach do not count
(`BEYOND_REACH` is 1 − Φ there, docs/method.md). Gradients have the row and the floor of all gradients.

**float64** (`torch` and `reference`): the grid's own error is 1e-13 (docs/method.md), the roundings 33
of 2^-53; `DOUBLE_*` are ten times their sum.
"""

from __future__ import annotations

import torch

U = 2.0**-24
ROUNDINGS = 8
RANK, LOSS, GRAD = 2e-6, 1e-5, 1e-5
DOUBLE_RANK, DOUBLE_LOSS, DOUBLE_GRAD = 1e-12, 5e-12, 5e-12
DOUBLE_ROUNDING = 1e-13
BEYOND_REACH = 2e-15
STRICT_TEMPERATURE, STRICT_WIDTH = 0.1, 128


def rounding(dtype: torch.dtype) -> float:
    """What a magnitude of 1 may be off by, for the floor."""
    return DOUBLE_ROUNDING if dtype == torch.float64 else ROUNDINGS * U


def rank_tolerance(dtype: torch.dtype) -> float:
    """Absolute, of a rank in [0, 1]."""
    if dtype in (torch.bfloat16, torch.float16):
        return RANK + torch.finfo(dtype).eps / 2
    return DOUBLE_RANK if dtype == torch.float64 else RANK


def loss_tolerance(dtype: torch.dtype) -> float:
    """Relative."""
    return DOUBLE_LOSS if dtype == torch.float64 else LOSS


def grad_tolerance(dtype: torch.dtype) -> float:
    """Relative, of the L2 norm; `dtype` is the gradient's own."""
    if dtype in (torch.bfloat16, torch.float16):
        return GRAD + torch.finfo(dtype).eps / 2
    return DOUBLE_GRAD if dtype == torch.float64 else GRAD


def subnormal_floor(dtype: torch.dtype, count: int) -> float:
    """Norm of `count` numbers rounded `ROUNDINGS` times to multiples of the smallest subnormal."""
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return ROUNDINGS * step / 2 * count**0.5
