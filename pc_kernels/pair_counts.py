"""How two scores order the items of a list: counts of pairs, exact integers, in O(m log m) a list.

Knight, "A computer method for calculating Kendall's tau with ungrouped data" (JASA 1966): with the items
sorted by one score, the pairs that the other one orders the other way round are inversions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .lists import runs_of, sorted_by


class PairCounts(NamedTuple):
    """Pairs of items of each list, int64 [L]."""

    all: Tensor
    tied_x: Tensor
    """Equal in x."""
    tied_y: Tensor
    """Equal in y."""
    tied_both: Tensor
    """Equal in both."""
    discordant: Tensor
    """Ordered the other way round by y than by x."""

    @property
    def concordant(self) -> Tensor:
        """Ordered the same way by both."""
        return self.all - self.tied_x - self.tied_y + self.tied_both - self.discordant


def pairs_of(count: Tensor) -> Tensor:
    """N (n − 1)/2."""
    return (count * (count - 1)).div(2, rounding_mode="floor")


def pair_counts_by_sorting(x: Tensor, y: Tensor, offsets: Tensor) -> PairCounts:
    """The counts in plain PyTorch.

    Args:
        x: [N], no NaN, of any real dtype; list l is items offsets[l] … offsets[l+1]−1.
        y: [N].
        offsets: int64 [L + 1].
    """
    lengths = offsets.diff()
    owner = torch.repeat_interleave(lengths, output_size=x.numel())
    order = sorted_by(owner, x, y)
    x, y = x[order], y[order]

    def tied(*keys: Tensor) -> Tensor:
        runs = runs_of(owner, *keys)
        return _sum(runs.length - 1, owner, lengths).div(2, rounding_mode="floor")

    by_y = sorted_by(owner, y)
    value = torch.empty_like(owner)
    value[by_y] = runs_of(owner, y[by_y]).start  # how many come before, of all lists
    alike = len(lengths) > 0 and bool((lengths == lengths[0]).all())
    rows = (value - offsets[owner]).view(len(lengths), -1) if alike and len(owner) else value[None]
    discordant = _sum(inversions(rows).view(-1), owner, lengths)
    return PairCounts(pairs_of(lengths), tied(x), tied(y[by_y]), tied(x, y), discordant)


def _sum(x: Tensor, owner: Tensor, lists: Tensor) -> Tensor:
    return torch.zeros_like(lists).index_add_(0, owner, x)


def inversions(v: Tensor) -> Tensor:
    """Pairs i < j with v_i > v_j in rows of integers v [C, m], 0 ≤ v < m: the row sums of [C, m].

    From the highest bit down, rows are kept in order of the bits seen so far. Two values that differ
    first in a bit are inverted if the one that has it set comes earlier. O(m) a bit. A pair is counted
    where its smaller value is by then, never beyond a place that splits both the row and its values.
    """
    rows, m = v.shape
    below = torch.zeros(rows, m + 1, dtype=v.dtype, device=v.device)  # below[x] = #{v < x}
    below = below.scatter_add_(1, v + 1, torch.ones_like(v)).cumsum(1)
    place = torch.arange(m, device=v.device).expand_as(v)
    total = torch.zeros_like(v)
    for bit in reversed(range((m - 1).bit_length())):
        one = (v >> bit) & 1
        ones = one.cumsum(1) - one
        base = (v >> (bit + 1)) << (bit + 1)
        ones_here = ones - ones.gather(1, below.gather(1, base))  # those with the same higher bits
        total += ones_here * (1 - one)
        split = below.gather(1, (base + (1 << bit)).clamp(max=m))
        target = torch.where(one == 1, split + ones_here, place - ones_here)
        v = torch.empty_like(v).scatter_(1, target, v)
    return total
