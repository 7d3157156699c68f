"""The `torch` backend's ranks: the grid method in plain PyTorch, on any device, O(m) a row.

A row's soft ranks are one smooth function F(x) = Σ_k Φ((x − x_k)/τ) read at the row's own points.
*Spread* the points onto a uniform grid, *convolve* with Φ (and with φ = Φ′, for the gradient),
*gather* at the points: docs/method.md, Eq. 3-6. float32 and float64 differ only in the size of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..formulas import Relaxation

if TYPE_CHECKING:
    from ..recipe import Recipe


CELLS_PER_POINT = 8
"""Beyond this the grid costs more than a sort: rows are nearly hard (docs/method.md, "Regimes")."""

MOST_NEIGHBOURS = 40
"""Of a nearly hard row, points that see more others than this are served by a grid."""


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
    if x.numel() == 0:
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
    if x.numel() == 0:
        return x.clone()
    row = _Rows(x, recipe, keep)
    slope = row.only_kept(grad_rank / row.others)
    grad = row.only_kept(row.slope_sums(slope, density) / row.tau)
    if recipe.scale == "std":
        # Ranks are functions of x/τ, hence ∂L/∂τ = −Σ_k grad_k (x_k − mean)/τ.
        grad = grad - row.standard * row.mean(grad * row.standard)
    return row.only_kept(row.settle(grad, 0.0).to(x.dtype))


class _Rows:
    """Rows x [N, m] in units of their temperature, located in groups that are alike."""

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
        self.groups = self._in_groups(points, wide)

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

    def _in_groups(self, points: Tensor, wide: Tensor) -> list[tuple[Tensor | None, _Located]]:
        """Rows of like size together: a row is padded to the widest of its group. None: all of them.

        Grids of up to one cell a point are alike, since their points cost more; then sizes double. But
        grids stay together where padding does not even double their cells: a group more costs more.
        """
        count = points.shape[1]
        cells = _span(points) * self.spec.inverse_step
        far = (~(cells <= CELLS_PER_POINT * count)).nonzero()[:, 0]
        if len(far):
            points[far] = self._close_gaps(wide[far], far)
            cells[far] = _span(points[far]) * self.spec.inverse_step
        level = torch.log2(cells / count).ceil_().clamp_(0, math.log2(CELLS_PER_POINT) + 1)
        grid = level <= math.log2(CELLS_PER_POINT)
        sizes = cells[grid].clamp(min=count)
        if len(sizes) > 0 and bool(sizes.max() * len(sizes) <= 2 * sizes.sum()):
            level[grid] = level[grid].max()
        levels = sorted(set(level.tolist()))
        groups: list[tuple[Tensor | None, _Located]] = []
        for here in levels:
            rows = None if len(levels) == 1 else (level == here).nonzero()[:, 0]
            kind = _Grid if here <= math.log2(CELLS_PER_POINT) else _NearlyHard
            own = points if rows is None else points[rows]
            keep = self.keep if rows is None or self.keep is None else self.keep[rows]
            groups.append((rows, kind(own, keep, self.relaxation, self.dtype)))
        return groups

    def _close_gaps(self, x: Tensor, rows: Tensor) -> Tensor:
        """Places of these rows in units of τ, with gaps beyond the support closed to just over it.

        Points so far apart do not see each other, however far apart they are.
        """
        ordered, order = x.sort(dim=1)
        gaps = (ordered.diff(dim=1) / self.tau[rows]).clamp(max=self.spec.support + 1)
        gaps = torch.where(self.constant[rows], 0, gaps)
        places = torch.nn.functional.pad(gaps.cumsum(1), (1, 0))
        return torch.zeros_like(places).scatter_(1, order, places)

    def rank_sums(self, with_density: bool) -> tuple[Tensor, Tensor]:
        """Σ_k Φ((x_j − x_k)/τ), k = j included, and Σ_k φ: [N, m] (the latter empty if not wanted)."""
        parts = [located.rank_sums(with_density) for _, located in self.groups]
        sums, density = zip(*parts, strict=True)
        return self._together(sums), self._together(density) if with_density else density[0]

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


class _Located:
    """Rows of points [N, m] in units of the temperature, some absent, ready for sums over pairs."""

    def __init__(
        self, points: Tensor, keep: Tensor | None, relaxation: Relaxation, dtype: torch.dtype
    ) -> None:
        self.points = points
        self.keep = keep
        self.relaxation = relaxation
        self.spec = relaxation.grid(dtype)
        self.dtype = dtype

    def rank_sums(self, with_density: bool) -> tuple[Tensor, Tensor]:
        """See `_Rows`."""
        raise NotImplementedError

    def slope_sums(self, slope: Tensor, density: Tensor) -> Tensor:
        """See `_Rows`; the slope of what is absent is 0."""
        raise NotImplementedError


class _Grid(_Located):
    """All of a row on one grid."""

    def __init__(
        self, points: Tensor, keep: Tensor | None, relaxation: Relaxation, dtype: torch.dtype
    ) -> None:
        super().__init__(points, keep, relaxation, dtype)
        scaled = points * self.spec.inverse_step
        scaled = scaled - scaled.amin(1, keepdim=True).floor() if scaled.numel() else scaled
        cell = scaled.floor()
        self.cell = cell.long()
        self.cells = int(self.cell.max()) + 1 if scaled.numel() else 1
        place = (scaled - cell - 0.5).to(dtype)
        self.weights = _lagrange_weights(place, self.spec.stencil)

    def rank_sums(self, with_density: bool) -> tuple[Tensor, Tensor]:
        """See `_Rows`."""
        ones = torch.ones_like(self.weights[0])
        mass = self._spread(ones if self.keep is None else torch.where(self.keep, ones, 0))
        sums = self._gather(self._convolve(mass, "cdf"))
        if not with_density:
            return sums, sums.new_empty(0)
        return sums, self._gather(self._convolve(mass, "pdf"))

    def slope_sums(self, slope: Tensor, density: Tensor) -> Tensor:
        """See `_Rows`."""
        return slope * density - self.weighted_density(slope)

    def weighted_density(self, weight: Tensor) -> Tensor:
        """Σ_k weight_k φ((x_j − x_k)/τ)."""
        return self._gather(self._convolve(self._spread(weight), "pdf"))

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


class _Pieces(NamedTuple):
    """Neighbours in order of which most see many others, of like numbers: [P, size], padded."""

    row: Tensor
    """[P, 1], where they are from."""
    place: Tensor
    """Of their points in that row's order, what they see included."""
    present: Tensor
    """bool: no padding, and kept."""
    served: Tensor
    """bool: the points whose sums these are; the others are only seen."""
    below: Tensor
    """[P, 1], how many points that are kept lie below."""
    grid: _Grid


class _NearlyHard(_Located):
    """Crowded pieces of a row on grids of their own, and the pairs of the isolated points."""

    def __init__(
        self, points: Tensor, keep: Tensor | None, relaxation: Relaxation, dtype: torch.dtype
    ) -> None:
        super().__init__(points, keep, relaxation, dtype)
        self.places, self.order = points.sort(dim=1)
        there = torch.ones_like(points, dtype=torch.bool) if keep is None else keep
        self.kept = there.gather(1, self.order)
        support = self.spec.support
        self.first = torch.searchsorted(self.places, self.places - support)
        self.past = torch.searchsorted(self.places, self.places + support, right=True)
        seen = self.past - self.first - 1
        crowded = seen > MOST_NEIGHBOURS
        self.most_seen = int(torch.where(crowded, 0, seen).max())
        self.pieces = self._in_pieces(crowded)

    def _in_pieces(self, crowded: Tensor) -> list[_Pieces]:
        """From a crowded point to the last that is within the support of the one before."""
        row, k = crowded.nonzero(as_tuple=True)
        if len(row) == 0:
            return []
        place = self.places[row, k]
        starts = torch.ones_like(row, dtype=torch.bool)
        starts[1:] = (row.diff() != 0) | (place.diff() > self.spec.support)
        ends = torch.ones_like(starts)
        ends[:-1] = starts[1:]
        row, begin, end = row[starts], k[starts], k[ends]
        first, past = self.first[row, begin], self.past[row, end]
        level = torch.log2((past - first).float()).ceil()
        return [
            self._piece_group(*(x[level == here][:, None] for x in (row, first, past, begin, end)))
            for here in sorted(set(level.tolist()))
        ]

    def _piece_group(
        self, row: Tensor, first: Tensor, past: Tensor, begin: Tensor, end: Tensor
    ) -> _Pieces:
        """Pieces [P, 1] on grids: points first … past−1, of which begin … end are served."""
        place = first + torch.arange(int((past - first).max()), device=first.device)
        valid = place < past
        place = torch.where(valid, place, first)
        present = valid & self.kept[row, place]
        below = (self.kept.cumsum(1) - self.kept.long())[row, first]
        served = valid & (place >= begin) & (place <= end)
        points = self.places[row, place]
        grid = _Grid(points, present, self.relaxation, self.dtype)
        return _Pieces(row, place, present, served, below, grid)

    def rank_sums(self, with_density: bool) -> tuple[Tensor, Tensor]:
        """See `_Rows`; isolated points have no use for a density, theirs is 0."""
        kept = _wide(self.kept.to(self.dtype))
        total, density = kept.cumsum(1) - kept / 2, torch.zeros_like(kept)
        for lower, upper, gap in self._neighbours():
            above = self.relaxation.cdf(-gap)  # of the lower point over the upper
            total[:, upper] -= kept[:, lower] * above
            total[:, lower] += kept[:, upper] * above
        for p in self.pieces:
            sums, here = p.grid.rank_sums(with_density)
            self._put(total, p, _wide(sums) + p.below)
            if with_density:
                self._put(density, p, _wide(here))
        return self._by_point(total), self._by_point(density) if with_density else total[:0, 0]

    def slope_sums(self, slope: Tensor, density: Tensor) -> Tensor:
        """See `_Rows`."""
        ordered, density = (_wide(x).gather(1, self.order) for x in (slope, density))
        kept = self.kept.to(ordered.dtype)
        total = torch.zeros_like(ordered)
        for lower, upper, gap in self._neighbours():
            push = ordered[:, upper] - ordered[:, lower]
            push = push * kept[:, upper] * kept[:, lower] * self.relaxation.pdf(gap)
            total[:, upper] += push
            total[:, lower] -= push
        for p in self.pieces:
            own = ordered[p.row, p.place]
            weighted = p.grid.weighted_density(torch.where(p.present, own, 0).to(self.dtype))
            self._put(total, p, own * density[p.row, p.place] - weighted)
        return self._by_point(total)

    def _neighbours(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """The pairs that isolated points see, at every distance in rank: lower, upper, gaps."""
        for offset in range(1, self.most_seen + 1):
            lower, upper = slice(None, -offset), slice(offset, None)
            yield lower, upper, self.places[:, upper] - self.places[:, lower]

    def _put(self, total: Tensor, p: _Pieces, values: Tensor) -> None:
        """Sets what the pieces serve; pairs may have left something there."""
        row = p.row.expand_as(p.place)
        total[row[p.served], p.place[p.served]] = values[p.served]

    def _by_point(self, total: Tensor) -> Tensor:
        return torch.zeros_like(total).scatter_(1, self.order, total).to(self.dtype)


def _count(x: Tensor, keep: Tensor | None) -> Tensor:
    """How many values of each row of x [N, m] are there: [N, 1], in the dtype of x."""
    if keep is None:
        return torch.full_like(x[:, :1], x.shape[1])
    return keep.sum(1, keepdim=True).to(x.dtype)


def _span(points: Tensor) -> Tensor:
    """How far the points of rows [N, m] are spread: [N]."""
    return points.amax(1) - points.amin(1)


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
