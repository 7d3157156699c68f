"""The Triton bodies of the formulas in the interpreter, against pc_kernels/formulas.py in float64.

`test_formulas_triton.py` runs this file. By hand:
TRITON_INTERPRET=1 python -m pytest tests/formulas_interpreted.py
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from compare import RELAXATIONS as ON_GRIDS
from compare import assert_near
from tolerances import ROUNDINGS, U
from torch import Tensor

from pc_kernels.formulas import HUBER_DELTA, PENALTIES, RELAXATIONS, Formula
from pc_kernels.triton_kernels import tables
from pc_kernels.triton_kernels.formulas import (
    code_of,
    kernels_at,
    step_and_density,
    value_and_slope,
)

COUNT = 2048


@triton.jit
def relaxation_kernel(
    z_ptr, step_ptr, density_ptr, RELAXATION: tl.constexpr, COUNT: tl.constexpr
) -> None:
    at = tl.arange(0, COUNT)
    step, density = step_and_density(tl.load(z_ptr + at), RELAXATION)
    tl.store(step_ptr + at, step)
    tl.store(density_ptr + at, density)


@triton.jit
def kernels_kernel(
    z_ptr, out_ptr, integral_ptr, RELAXATION: tl.constexpr, COUNT: tl.constexpr
) -> None:
    at = tl.arange(0, COUNT)
    _density, step, integral = kernels_at(tl.load(z_ptr + at), RELAXATION)
    tl.store(out_ptr + at, step)
    tl.store(integral_ptr + at, integral)


@triton.jit
def penalty_kernel(e_ptr, value_ptr, slope_ptr, PENALTY: tl.constexpr, COUNT: tl.constexpr) -> None:
    at = tl.arange(0, COUNT)
    value, slope = value_and_slope(tl.load(e_ptr + at), PENALTY)
    tl.store(value_ptr + at, value)
    tl.store(slope_ptr + at, slope)


def both(kernel: triton.JITFunction, points: Tensor, code: int) -> tuple[Tensor, Tensor]:
    one, other = torch.empty_like(points), torch.empty_like(points)
    kernel[(1,)](points, one, other, code, COUNT)
    return one, other


def rounding_of(formula: Formula, points: Tensor) -> Tensor:
    """What a float32 value of the formula may be off by: `ROUNDINGS` of its own, one of its argument.

    And half of the smallest subnormal number.
    """
    leaf = points.double().requires_grad_()
    value = formula(leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    return (ROUNDINGS * value.abs() + (slope * leaf).abs()).detach() * U + 2.0**-150


@pytest.mark.parametrize("name", ON_GRIDS)
def test_relaxations(name: str, rng: torch.Generator) -> None:
    """A step is near in absolute terms, a density relative to itself; far out they are 0, ½ and 1."""
    row = RELAXATIONS[name]
    z = torch.linspace(-1.2, 1.2, COUNT) * row.single.support
    z[::2] = torch.randn(COUNT // 2, generator=rng)
    z[:4] = torch.tensor([0.0, -0.0, 1e30, -1e30])
    step, density = both(relaxation_kernel, z, code_of(row))
    assert_near("step", step, row.cdf(z.double()), ROUNDINGS * U)
    assert_near("density", density, row.pdf(z.double()), rounding_of(row.pdf, z))
    assert step[:4].tolist() == [0.5, 0.5, 1.0, 0.0] and density[2:4].tolist() == [0.0, 0.0]


def normal_integral(z: Tensor) -> Tensor:
    """∫Φ, with the digits of its tail."""
    a = z.abs()
    mills = torch.special.erfcx(a / math.sqrt(2)) * math.sqrt(math.pi / 2)
    tail = torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi) * (1 - a * mills)
    return tail + z.clamp(min=0)


TAILS: dict[str, tuple[Formula, Formula]] = {
    "logistic": (torch.sigmoid, lambda z: torch.logaddexp(z, torch.zeros_like(z))),
    "normal": (lambda z: torch.special.log_ndtr(z).exp(), normal_integral),
}
"""Φ and ∫Φ in float64, in proportion to themselves: those of the table lose digits where small."""


@pytest.mark.parametrize("name", ON_GRIDS)
def test_kernels_have_tails_in_proportion(name: str, rng: torch.Generator) -> None:
    """Φ and ∫Φ are near relative to themselves, as far as the reach; far out they are 0, and 1 and z."""
    row = RELAXATIONS[name]
    z = torch.linspace(-1, 1, COUNT) * row.single.far.support
    z[::2] = torch.randn(COUNT // 2, generator=rng)
    z[:4] = torch.tensor([0.0, -0.0, 1e30, -1e30])
    z[4] = -torch.inf
    step, integral = both(kernels_kernel, z, code_of(row))
    for formula, got in zip(TAILS[name], (step, integral), strict=True):
        wanted = formula(z[5:].double())
        allowed = rounding_of(formula, z[5:]) + tables.FIT * wanted
        assert_near("kernel", got[5:], wanted, allowed)
    assert step[:5].tolist() == [0.5, 0.5, 1.0, 0.0, 0.0]
    assert integral[2:5].tolist() == [z[2].item(), 0.0, 0.0]


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties(name: str, rng: torch.Generator) -> None:
    row = PENALTIES[name]
    e = torch.rand(COUNT, generator=rng) * 2 - 1
    turn = torch.tensor(HUBER_DELTA)
    e[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    e[4:8] = torch.stack([turn, -turn, turn.nextafter(e[2]), turn.nextafter(e[0])])
    value, slope = both(penalty_kernel, e, code_of(row))
    assert_near("value", value, row.value(e.double()), rounding_of(row.value, e))
    assert_near("slope", slope, row.slope(e.double()), ROUNDINGS * U * row.slope(e.double()).abs())


@pytest.mark.parametrize("kernel", [relaxation_kernel, penalty_kernel])
def test_an_unknown_code(kernel: triton.JITFunction) -> None:
    with pytest.raises(Exception, match="without a Triton body"):
        both(kernel, torch.zeros(COUNT), 99)
