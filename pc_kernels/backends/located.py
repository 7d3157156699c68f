"""Points of rows, located for sums over pairs: on a grid, or in a row that is nearly hard.

The grid and its stencil are those of docs/method.md, Eq. 4 and 7, the nearly hard rows of its "Regimes".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
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
    """All of a row on one grid: the cell of each point, and its place u in [−½, ½] there."""

    def __init__(self, points: Tensor, keep: Tensor | None, setting: Setting) -> None:
        """Places points ≥ 0 on the grid; 0 where the cut stencil is exact ("Clumps")."""
        super().__init__(points, keep, setting)
        terms = setting.spec.terms
        zero = 0.5 - math.cos((terms - 1) * math.pi / (2 * terms)) / 2
        scaled = (points * setting.spec.inverse_step).add_(zero)
        self.cell = scaled.long()
        self.cells = int(scaled.amax()) + 1
        self.place = scaled.frac_().to(setting.dtype) - 0.5
        self.stencil = stencil_of(setting.spec, setting.dtype, points.device)

    def sums(self, weight: Tensor, kernels: tuple[str, ...]) -> list[Tensor]:
        """See `Located`."""
        return [self._gather(nodes) for nodes in self._convolve(self._spread(weight), kernels)]

    def slope_sums(self, slope: Tensor, density: Tensor) -> Tensor:
        """See `Located`."""
        (weighted,) = self.sums(slope, ("pdf",))
        return torch.addcmul(weighted.neg_(), slope, density)

    def _spread(self, weight: Tensor) -> Tensor:
        """Masses at the nodes, of the moments Σ_k w_k u_k^a of the cells: [N, cells + stencil]."""
        cell, place = self.cell[:, self.setting.sources], self.place[:, self.setting.sources]
        (terms, width), rows = self.stencil.shape, len(weight)
        # In float64: where many points fall together, fp32 would round all their sums the same way.
        length = rows * (self.cells + width) + 1
        moments = in_double(weight.new_zeros(0)).new_zeros(terms, length)
        for a, sums in enumerate(moments[:, :-1].view(terms, rows, -1)):
            weight = weight * place if a else weight
            sums.scatter_add_(1, cell, in_double(weight))
        shares = self.stencil.T @ moments.to(self.setting.dtype)
        # The n-th node of a cell's stencil is n nodes further. All rows end in zeros, so shares of all
        # of them are shifted by n at once.
        return shares.view(-1)[:-width].view(width, -1).sum(0).view(rows, -1)

    def _gather(self, nodes: Tensor) -> Tensor:
        """The polynomials of the cells, of the nodes around them, at the queries."""
        cell, place = self.cell[:, self.setting.queries], self.place[:, self.setting.queries]
        (terms, width), rows = self.stencil.shape, len(nodes)
        around = pad(nodes.reshape(-1), (0, width - 1)).unfold(0, width, 1)
        *lower, total = (self.stencil @ around.T).view(terms, rows, -1)
        total = total.gather(1, cell)
        for coefficient in reversed(lower):
            total = coefficient.gather(1, cell).addcmul_(total, place)
        return total

    def _convolve(self, mass: Tensor, kernels: tuple[str, ...]) -> list[Tensor]:
        """Mass [N, nodes] convolved with kernels, in blocks, each with itself and its neighbours.

        The results are of whole blocks, [N, nodes or more].
        """
        spec, (rows, count) = self.setting.spec, mass.shape
        block = spec.band
        blocks = -(-count // block)
        padded = pad(mass, (block, block + blocks * block - count))
        windows = padded.unfold(1, 3 * block, block).reshape(-1, 3 * block)
        taps = _taps(self.setting.step, spec, kernels, mass.dtype, mass.device)
        results = (windows @ taps).view(rows, blocks, len(kernels), block).unbind(2)
        totals = padded.view(rows, blocks + 2, block).sum(2)
        below = (totals.cumsum(1) - totals)[:, :blocks, None]  # a block's window: it counts in full
        found = []
        for kernel, sums in zip(kernels, results, strict=True):
            if kernel == "cdf":
                sums = sums + below
            if kernel == "integral":  # in proportion to its distance
                sums = sums + self._ramp(padded, below)
            found.append(sums.flatten(1))
        return found

    def _ramp(self, padded: Tensor, below: Tensor) -> Tensor:
        """Σ of the masses `below` each block's window, times their distances: [N, blocks, block].

        That is the distance from a block to the next one up, added up block by block, and the last few
        nodes to the target: terms of one sign, so that small sums keep their digits.
        """
        block = self.setting.spec.band
        node = torch.arange(block, dtype=padded.dtype, device=padded.device)
        to_next = padded.view(len(padded), -1, block) @ (block - node)
        to_start = (to_next.cumsum(1) - to_next)[:, : below.shape[1], None]
        to_start = to_start + block * below.cumsum(1)
        return (to_start + below * node) / self.setting.spec.inverse_step


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
        grid = Grid(self.places[row, place] - self.places[row, first], present, every_point)
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
            more = {
                "pdf": torch.zeros_like(below["cdf"]),
                "cdf": below["cdf"],
                "integral": below["integral"] + below["cdf"] * p.grid.points,
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


def in_order(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x [N, m] in order, and where each value is from; NaN is last, it may be as infinity.

    On a CPU, NumPy sorts numbers ten times as fast as PyTorch sorts numbers and their places. So the
    places go into the bits that a float32 leaves free in a float64.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[1] > 1 << 28:
        return x.sort(dim=1)
    wide = x.double().nan_to_num_(2.0**129, 2.0**129, -(2.0**129))  # infinities have no bits free
    bits = wide.view(torch.int64).bitwise_or_(torch.arange(x.shape[1]))
    wide.numpy().sort(axis=1)
    return wide.to(torch.float32), bits & ((1 << 29) - 1)


@lru_cache(maxsize=16)
def stencil_of(spec: GridSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    """K [terms, stencil] of docs/method.md, Eq. 7: what the nodes around a cell are to its polynomial."""
    nodes = np.arange(spec.stencil) - (spec.stencil - 1) / 2
    columns = []
    for n, node in enumerate(nodes):
        others = np.delete(nodes, n)
        lagrange = Polynomial.fromroots(others) / np.prod(node - others)
        series = lagrange.convert(kind=Chebyshev, domain=[-0.5, 0.5])
        columns.append(series.truncate(spec.terms).convert(kind=Polynomial).coef)
    return torch.from_numpy(np.stack(columns, 1)).to(dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _taps(
    step: Relaxation,
    spec: GridSpec,
    kernels: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The constant matrices [3 band, band] from a window of nodes to the block in its middle."""
    source = torch.arange(3 * spec.band, dtype=torch.float64) - spec.band
    target = torch.arange(spec.band, dtype=torch.float64)
    x = (target - source[:, None]) / spec.inverse_step
    hard = {"pdf": torch.zeros_like(x), "cdf": (x > 0).double(), "integral": x.clamp(min=0)}
    seen = x.abs() <= spec.support
    taps = [torch.where(seen, step.kernel(kernel)(x), hard[kernel]) for kernel in kernels]
    return torch.cat(taps, 1).to(dtype=dtype, device=device)
