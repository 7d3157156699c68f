"""The `torch` backend's ranks: the grid method in plain PyTorch, on any device, O(m) a row.

A row's soft ranks are one smooth function F(x) = Σ_k Φ((x − x_k)/τ) read at the row's own points.
*Spread* the points onto a uniform grid, *convolve* with Φ (and with φ = Φ′, for the gradient),
*gather* at the points: docs/method.md, Eq. 3-6. float32 and float64 differ only in the size of the grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formulas import Relaxation

if TYPE_CHECKING:
    from ..recipe import Recipe


CELLS_PER_POINT = 8
"""Beyond this the grid costs more than a sort: rows are nearly hard (docs/method.md, "Regimes")."""


SMALLEST_TAU = 1e-300
"""Below this a temperature decides nothing: it is far less than any difference in float32."""


def hard_rank(x: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mid-ranks in [0, 1] of the rows of x [N, m]; a row with a NaN is NaN, m = 1 gives ½.

    Where `keep` [N, m] is False the value is absent, and its rank is 0.
    """
    if x.shape[1] == 0:
        return x.clone()
    others = (_count(x, keep) - 1).clamp(min=0)
    present = x if keep is None else torch.where(keep, x, torch.inf)  # what is absent sorts last
    ordered = present.sort(dim=1).values
    below = torch.searchsorted(ordered, present)
    not_above = torch.searchsorted(ordered, present, right=True)
    twice = (below + not_above - 1).to(x.dtype)
    rank = torch.where(others == 0, 0.5, twice / (2 * others))
    rank = torch.where(present.isnan().any(1, keepdim=True), torch.nan, rank)
    return rank if keep is None else torch.where(keep, rank, 0)


def soft_rank(
    x: Tensor, recipe: Recipe, with_grad: bool, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Soft ranks in [0, 1] of the rows of x [N, m]; a row that is not finite is NaN.

    Also, with_grad, the density Σ_k φ((x_j − x_k)/τ) that the backward needs, else an empty tensor.
    `keep` as for `hard_rank`.
    """
    if x.shape[1] == 0:
        return x.clone(), x.clone()
    row = _Rows(x, recipe, keep)
    sums, density = row.rank_sums(with_grad)
    return row.only_kept(row.settle((sums - 0.5) / row.others, 0.5)), density


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
    if x.shape[1] == 0:
        return x.clone()
    row = _Rows(x, recipe, keep)
    slope = row.only_kept(grad_rank / row.others)
    grad = row.only_kept(row.slope_sums(slope, density) / row.tau)
    if recipe.scale == "std":
        # Ranks are functions of x/τ, hence ∂L/∂τ = −Σ_k grad_k (x_k − mean)/τ.
        grad = grad - row.standard * row.mean(grad * row.standard)
    return row.only_kept(row.settle(grad, 0.0).to(x.dtype))


class _Rows:
    """Rows x [N, m] located on a grid (or, nearly hard, sorted), ready for sums over pairs."""

    def __init__(self, x: Tensor, recipe: Recipe, keep: Tensor | None) -> None:
        self.keep = keep
        self.count = _count(x, keep)
        if keep is not None:  # what is absent moves to the lowest value, where it has weight 0
            lowest = torch.where(keep, x, torch.inf).amin(1, keepdim=True)
            x = torch.where(keep, x, torch.where(self.count == 0, 0, lowest))
        self.others = (self.count - 1).clamp(min=1)
        self.finite = x.isfinite().all(1, keepdim=True)
        self.relaxation = recipe.smooth_step
        self.spec = self.relaxation.grid(x.dtype)
        self.dtype = x.dtype
        # Places need more digits than sums: beside a large value a small one has digits that their
        # difference in float32 has not, and at a low temperature these decide.
        wide = _wide(torch.where(self.finite, x, 0))
        equal = (wide == wide[:, :1]).all(1, keepdim=True)
        self.constant = (equal & (recipe.scale == "std")) | (self.count < 2)
        low = wide.amin(1, keepdim=True)
        # The mean of differences: the values themselves may be too large to add.
        centred = self.only_kept(wide - low)
        centred = self.only_kept(centred - self.mean(centred))
        self.sigma = torch.where(self.constant, 1, self._deviation(centred))
        self.standard = centred / self.sigma
        self.tau = self.sigma if recipe.scale == "std" else torch.ones_like(self.sigma)
        self.tau = (self.tau * recipe.temperature).clamp(min=SMALLEST_TAU)
        points = torch.where(self.constant, 0, (wide - low) / self.tau)
        self.order: Tensor | None = None
        limit = CELLS_PER_POINT * x.shape[1] / self.spec.inverse_step
        if not _fits(points, limit):
            points = self._close_gaps(wide)
            if not _fits(points, limit):
                self.order = points.argsort(dim=1)
                self.points = points
                return
        self._place(points)

    def only_kept(self, x: Tensor) -> Tensor:
        """X [N, m] with 0 for what is absent."""
        return x if self.keep is None else torch.where(self.keep, x, 0)

    def mean(self, x: Tensor) -> Tensor:
        """The mean [N, 1] of rows [N, m] that are 0 where something is absent."""
        return x.sum(1, keepdim=True) / self.count.clamp(min=1)

    def _deviation(self, centred: Tensor) -> Tensor:
        """Population standard deviation of centred rows, free of over- and underflow."""
        largest = centred.abs().amax(1, keepdim=True)
        unit = torch.where(largest > 0, largest, 1)
        return unit * self.mean((centred / unit).square()).sqrt()

    def settle(self, result: Tensor, constant: float) -> Tensor:
        """`result` with constant rows set to `constant` and undefined ones to NaN."""
        result = torch.where(self.constant, constant, result)
        return torch.where(self.finite, result, torch.nan)

    def _close_gaps(self, x: Tensor) -> Tensor:
        """Places in units of τ, with gaps beyond the support closed to just over it.

        Points so far apart do not see each other, however far apart they are.
        """
        ordered, order = x.sort(dim=1)
        gaps = (ordered.diff(dim=1) / self.tau).clamp(max=self.spec.support + 1)
        gaps = torch.where(self.constant, 0, gaps)
        places = torch.nn.functional.pad(gaps.cumsum(1), (1, 0))
        return torch.zeros_like(places).scatter_(1, order, places)

    def _place(self, points: Tensor) -> None:
        scaled = points * self.spec.inverse_step
        scaled = scaled - scaled.amin(1, keepdim=True).floor() if scaled.numel() else scaled
        cell = scaled.floor()
        self.cell = cell.long()
        self.cells = int(self.cell.max()) + 1 if scaled.numel() else 1
        place = (scaled - cell - 0.5).to(self.dtype)
        self.weights = _lagrange_weights(place, self.spec.stencil)

    def rank_sums(self, with_density: bool) -> tuple[Tensor, Tensor]:
        """Σ_k Φ((x_j − x_k)/τ), k = j included, and Σ_k φ: [N, m] (the latter empty if not wanted)."""
        if self.order is not None:  # the backward sums its pairs itself
            sums = self._pair_sums()
            return sums, torch.zeros_like(sums if with_density else sums[:0, 0])
        mass = self._spread(self.only_kept(torch.ones_like(self.weights[0])))
        sums = self._gather(self._convolve(mass, "cdf"))
        if not with_density:
            return sums, sums.new_empty(0)
        return sums, self._gather(self._convolve(mass, "pdf"))

    def slope_sums(self, slope: Tensor, density: Tensor) -> Tensor:
        """Σ_k (slope_j − slope_k) φ((x_j − x_k)/τ): [N, m]."""
        if self.order is not None:
            return self._pair_slopes(slope)
        return slope * density - self._gather(self._convolve(self._spread(slope), "pdf"))

    def _spread(self, weight: Tensor) -> Tensor:
        # In float64: where many points fall together, fp32 would round all their terms the same way.
        nodes = _wide(weight.new_zeros(weight.shape[0], self.cells + self.spec.stencil - 1))
        for n, stencil in enumerate(self.weights):
            nodes.scatter_add_(1, self.cell + n, _wide(stencil * weight))
        return nodes.to(self.dtype)

    def _gather(self, nodes: Tensor) -> Tensor:
        total = torch.zeros_like(self.weights[0])
        for n, stencil in enumerate(self.weights):
            total.addcmul_(stencil, nodes.gather(1, self.cell + n))
        return total

    def _convolve(self, mass: Tensor, kind: str) -> Tensor:
        """Mass [N, nodes] convolved with Φ or φ: in blocks, each against itself and its neighbours."""
        block, count = self.spec.band, mass.shape[1]
        blocks = -(-count // block)
        padded = torch.nn.functional.pad(mass, (block, block + blocks * block - count))
        windows = padded.unfold(1, 3 * block, block)  # [N, blocks, 3 block]
        taps = _taps(self.relaxation, kind, mass.dtype, mass.device)
        result = windows @ taps
        if kind == "cdf":  # what lies below a block's window counts in full
            totals = padded.unfold(1, block, block).sum(2)
            below = totals.cumsum(1)[:, :blocks] - totals[:, :blocks]
            result = result + below[:, :, None]
        return result.flatten(1)[:, :count]

    def _neighbours(self, kept: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """The pairs within the support, points in order, at every distance in rank.

        As (the lower ones, the upper ones, their gaps, 1 or 0: are both kept?).
        """
        assert self.order is not None
        places = self.points.gather(1, self.order)
        for offset in range(1, places.shape[1]):
            lower, upper = slice(None, -offset), slice(offset, None)
            gap = places[:, upper] - places[:, lower]
            if not bool((gap <= self.spec.support).any()):
                break
            yield lower, upper, gap, kept[:, upper] * kept[:, lower]

    def _in_order(self, x: Tensor) -> Tensor:
        assert self.order is not None
        return _wide(x).gather(1, self.order)

    def _by_point(self, total: Tensor) -> Tensor:
        assert self.order is not None
        return torch.zeros_like(total).scatter_(1, self.order, total).to(self.dtype)

    def _pair_sums(self) -> Tensor:
        """rank_sums over the pairs within the support."""
        kept = self._in_order(self.only_kept(torch.ones_like(self.points)))
        total = kept.cumsum(1) - kept / 2
        for lower, upper, gap, both in self._neighbours(kept):
            above = both * self.relaxation.cdf(-gap)  # of the lower point over the upper
            total[:, upper] -= above
            total[:, lower] += above
        return self._by_point(total)

    def _pair_slopes(self, slope: Tensor) -> Tensor:
        kept = self._in_order(self.only_kept(torch.ones_like(self.points)))
        ordered = self._in_order(slope)
        total = torch.zeros_like(ordered)
        for lower, upper, gap, both in self._neighbours(kept):
            push = ordered[:, upper] - ordered[:, lower]
            push = push * both * self.relaxation.pdf(gap)
            total[:, upper] += push
            total[:, lower] -= push
        return self._by_point(total)


def _count(x: Tensor, keep: Tensor | None) -> Tensor:
    """How many values of each row of x [N, m] are there: [N, 1], in the dtype of x."""
    if keep is None:
        return torch.full_like(x[:, :1], x.shape[1])
    return keep.sum(1, keepdim=True).to(x.dtype)


def _fits(points: Tensor, limit: float) -> bool:
    """Whether every row of points spans at most `limit`."""
    return points.numel() == 0 or bool((points.amax(1) - points.amin(1)).max() <= limit)


def _wide(x: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()


def _lagrange_weights(place: Tensor, count: int) -> list[Tensor]:
    """Weights of the `count` nodes around the cell, for u in [−½, ½] inside it."""
    nodes = [n - (count - 1) / 2 for n in range(count)]
    below, above = [torch.ones_like(place)], [torch.ones_like(place)]
    for n in range(count - 1):
        below.append(below[-1] * (place - nodes[n]))
        above.append(above[-1] * (place - nodes[count - 1 - n]))
    weights = []
    for n in range(count):
        scale = 1.0
        for k in range(count):
            scale *= nodes[n] - nodes[k] if k != n else 1.0
        weights.append(below[n] * above[count - 1 - n] / scale)
    return weights


@lru_cache(maxsize=64)
def _taps(relaxation: Relaxation, kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The constant matrix [3 band, band] from a window of nodes to the block in its middle."""
    spec = relaxation.grid(dtype)
    source = torch.arange(3 * spec.band, dtype=torch.float64) - spec.band
    target = torch.arange(spec.band, dtype=torch.float64)
    x = (target[None, :] - source[:, None]) / spec.inverse_step
    values = relaxation.cdf(x) if kind == "cdf" else relaxation.pdf(x)
    return values.to(dtype=dtype, device=device)
