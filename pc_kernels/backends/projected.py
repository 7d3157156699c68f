"""Ranks by projection in plain PyTorch: isotonic regression by merging, O(m log² m) a row.

The projection of s onto the permutahedron of w, both descending, is s − v, v the isotonic regression
that is constant on blocks of neighbours: mean s − mean w, or log Σ eˢ − log Σ eʷ
(`reference.isotonic`). So all there is to find is the blocks. csrc/cpu/projection.h has the same by
pooling adjacent violators.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formulas import Projection
from .located import Located, Setting, in_double

LONGEST_PROJECTED = 1 << 24
"""Places in longer rows are not exact in float32, in which blocks are kept for the backward."""


def isotonic_blocks(s: Tensor, w: Tensor, kl: bool) -> Tensor:
    """See `Backend.isotonic_blocks`.

    Halves that are isotonic are merged until one is left, all of a size at once. Merging pools one block:
    the end of the left half and the beginning of the right, up to where the block's value would not
    ascend.
    """
    rows, count = s.shape
    if count == 0:
        return s.new_empty(s.shape, dtype=torch.int64)
    size = 1 << (count - 1).bit_length()
    v, weight = s - w, w if kl else torch.ones_like(w)
    lowest = v.amin(1, keepdim=True)
    lowest = lowest - lowest.abs() - 1  # never pooled
    v = torch.cat([v, lowest.expand(-1, size - count)], 1)
    weight = torch.cat([weight, weight[:, -1:].expand(-1, size - count)], 1)
    half = 1
    while half < size:
        left, right = v.view(rows, -1, 2, half).unbind(2)
        v = _merged(left, right, weight.view(rows, -1, 2, half), kl).view(rows, size)
        half *= 2
    place = torch.arange(count, device=s.device)
    starts = pad(v[:, :count].diff(dim=1) != 0, (1, 0), value=True)
    return torch.where(starts, place, 0).cummax(1).values


def _merged(left: Tensor, right: Tensor, weight: Tensor, kl: bool) -> Tensor:
    """Descending halves [N, S, h] with these weights [N, S, 2, h], merged: [N, S, 2, h]."""
    half = left.shape[2]
    last, first = left[:, :, -1:], right[:, :, :1]
    # Relative to where the halves meet no digits are lost; values beyond are never pooled.
    below, above = left - first, right - first
    bases = [part.clamp(min=last - first).clamp(max=0) for part in (below, above)]
    totals = [base + weight[:, :, i] if kl else base for i, base in enumerate(bases)]
    ends = [_sums(x.flip(2), kl) for x in (totals[0], weight[:, :, 0])]
    starts = [_sums(x, kl) for x in (totals[1], weight[:, :, 1])]

    def value(of_left: Tensor, of_right: Tensor) -> Tensor:
        """Of a block that takes so many places of either half."""
        parts = [
            (end.gather(2, of_left), start.gather(2, of_right))
            for end, start in zip(ends, starts, strict=True)
        ]
        total, number = (a.logaddexp(b) if kl else a + b for a, b in parts)
        return total - number if kl else total / number

    # A value is pooled if the block up to it, and up to its like in the other half, ascends from it.
    place = torch.arange(half, device=left.device).expand(left.shape)
    rising = [(-below).contiguous(), (-above).contiguous()]
    higher = torch.searchsorted(rising[1], rising[0])
    lower = half - torch.searchsorted(rising[0], rising[1], right=True)
    of_left = (below < value(half - place, higher)).sum(2, keepdim=True).clamp(min=1)
    of_right = (above > value(lower, place + 1)).sum(2, keepdim=True).clamp(min=1)
    # Blocks are pooled as a whole, whatever rounding says of their places.
    of_left = half - torch.searchsorted(rising[0], rising[0].gather(2, half - of_left))
    of_right = torch.searchsorted(rising[1], rising[1].gather(2, of_right - 1), right=True)
    pooled = first + value(of_left, of_right)
    ascends = last <= first
    new_left = torch.where(ascends & (place >= half - of_left), pooled, left)
    new_right = torch.where(ascends & (place < of_right), pooled, right)
    return torch.stack([new_left, new_right], 2)


def _sums(x: Tensor, kl: bool) -> Tensor:
    """Sums of the first 0 … h of x [N, S, h]; or logs of the sums of their exponentials."""
    return pad(x.logcumsumexp(2), (1, 0), value=-torch.inf) if kl else pad(x.cumsum(2), (1, 0))


def project(s: Tensor, w: Tensor, labels: Tensor, kl: bool) -> Tensor:
    """The projection of s onto the permutahedron of w, with these blocks; differentiable in both."""

    def average(x: Tensor) -> Tensor:
        top = x.detach().gather(1, labels)  # the first of a block is its largest
        if kl:
            return top + of_block((x - top).exp(), labels).log()
        return top + of_block(x - top, labels) / of_block(torch.ones_like(x), labels)

    return (s - average(s)) + average(w)


def of_block(x: Tensor, labels: Tensor) -> Tensor:
    """For each place or point the sum of x [N, m] over its block."""
    return torch.zeros_like(x).scatter_add(1, labels, x).gather(1, labels)


class Projected(Located):
    """Rows that are projected; their blocks are what the density is for others."""

    def __init__(self, x: Tensor, tau: Tensor, keep: Tensor | None, setting: Setting) -> None:
        """Takes the values x [N, m], in float64; tau [N, 1] is their temperature."""
        super().__init__(x, keep, setting)
        self.kl = isinstance(setting.relaxation, Projection) and setting.relaxation.kl
        self.tau = tau
        self.there = torch.ones_like(x, dtype=torch.bool) if keep is None else keep
        self.count = self.there.sum(1, keepdim=True).to(x.dtype)

    def rank_sums(self, weight: Tensor, with_density: bool) -> list[Tensor]:
        """The places from ½ on, as sums of Φ count them, and the first places of the points' blocks."""
        others = (self.count - 1).clamp(min=0)
        ordered, order = torch.where(self.there, self.points, -torch.inf).sort(
            dim=1, descending=True
        )
        unit = 1 / self.tau if self.kl else others / self.tau
        widest = self.count.clamp(min=1).log() + 1 if self.kl else self.count
        # Beyond a gap as wide as all places nothing is pooled, whether it is there or not.
        gaps = (ordered[:, :-1] - ordered[:, 1:]) * unit
        gaps = torch.where(ordered[:, 1:] == -torch.inf, torch.inf, gaps).minimum(2 * widest)
        s = -pad(gaps.cumsum(1), (1, 0))
        w = (others - torch.arange(s.shape[1], device=s.device)).clamp(min=0)
        w = (w + 1).log() if self.kl else w
        labels = isotonic_blocks(s, w, self.kl)
        rank = project(s, w, labels, self.kl)
        rank = rank.exp() - 1 if self.kl else rank
        found = [rank.clamp(min=0).minimum(others) + 0.5, labels.to(s.dtype)][: 1 + with_density]
        by_point = [torch.zeros_like(s).scatter_(1, order, part) for part in found]
        return [part.to(self.setting.dtype) for part in by_point]

    def slope_sums(self, slope: Tensor, density: Tensor) -> Tensor:
        """(m − 1) times the gradient in x/τ of ranks with these slopes, whose blocks are the density."""
        labels, g = density.long(), in_double(slope)
        number = of_block(torch.ones_like(g), labels)
        if not self.kl:
            return ((self.count - 1) * (g - of_block(g, labels) / number)).to(slope.dtype)
        # Ranks from 1 to m: those of a block, shared out by exp(x/τ).
        top = torch.full_like(g, -torch.inf).scatter_reduce(1, labels, self.points, "amax")
        share = ((self.points - top.gather(1, labels)) / self.tau).exp()
        share = share / of_block(share, labels)
        ranks = number * (self.count - labels - (number - 1) / 2)
        return (share * ranks * (g - of_block(share * g, labels))).to(slope.dtype)
