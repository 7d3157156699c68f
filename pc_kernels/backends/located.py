"""Points of rows, located for sums over pairs: on a grid, or in a row that is nearly hard.

The grid and its stencil are those of docs/method.md, Eq. 4 and 7, the nearly hard rows of its "Regimes".
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formulas import GridSpec, Projection, Relaxation

MOST_NEIGHBOURS = 40
"""Of a nearly hard row, points that see more others than this are served by a grid."""

ALL = slice(None)


class Setting(NamedTuple):
    """What the points of all rows have in common."""

    relaxation: Relaxation | Projection
    dtype: torch.dtype
    """Of sums."""
    far: bool = False
    """Whether small sums have to be right, so that the grid's support is its reach."""
    sources: slice = ALL
    """The points that may have a weight."""
    queries: slice = ALL
    """The points where sums are wanted."""

    @property
    def spec(self) -> GridSpec:
        """The grid, of a relaxation that has one."""
        spec = self.step.grid(self.dtype)
        return spec.far if self.far else spec

    @property
    def step(self) -> Relaxation:
        """The relaxation, if it has a Φ."""
        assert isinstance(self.relaxation, Relaxation)
        return self.relaxation

    def of_all(self, weight: Tensor, points: Tensor) -> Tensor:
        """The weights [N, m] of the sources as weights of all points [N, P], 0 elsewhere."""
        if self.sources == ALL:
            return weight
        whole = weight.new_zeros(points.shape)
        whole[:, self.sources] = weight
        return whole


class Located:
    """Rows of points [N, P] in units of the temperature, some absent, ready for sums over pairs."""

    def __init__(self, points: Tensor, keep: Tensor | None, setting: Setting) -> None:
        """Takes the points; `keep` [N, P]: whether they are there."""
        self.points = points
        self.keep = keep
        self.setting = setting

    def sums(self, weight: Tensor, kernels: tuple[str, ...]) -> list[Tensor]:
        """Σ_k weight_k K(x_j − x_k), k = j included, at the queries, for each kernel K: [N, n].

        `weight` [N, m] is that of the sources, 0 for what is absent.
        """
        raise NotImplementedError

    def rank_sums(self, weight: Tensor, with_density: bool) -> list[Tensor]:
        """`sums` of Φ, and of φ if `slope_sums` will want it."""
        return self.sums(weight, ("cdf", "pdf") if with_density else ("cdf",))

    def slope_sums(self, slope: Tensor, density: Tensor) -> Tensor:
        """Σ_k (slope_j − slope_k) φ(x_j − x_k), with `rank_sums`' density; what is absent has slope 0."""
        raise NotImplementedError


class Grid(Located):
    """All of a row on one grid."""

    def __init__(self, points: Tensor, keep: Tensor | None, setting: Setting) -> None:
        """Places the points on the grid."""
        super().__init__(points, keep, setting)
        scaled = points * setting.spec.inverse_step
        scaled = scaled - scaled.amin(1, keepdim=True).floor() if scaled.numel() else scaled
        cell = scaled.floor()
        self.cell = cell.long()
        self.cells = int(self.cell.max()) + 1 if scaled.numel() else 1
        place = (scaled - cell - 0.5).to(setting.dtype)
        self.weights = lagrange_weights(place, setting.spec.stencil)

    def sums(self, weight: Tensor, kernels: tuple[str, ...]) -> list[Tensor]:
        """See `Located`."""
        mass = self._spread(weight)
        return [self._gather(self._convolve(mass, kernel)) for kernel in kernels]

    def slope_sums(self, slope: Tensor, density: Tensor) -> Tensor:
        """See `Located`."""
        (weighted,) = self.sums(slope, ("pdf",))
        return slope * density - weighted

    def _spread(self, weight: Tensor) -> Tensor:
        # In float64: where many points fall together, fp32 would round all their terms the same way.
        at = self.setting.sources
        stencil = self.setting.spec.stencil
        nodes = in_double(weight.new_zeros(weight.shape[0], self.cells + stencil - 1))
        for n, share in enumerate(self.weights):
            nodes.scatter_add_(1, self.cell[:, at] + n, in_double(share[:, at] * weight))
        return nodes.to(self.setting.dtype)

    def _gather(self, nodes: Tensor) -> Tensor:
        at = self.setting.queries
        total = torch.zeros_like(self.weights[0][:, at])
        for n, share in enumerate(self.weights):
            total.addcmul_(share[:, at], nodes.gather(1, self.cell[:, at] + n))
        return total

    def _convolve(self, mass: Tensor, kernel: str) -> Tensor:
        """Mass [N, nodes] convolved with a kernel: in blocks, each against itself and its neighbours."""
        block, count = self.setting.spec.band, mass.shape[1]
        blocks = -(-count // block)
        padded = pad(mass, (block, block + blocks * block - count))
        windows = padded.unfold(1, 3 * block, block)  # [N, blocks, 3 block]
        taps = _taps(self.setting.step, self.setting.spec, kernel, mass.dtype, mass.device)
        result = windows @ taps
        if kernel != "pdf":  # what lies below a block's window counts in full
            totals = padded.unfold(1, block, block).sum(2)
            below = totals.cumsum(1)[:, :blocks] - totals[:, :blocks]
        if kernel == "cdf":
            result = result + below[:, :, None]
        if kernel == "integral":  # in proportion to its distance
            result = result + self._ramp(padded, below, block)
        return result.flatten(1)[:, :count]

    def _ramp(self, padded: Tensor, below: Tensor, block: int) -> Tensor:
        """Σ of the masses below each block's window, times their distances: [N, blocks, block].

        That is the distance from a block to the next one up, added up block by block, and the last few
        nodes to the target: terms of one sign, so that small sums keep their digits.
        """
        node = torch.arange(block, dtype=padded.dtype, device=padded.device)
        to_next = padded.unfold(1, block, block) @ (block - node)
        to_start = to_next.cumsum(1)[:, : below.shape[1]] - to_next[:, : below.shape[1]]
        to_start = to_start + block * below.cumsum(1)
        return (to_start[:, :, None] + below[:, :, None] * node) / self.setting.spec.inverse_step


class _Pieces(NamedTuple):
    """Neighbours in order of which most see many others, of like numbers: [P, size], padded."""

    row: Tensor
    """[P, 1], where they are from."""
    first: Tensor
    """[P, 1], the first of their points in that row's order."""
    place: Tensor
    """Of their points in that row's order, what they see included."""
    present: Tensor
    """bool: no padding, and kept."""
    served: Tensor
    """bool: the points whose sums these are; the others are only seen."""
    grid: Grid


class NearlyHard(Located):
    """Crowded pieces of a row on grids of their own, and the pairs of the isolated points."""

    def __init__(self, points: Tensor, keep: Tensor | None, setting: Setting) -> None:
        """Sorts the points and finds the pieces."""
        super().__init__(points, keep, setting)
        self.places, self.order = points.sort(dim=1)
        there = torch.ones_like(points, dtype=torch.bool) if keep is None else keep
        self.kept = there.gather(1, self.order)
        support = setting.spec.support
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
        starts[1:] = (row.diff() != 0) | (place.diff() > self.setting.spec.support)
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
        served = valid & (place >= begin) & (place <= end)
        every_point = self.setting._replace(sources=ALL, queries=ALL)
        grid = Grid(self.places[row, place], present, every_point)
        return _Pieces(row, first, place, present, served, grid)

    def sums(self, weight: Tensor, kernels: tuple[str, ...]) -> list[Tensor]:
        """See `Located`."""
        mass = self._in_order(self.setting.of_all(weight, self.points))
        totals = [self._sums_by_pairs(mass, kernel) for kernel in kernels]
        self._serve_pieces(totals, mass, kernels)
        return [self._by_point(total)[:, self.setting.queries] for total in totals]

    def rank_sums(self, weight: Tensor, with_density: bool) -> list[Tensor]:
        """See `Located`; isolated points have no use for a density, theirs is 0."""
        mass = self._in_order(weight)
        totals = [self._sums_by_pairs(mass, "cdf"), torch.zeros_like(mass)][: 1 + with_density]
        self._serve_pieces(totals, mass, ("cdf", "pdf")[: 1 + with_density])
        return [self._by_point(total) for total in totals]

    def slope_sums(self, slope: Tensor, density: Tensor) -> Tensor:
        """See `Located`."""
        ordered, density = self._in_order(slope), self._in_order(density)
        kept = self.kept.to(ordered.dtype)
        total = torch.zeros_like(ordered)
        for lower, upper, density_between in self._neighbours("pdf"):
            push = ordered[:, upper] - ordered[:, lower]
            push = push * kept[:, upper] * kept[:, lower] * density_between
            total[:, upper] += push
            total[:, lower] -= push
        for p in self.pieces:
            own = ordered[p.row, p.place]
            (weighted,) = p.grid.sums(self._mass_of(p, ordered), ("pdf",))
            self._put(total, p, own * density[p.row, p.place] - weighted)
        return self._by_point(total)

    def _in_order(self, x: Tensor) -> Tensor:
        return in_double(x).gather(1, self.order)

    def _sums_by_pairs(self, mass: Tensor, kernel: str) -> Tensor:
        """Sums over the neighbours of isolated points, in order; all that is below counts in full."""
        total = self._hard_sums(mass, kernel)
        total += mass * self.setting.step.kernel(kernel)(mass.new_zeros(()))
        for lower, upper, tail in self._neighbours(kernel):
            if kernel == "cdf":
                total[:, upper] -= mass[:, lower] * tail
            else:
                total[:, upper] += mass[:, lower] * tail
            total[:, lower] += mass[:, upper] * tail
        return total

    def _hard_sums(self, mass: Tensor, kernel: str) -> Tensor:
        """Sums over what is below in the order, as if it were far: of 0, 1 or the distance."""
        if kernel == "pdf":
            return torch.zeros_like(mass)
        below = pad(mass.cumsum(1)[:, :-1], (1, 0))
        if kernel == "cdf":
            return below
        return pad((below[:, 1:] * self.places.diff(dim=1)).cumsum(1), (1, 0))

    def _serve_pieces(self, totals: list[Tensor], mass: Tensor, kernels: tuple[str, ...]) -> None:
        """Sets the sums of crowded points; pairs may have left something there."""
        if not self.pieces:
            return
        far = {kernel: self._hard_sums(mass, kernel) for kernel in ("cdf", "integral")}
        for p in self.pieces:
            sums = p.grid.sums(self._mass_of(p, mass), kernels)
            below = {kernel: hard[p.row, p.first] for kernel, hard in far.items()}
            distance = self.places[p.row, p.place] - self.places[p.row, p.first]
            more = {
                "pdf": torch.zeros_like(distance),
                "cdf": below["cdf"],
                "integral": below["integral"] + below["cdf"] * distance,
            }
            for kernel, total, here in zip(kernels, totals, sums, strict=True):
                self._put(total, p, in_double(here) + more[kernel])

    def _mass_of(self, p: _Pieces, mass: Tensor) -> Tensor:
        return torch.where(p.present, mass[p.row, p.place], 0).to(self.setting.dtype)

    def _neighbours(self, kernel: str) -> Iterator[tuple[slice, slice, Tensor]]:
        """The pairs that isolated points see, at every distance in rank.

        Yields:
            The lower and the upper points, and the kernel of the lower over the upper: beyond the support
            0, since gaps may be closed there.
        """
        formula, support = self.setting.step.kernel(kernel), self.setting.spec.support
        for offset in range(1, self.most_seen + 1):
            lower, upper = slice(None, -offset), slice(offset, None)
            gap = self.places[:, upper] - self.places[:, lower]
            yield lower, upper, torch.where(gap <= support, formula(-gap), 0)

    def _put(self, total: Tensor, p: _Pieces, values: Tensor) -> None:
        row = p.row.expand_as(p.place)
        total[row[p.served], p.place[p.served]] = values[p.served]

    def _by_point(self, total: Tensor) -> Tensor:
        return torch.zeros_like(total).scatter_(1, self.order, total).to(self.setting.dtype)


def in_double(x: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()


def lagrange_weights(place: Tensor, count: int) -> list[Tensor]:
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
def _taps(
    relaxation: Relaxation, spec: GridSpec, kernel: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The constant matrix [3 band, band] from a window of nodes to the block in its middle."""
    source = torch.arange(3 * spec.band, dtype=torch.float64) - spec.band
    target = torch.arange(spec.band, dtype=torch.float64)
    x = (target[None, :] - source[:, None]) / spec.inverse_step
    hard = {"pdf": torch.zeros_like(x), "cdf": (x > 0).double(), "integral": x.clamp(min=0)}
    taps = torch.where(x.abs() <= spec.support, relaxation.kernel(kernel)(x), hard[kernel])
    return taps.to(dtype=dtype, device=device)
