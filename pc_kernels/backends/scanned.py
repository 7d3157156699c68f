"""Sums of the `laplace` relaxation, exact: the exponentials of rows in order, scanned from either end.

With places x_1 ≤ x_2 ≤ …, L_j = Σ_{k≤j} w_k exp(x_k − x_j) and U_j = Σ_{k>j} w_k exp(x_j − x_k), the
sums of φ, Φ and ∫Φ are ½(L + U), W − ½L + ½U and R + ½(L + U): docs/method.md, Eq. 10. csrc/cpu/scans.h
has the same as recurrences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .located import Located, Setting, in_double

LARGEST_STEP = 1e100
"""A gap in units of τ that is as good as infinite, but has products with 0."""


class Scanned(Located):
    """Rows in order."""

    def __init__(self, x: Tensor, tau: Tensor, keep: Tensor | None, setting: Setting) -> None:
        """Sorts the values x [N, P], in float64; tau [N, 1] is their temperature."""
        super().__init__(x, keep, setting)
        self.ordered, self.order = x.sort(dim=1)
        self.tau = tau

    def sums(self, weight: Tensor, kernels: tuple[str, ...]) -> list[Tensor]:
        """See `Located`."""
        mass = in_double(self.setting.of_all(weight, self.points)).gather(1, self.order)
        lower, upper = self._scan(mass)
        below = mass.cumsum(1)
        totals = {"pdf": (lower + upper) / 2, "cdf": below - lower / 2 + upper / 2}
        if "integral" in kernels:
            rise = below[:, :-1] * self._steps(1)
            totals["integral"] = pad(rise.cumsum(1), (1, 0)) + totals["pdf"]
        return [self._by_point(totals[kernel])[:, self.setting.queries] for kernel in kernels]

    def slope_sums(self, slope: Tensor, density: Tensor) -> Tensor:
        """See `Located`."""
        (weighted,) = self.sums(slope, ("pdf",))
        return slope * density - weighted

    def _steps(self, count: int) -> Tensor:
        """How far values are, in units of τ, from the one `count` places before: [N, P − count]."""
        apart = self.ordered[:, count:] - self.ordered[:, :-count]
        return (apart / self.tau).clamp(max=LARGEST_STEP)

    def _scan(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """L and U of masses [N, P] in order, by doubling: what `reach` places have, 2 · reach have next.

        Terms are multiplied by exponentials of true distances: errors do not add up.
        """
        lower, upper = mass, mass
        reach = 1
        while reach < mass.shape[1]:
            decay = (-self._steps(reach)).exp()
            lower = torch.cat([lower[:, :reach], lower[:, reach:] + decay * lower[:, :-reach]], 1)
            upper = torch.cat([upper[:, :-reach] + decay * upper[:, reach:], upper[:, -reach:]], 1)
            reach *= 2
        return lower, upper - mass

    def _by_point(self, total: Tensor) -> Tensor:
        return torch.zeros_like(total).scatter_(1, self.order, total).to(self.setting.dtype)
