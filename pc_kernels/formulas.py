"""The table of formulas: a row for each relaxation Φ and for each penalty ℓ.

The kernels have the same rows: csrc/formulas.h for C++ and CUDA, triton_kernels/formulas.py for Triton.
tests/test_formulas.py holds them equal by value. docs/method.md derives the grids' sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Formula = Callable[[Tensor], Tensor]
"""A function of each element."""

HUBER_DELTA = 0.1
"""Where the `huber` penalty turns from square to line, in units of normalised rank."""


@dataclass(frozen=True)
class GridSpec:
    """How fine the grid of a relaxation is: enough for the rounding of one dtype."""

    inverse_step: int
    """Grid nodes per unit of temperature, 1/h."""
    stencil: int
    """Nodes of the stencil, p."""
    support: int
    """The distance, in units of temperature, beyond which Φ is 0 or 1 to rounding."""
    reach: int | None = None
    """The distance beyond which even a million Φ are 0 beside a count of 1. None: the support."""
    extra_terms: int = 0
    """Of a cell's polynomial, beyond half of the stencil."""

    @property
    def terms(self) -> int:
        """Coefficients of the polynomial that is taken for the stencil's in a cell."""
        return self.stencil // 2 + self.extra_terms

    @property
    def far(self) -> GridSpec:
        """The same grid for errors relative to sums however small: its support is the reach.

        With a term more: what the cut leaves out is 10⁻⁶ of an exponential tail, twice.
        """
        if self.reach is None:
            return self
        return replace(self, support=self.reach, extra_terms=1)

    @property
    def band(self) -> int:
        """Nodes on either side that a node's convolution needs."""
        return self.support * self.inverse_step


KERNELS = ("pdf", "cdf", "integral")
"""φ, Φ and ∫Φ: each the derivative of the next."""


@dataclass(frozen=True)
class Relaxation:
    """A smooth step Φ, the CDF that replaces the comparison δ_k < δ_j, and its density φ = Φ′."""

    name: str
    code: int | None
    """What the kernels call it; None: they do not have it."""
    cdf: Formula
    pdf: Formula
    single: GridSpec | None
    """The grid in float32, the kernels' too; None: no grid, but scans of the row in order."""
    double: GridSpec | None
    """The grid in float64."""
    integral: Formula | None = None
    """∫Φ from −∞, which is x above the support; None: `smooth_cdf` has no integral of it."""

    def grid(self, dtype: torch.dtype) -> GridSpec:
        """The grid for computing in float32 or float64, of a relaxation that has one."""
        spec = {torch.float32: self.single, torch.float64: self.double}[dtype]
        assert spec is not None, f"{self.name!r} has no grid"
        return spec

    def kernel(self, name: str) -> Formula:
        """One of `KERNELS`.

        Raises:
            ValueError: it is the integral, and this relaxation has none.
        """
        found = {"pdf": self.pdf, "cdf": self.cdf, "integral": self.integral}[name]
        if found is None:
            having = [repr(row.name) for row in RELAXATIONS.values() if row.integral is not None]
            raise ValueError(
                f"integral=True needs a relaxation with an integral, {' or '.join(having)}; "
                f"got {self.name!r}"
            )
        return found


@dataclass(frozen=True)
class Projection:
    """A relaxation without a Φ: values are projected onto the permutahedron of the places."""

    name: str
    code: int | None
    """What the kernels call it; None: they do not have it."""
    kl: bool
    """By the Kullback-Leibler divergence of exponentials; else by the Euclidean distance."""


@dataclass(frozen=True)
class Penalty:
    """ℓ of a rank residual e = r_S − r_T, and its slope ℓ′."""

    name: str
    code: int | None
    """What the kernels call it; None: they do not have it."""
    value: Formula
    slope: Formula


def _huber(e: Tensor) -> Tensor:
    line = HUBER_DELTA * (e.abs() - HUBER_DELTA / 2)
    return torch.where(e.abs() <= HUBER_DELTA, e.square() / 2, line)


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _laplace_density(x: Tensor) -> Tensor:
    return torch.exp(-x.abs()) / 2


def _laplace_cdf(x: Tensor) -> Tensor:
    # Clamped, so that what is not chosen has a gradient to be multiplied by 0; at 0 the slope is ½.
    low, high = x.clamp(max=0).exp() / 2, 1 - (-x.clamp(min=0)).exp() / 2
    return torch.where(x < 0, low, high)


def _laplace_integral(x: Tensor) -> Tensor:
    low, high = x.clamp(max=0).exp() / 2, x.clamp(min=0) + (-x.clamp(min=0)).exp() / 2
    return torch.where(x < 0, low, high)


RELAXATIONS = {
    row.name: row
    for row in (
        Relaxation(
            "logistic",
            0,
            cdf=torch.sigmoid,
            pdf=lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
            single=GridSpec(4, 8, 17, 34),  # 1 − Φ(17) = 4.1e-8, 1 − Φ(34) = 1.7e-15
            double=GridSpec(8, 16, 36),
            integral=lambda x: torch.nn.functional.softplus(x, threshold=40.0),
        ),
        Relaxation(
            "normal",
            1,
            cdf=torch.special.ndtr,
            pdf=_normal_density,
            single=GridSpec(6, 8, 6, 8),  # 1 − Φ(6) = 9.9e-10, 1 − Φ(8) = 6.2e-16
            double=GridSpec(12, 16, 9),
            integral=lambda x: x * torch.special.ndtr(x) + _normal_density(x),
        ),
        Relaxation(
            "laplace",
            2,
            cdf=_laplace_cdf,
            pdf=_laplace_density,
            single=None,  # its density has a kink at 0
            double=None,
            integral=_laplace_integral,
        ),
    )
}
"""By name. Taylor et al. (WSDM 2008) rank by the normal CDF, Qin et al. (2010) by the logistic one,
LapSum (Struski et al., ICML 2025) by Laplace's."""

PROJECTIONS = {
    row.name: row
    for row in (Projection("projection", 3, kl=False), Projection("projection_kl", 4, kl=True))
}
"""By name. Blondel, Teboul, Berthet and Djolonga (ICML 2020)."""

PENALTIES = {
    row.name: row
    for row in (
        Penalty("squared", 0, value=torch.square, slope=lambda e: 2 * e),
        Penalty("absolute", 1, value=torch.abs, slope=torch.sign),
        Penalty("huber", 2, _huber, slope=lambda e: e.clamp(-HUBER_DELTA, HUBER_DELTA)),
    )
}
"""By name."""
