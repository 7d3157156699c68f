"""The `torch` backend's sums: the grid method in plain PyTorch, on any device, O(m) a row.

A row's soft ranks are one smooth function F(x) = Σ_k Φ((x − x_k)/τ) read at the row's own points.
*Spread* the points onto a uniform grid, *convolve* with Φ (and with φ = Φ′, for the gradient),
*gather* at the points: docs/method.md, Eq. 3-6. float32 and float64 differ only in the size of the grid.
With weights, and read at other points, the same is a smooth CDF (Eq. 8). Relaxations that are not smooth
have no grid: their rows are scanned in order (scanned.py), or projected (projected.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formulas import Projection
from .located import Grid, Located, NearlyHard, Setting, in_double, in_order
from .projected import Projected
from .scanned import LARGEST_STEP, Scanned

if TYPE_CHECKING:
    from ..cdf_rows import CdfRows
    from ..recipe import Recipe


CELLS_PER_POINT = 8
"""Beyond this the grid costs more than a sort: rows are nearly hard (docs/method.md, "Regimes")."""

WORKING_BYTES = 164
"""Working memory for each value of a row, at the peak."""

FEW_PAIRS = 1024
"""Of a row's sources and queries, below which their direct sums cost less than a grid."""

SMALLEST_TAU = 1e-300
"""Below this a temperature decides nothing: it is far less than any difference in float32."""


def hard_rank(x: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mid-ranks in [0, 1] of the rows of x [N, m]; a row with a NaN is NaN, m = 1 gives ½.

    Where `keep` [N, m] is False the value is absent, and its rank is 0.
    """
    if x.shape[1] == 0:
        return x.clone()
    others = _count(x, keep) - 1
    present = x if keep is None else torch.where(keep, x, torch.inf)  # what is absent sorts last
    ordered, order = in_order(present)
    place = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    rank = torch.empty_like(x).scatter_(1, order, place.expand_as(x))
    row, first = (ordered[:, 1:] == ordered[:, :-1]).nonzero(as_tuple=True)
    if len(row):  # of values that are equal, each has the mean of their places
        begins = pad((row.diff() != 0) | (first.diff() != 1), (1, 0), value=True)
        run = begins.cumsum(0) - 1
        shared = (first[begins] + run.bincount() / 2)[run].to(x.dtype)
        for place in (first, first + 1):
            rank[row, order[row, place]] = shared
    nothing, undefined = others < 1, present.amax(1, keepdim=True).isnan()
    others = torch.where(undefined, torch.nan, others.clamp(min=1))
    rank = rank.add_(torch.where(nothing, 0.5, 0)).div_(others)
    return rank if keep is None else torch.where(keep, rank, 0)


def soft_rank(
    x: Tensor, recipe: Recipe, with_grad: bool, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Soft ranks in [0, 1] of the rows of x [N, m]; a row that is not finite is NaN.

    Also, with_grad, the density Σ_k φ((x_j − x_k)/τ) that the backward needs, else an empty tensor.
    `keep` as for `hard_rank`.
    """
    return SoftRows(x, recipe, keep).ranks(with_grad) if x.numel() else (x.clone(), x.clone())


def soft_rank_backward(
    grad_rank: Tensor,
    x: Tensor,
    density: Tensor,
    recipe: Recipe,
    keep: Tensor | None = None,
) -> Tensor:
    """Σ_j grad_rank_j ∂r_j/∂x for the rows of x [N, m]; also through σ under scale "std".

    `keep` as for `hard_rank`; what is absent has gradient 0.
    """
    return SoftRows(x, recipe, keep).backward(grad_rank, density) if x.numel() else x.clone()


def kernel_sums(rows: CdfRows, recipe: Recipe, kernels: tuple[str, ...]) -> list[Tensor]:
    """Σ_k w_k K((y_j − x_k)/τ) of rows of matrices, [W, N, n] for each kernel K; see `Backend`.

    Sources and queries are one set of points, in which queries weigh nothing and only they are asked.
    """
    points = torch.cat([rows.sources, rows.queries], 1)
    there = torch.cat(
        [_there(rows.sources, rows.source_mask), _there(rows.queries, rows.query_mask)], 1
    )
    weights = torch.ones_like(rows.sources)[None] if rows.weights is None else rows.weights
    count = rows.sources.shape[1]
    weights = torch.where(there[:, :count], weights, 0)
    shape = (len(weights), *rows.queries.shape)
    if weights.numel() == 0 or rows.queries.numel() == 0:
        found = [points.new_zeros(shape) for _ in kernels]
    elif count * rows.queries.shape[1] <= FEW_PAIRS:
        found = _direct_sums(rows, weights, recipe, kernels)
    else:
        parts = slice(None, count), slice(count, None)
        keep = None if rows.source_mask is None and rows.query_mask is None else there
        setting = Setting(recipe.smooth_step, points.dtype, True, *parts)
        located = _Rows(points, recipe, keep, setting)
        channels = [located.sums(weight, kernels) for weight in weights]
        found = [torch.stack(sums) for sums in zip(*channels, strict=True)]
    finite = (points.isfinite() | ~there).all(1) & weights.isfinite().all(2).all(0)
    found = [torch.where(finite[:, None], sums, torch.nan) for sums in found]
    return [torch.where(there[:, count:], sums, 0) for sums in found]


def _direct_sums(
    rows: CdfRows, weights: Tensor, recipe: Recipe, kernels: tuple[str, ...]
) -> list[Tensor]:
    gap = in_double(rows.queries)[:, :, None] - in_double(rows.sources)[:, None, :]
    step = (gap / max(recipe.temperature, SMALLEST_TAU)).clamp(-LARGEST_STEP, LARGEST_STEP)
    steps = [recipe.smooth_step.kernel(kernel)(step) for kernel in kernels]
    return [(in_double(weights)[:, :, None, :] * s).sum(3).to(weights.dtype) for s in steps]


def _there(x: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool) if mask is None else mask


class _Closed(NamedTuple):
    """Rows whose wide gaps are closed."""

    rows: Tensor
    order: Tensor
    lost: Tensor
    """What each gap has lost, in order [·, P − 1]."""


class _Rows:
    """Rows x [N, m] in units of their temperature, located in groups that are alike."""

    def __init__(self, x: Tensor, recipe: Recipe, keep: Tensor | None, setting: Setting) -> None:
        self.scale = recipe.scale
        self.keep = keep
        self.setting = setting
        self.count = _count(x, keep)
        if keep is not None:  # what is absent moves to the lowest value, where it has weight 0
            lowest = torch.where(keep, x, torch.inf).amin(1, keepdim=True)
            x = torch.where(keep, x, torch.where(self.count == 0, 0, lowest))
        self.others = (self.count - 1).clamp(min=1)
        low, high = (in_double(end) for end in (x.amin(1, keepdim=True), x.amax(1, keepdim=True)))
        self.finite = low.isfinite() & high.isfinite()
        self.constant = ((low == high) & (recipe.scale == "std")) | (self.count < 2)
        low, spread = torch.where(self.finite, low, 0), torch.where(self.finite, high - low, 0)
        x = x.nan_to_num(0.0, 0.0, 0.0)
        # Places need more digits than sums: beside a large value a small one has digits that their
        # difference in float32 has not, and at a low temperature these decide.
        apart = in_double(x) - low
        # In units of the range, whose squares neither over- nor underflow.
        tiny = torch.finfo(apart.dtype).tiny
        unit = spread.clamp(tiny, 1 / tiny)
        apart = apart.mul_(torch.where(self.finite, 1 / unit, 0))
        self.centred = self.only_kept(apart - self.mean(apart))
        norm = torch.linalg.vector_norm(self.centred, dim=1, keepdim=True)
        sigma = norm / self.count.clamp(min=1).sqrt()
        self.sigma = torch.where(self.constant, 1, sigma)
        self.tau = self.sigma * unit if recipe.scale == "std" else torch.ones_like(unit)
        self.tau = (self.tau * recipe.temperature).clamp(min=SMALLEST_TAU)
        self.closed: _Closed | None = None
        self.groups: list[tuple[Tensor | None, Located]]
        if isinstance(setting.relaxation, Projection):
            self.groups = [(None, Projected(in_double(x), self.tau, keep, setting))]
        elif setting.step.single is None:
            self.groups = [(None, Scanned(in_double(x), self.tau, keep, setting))]
        else:
            per_unit = torch.where(self.constant | ~self.finite, 0, unit / self.tau)
            self.groups = self._in_groups(apart.mul_(per_unit), per_unit * (spread / unit), x)

    def only_kept(self, x: Tensor) -> Tensor:
        """X [N, m] with 0 for what is absent."""
        return x if self.keep is None else torch.where(self.keep, x, 0)

    def mean(self, x: Tensor) -> Tensor:
        """The mean [N, 1] of rows [N, m] that are 0 where something is absent."""
        return x.sum(1, keepdim=True) / self.count.clamp(min=1)

    def _in_groups(
        self, points: Tensor, span: Tensor, x: Tensor
    ) -> list[tuple[Tensor | None, Located]]:
        """Rows of like size together: a row is padded to the widest of its group. None: all of them.

        Grids of up to one cell a point are alike, since their points cost more; then sizes double. But
        grids stay together where padding does not even double their cells: a group more costs more.
        """
        count = points.shape[1]
        cells = span[:, 0] * self.setting.spec.inverse_step
        if not bool(cells.amax() <= CELLS_PER_POINT * count):
            far = (~(cells <= CELLS_PER_POINT * count)).nonzero()[:, 0]
            points[far] = self._close_gaps(in_double(x[far]), far)
            cells[far] = points[far].amax(1) * self.setting.spec.inverse_step
        level = torch.log2(cells / count).ceil_().clamp_(0, math.log2(CELLS_PER_POINT) + 1)
        grid = level <= math.log2(CELLS_PER_POINT)
        sizes = torch.where(grid, cells.clamp(min=count), 0)
        if bool(sizes.amax() * grid.sum() <= 2 * sizes.sum()):
            level = torch.where(grid, torch.where(grid, level, 0).amax(), level)
        levels = sorted(set(level.tolist()))
        groups: list[tuple[Tensor | None, Located]] = []
        for here in levels:
            rows = None if len(levels) == 1 else (level == here).nonzero()[:, 0]
            kind = Grid if here <= math.log2(CELLS_PER_POINT) else NearlyHard
            own = points if rows is None else points[rows]
            keep = self.keep if rows is None or self.keep is None else self.keep[rows]
            groups.append((rows, kind(own, keep, self.setting)))
        return groups

    def _close_gaps(self, x: Tensor, rows: Tensor) -> Tensor:
        """Places of these rows in units of τ, with gaps beyond the support closed to just over it.

        Points so far apart do not see each other, however far apart they are.
        """
        ordered, order = x.sort(dim=1)
        widest = self.setting.spec.support + 1
        apart = ordered.diff(dim=1)
        gaps = (apart / self.tau[rows]).clamp(max=widest)
        gaps = torch.where(self.constant[rows], 0, gaps)
        lost = torch.where(gaps == widest, apart - widest * self.tau[rows], 0)
        self.closed = _Closed(rows, order, lost)
        places = pad(gaps.cumsum(1), (1, 0))
        return torch.zeros_like(places).scatter_(1, order, places)

    def rank_sums(self, with_density: bool) -> tuple[Tensor, Tensor]:
        """Σ_k Φ((x_j − x_k)/τ), k = j included, and Σ_k φ: [N, m] (the latter empty if not wanted)."""
        ones = self.only_kept(torch.ones_like(self.centred, dtype=self.setting.dtype))
        parts = [
            located.rank_sums(ones if rows is None else ones[rows], with_density)
            for rows, located in self.groups
        ]
        sums = [self._together(found) for found in zip(*parts, strict=True)]
        return sums[0], sums[1] if with_density else sums[0].new_empty(0)

    def sums(self, weight: Tensor, kernels: tuple[str, ...]) -> list[Tensor]:
        """Σ_k weight_k K((x_j − x_k)/τ) at the queries, for each kernel K: see `Located`."""
        parts = [
            located.sums(weight if rows is None else weight[rows], kernels)
            for rows, located in self.groups
        ]
        found = [self._together(sums) for sums in zip(*parts, strict=True)]
        if "integral" in kernels and self.closed is not None:
            self._add_ramp(found[kernels.index("integral")], weight, self.closed)
        return found

    def _add_ramp(self, sums: Tensor, weight: Tensor, closed: _Closed) -> None:
        """Adds to integrals what closed gaps took of them: ∫Φ grows by the gaps above its source."""
        rows, order, lost = closed
        mass = in_double(self.setting.of_all(weight, self.centred)[rows]).gather(1, order)
        ramp = pad((mass.cumsum(1)[:, :-1] * lost).cumsum(1), (1, 0)) / self.tau[rows]
        ramp = torch.zeros_like(ramp).scatter_(1, order, ramp)[:, self.setting.queries]
        sums[rows] = (sums[rows] + ramp).to(sums.dtype)

    def slope_sums(self, slope: Tensor, density: Tensor) -> Tensor:
        """Σ_k (slope_j − slope_k) φ((x_j − x_k)/τ): [N, m]."""
        own = [
            (slope, density) if rows is None else (slope[rows], density[rows])
            for rows, _ in self.groups
        ]
        parts = [
            located.slope_sums(*terms) for (_, located), terms in zip(self.groups, own, strict=True)
        ]
        return self._together(parts)

    def _together(self, parts: Sequence[Tensor]) -> Tensor:
        """What the groups have [·, m], as [N, m]."""
        if self.groups[0][0] is None:
            return parts[0]
        whole = parts[0].new_empty(len(self.count), parts[0].shape[1])
        for (rows, _), part in zip(self.groups, parts, strict=True):
            whole[rows] = part
        return whole


class SoftRows(_Rows):
    """Rows x [N, m], not empty, of which ranks are wanted, and gradients in them."""

    def __init__(self, x: Tensor, recipe: Recipe, keep: Tensor | None) -> None:
        """Locates the points; `keep` as for `hard_rank`."""
        super().__init__(x, recipe, keep, Setting(recipe.formula, x.dtype))

    def ranks(self, with_grad: bool) -> tuple[Tensor, Tensor]:
        """See `soft_rank`."""
        sums, density = self.rank_sums(with_grad)
        share, first = self._settle(1 / self.others, 0.0), self._settle(-0.5 / self.others, 0.5)
        return self.only_kept(torch.addcmul(first, sums, share)), density

    def backward(self, grad_rank: Tensor, density: Tensor) -> Tensor:
        """See `soft_rank_backward`."""
        slope = self.only_kept(grad_rank)
        # In float64: where values are near the largest number, the share is near the smallest.
        share = self._settle(1 / (self.others * self.tau), 0.0)
        grad = self.only_kept(in_double(self.slope_sums(slope, density)) * share)
        if self.scale == "std":
            grad = grad * (self.count != 2)  # of two, each lies σ from the mean, whatever x is
            # Ranks are functions of x/τ, hence ∂L/∂τ = −Σ_k grad_k (x_k − mean)/τ.
            standard = self.centred * (1 / self.sigma)
            grad = torch.addcmul(grad, standard, self.mean(grad * standard), value=-1)
        return self.only_kept(grad.to(slope.dtype))

    def _settle(self, factor: Tensor, constant: float) -> Tensor:
        """What rows [N, 1] are multiplied by, `constant` for constant ones and NaN for undefined ones."""
        factor = torch.where(self.constant, constant, factor)
        return torch.where(self.finite, factor, torch.nan)


def _count(x: Tensor, keep: Tensor | None) -> Tensor:
    """How many values of each row of x [N, m] are there: [N, 1], in the dtype of x."""
    if keep is None:
        return torch.full_like(x[:, :1], x.shape[1])
    return keep.sum(1, keepdim=True).to(x.dtype)
