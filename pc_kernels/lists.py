"""Lists of scored items, of any lengths, one after the other: what listwise losses and metrics see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_floating


@dataclass(frozen=True)
class Lists:
    """N items of L lists. Masked ones are gone: nothing after this knows of masks or of padding."""

    scores: Tensor
    """[N], what a model says of each item; float32 or float64."""
    labels: Tensor
    """[N], what is true of it; any real dtype."""
    owner: Tensor
    """[N], int64, ascending: each item's list."""
    shape: torch.Size
    """How the lists are arranged, of L elements: () for a single one."""

    @classmethod
    def of(
        cls,
        scores: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        names: tuple[str, str] = ("scores", "labels"),
    ) -> Lists:
        """The lists that a user passes.

        Args:
            scores: [..., items], or [N] with `offsets`.
            labels: of the same shape.
            mask: bool, of the same shape: True where there is an item. None: everywhere.
            offsets: int64 [L + 1], from 0 to N: list l is items offsets[l] … offsets[l+1]−1.
            names: of scores and labels, for errors.

        Raises:
            TypeError, ValueError: an argument is not what is said here.
        """
        check_lists(scores, labels, mask, offsets, names)
        device = scores.device
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        if offsets is not None:
            shape = torch.Size([len(offsets) - 1])
            owner = torch.repeat_interleave(offsets.diff(), output_size=scores.numel())
        else:
            shape = scores.shape[:-1]
            owner = torch.arange(shape.numel(), device=device)[:, None]
            owner = owner.expand(-1, scores.shape[-1]).reshape(-1)
        flat = cls(scores.reshape(-1).to(wide), labels.detach().reshape(-1), owner, shape)
        return flat if mask is None else flat.select(mask.reshape(-1))

    @property
    def count(self) -> int:
        """L."""
        return self.shape.numel()

    def lengths(self) -> Tensor:
        """Items of each list, int64 [L]."""
        return torch.bincount(self.owner, minlength=self.count)

    def offsets(self) -> Tensor:
        """Where each list begins, and where the last one ends: int64 [L + 1]."""
        return ends(self.lengths())

    def select(self, chosen: Tensor) -> Lists:
        """The chosen items, bool [N], of each list."""
        place = chosen.nonzero()[:, 0]
        return self.take(place)

    def take(self, place: Tensor) -> Lists:
        """Items by their places, lists in order: int64 [n]."""
        return Lists(self.scores[place], self.labels[place], self.owner[place], self.shape)

    def sum(self, x: Tensor, owner: Tensor | None = None) -> Tensor:
        """Σ x [N] by list, or by these owners: [L]; in float64 where the device has it, or in int64."""
        kind = wide_dtype(x.device) if x.is_floating_point() else torch.int64
        owner = self.owner if owner is None else owner
        return x.new_zeros(self.count, dtype=kind).index_add(0, owner, x.to(kind))

    def varied(self, x: Tensor) -> Tensor:
        """Whether a list's values of x [N] are not all equal: bool [L]."""
        first = self.offsets()[self.owner]
        return self.sum(x != x[first]) > 0

    def ordered(self, *keys: Tensor) -> Tensor:
        """The places of the items by list, then by these keys [N], the first one first; ties in order."""
        return sorted_by(*((self.owner,) if self.count > 1 else ()), *keys)

    def undefined(self) -> Tensor:
        """NaN for lists with a score or a label that is not finite, 0 for the others: [L]."""
        bad = ~(self.scores.detach().isfinite() & self.labels.isfinite())
        return torch.where(self.sum(bad) > 0, torch.nan, 0.0).to(self.scores.dtype)


def sorted_by(*keys: Tensor) -> Tensor:
    """The places of n items by these keys [n], the first one first; ties in order."""
    place = keys[-1].argsort(stable=True)
    for key in reversed(keys[:-1]):
        place = place[key[place].argsort(stable=True)]
    return place


def wide_dtype(device: torch.device) -> torch.dtype:
    """What sums over a list are taken in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def ends(lengths: Tensor) -> Tensor:
    """Offsets [L + 1] of segments of these lengths [L]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


class PerList(NamedTuple):
    """What a loss or a metric says of L lists."""

    values: Tensor
    """[L]."""
    counted: Tensor
    """bool [L]: whether there is anything to rank; where not, the value is not in the mean."""


@dataclass(frozen=True)
class Runs:
    """Runs of equal items among n items in order."""

    index: Tensor
    """[n], which run each item is in, from 0."""
    length: Tensor
    """[n], of its run."""
    start: Tensor
    """[n], the place of its run's first item."""


def runs_of(*keys: Tensor) -> Runs:
    """Runs of items that are equal in each of the keys [n]."""
    n = keys[0].numel()
    new = torch.ones(n, dtype=torch.bool, device=keys[0].device)
    if n:
        new[1:] = torch.stack([key[1:] != key[:-1] for key in keys]).any(0)
    index = new.cumsum(0) - 1
    length = torch.bincount(index)
    return Runs(index, length[index], (ends(length)[:-1])[index])


def hard_places(lists: Lists, by: Tensor) -> Tensor:
    """The mid-rank of each item from its list's top by descending `by` [N]: [N], from 1; exact."""
    by = by.to(wide_dtype(by.device))
    order = lists.ordered(-by)
    runs = runs_of(by[order], lists.owner[order])
    first = lists.offsets()[lists.owner[order]]
    place = torch.empty_like(by)
    place[order] = (runs.start - first) + (runs.length + 1).to(by) / 2
    return place


def best_places(lists: Lists) -> Tensor:
    """The places 1, 2, … [N] that the items of a list have if ordered by their labels; int64."""
    labels = lists.labels.to(wide_dtype(lists.labels.device))
    start = lists.offsets()[lists.owner]
    place = torch.empty_like(start)
    place[lists.ordered(-labels)] = torch.arange(1, start.numel() + 1, device=start.device) - start
    return place


def gains(lists: Lists) -> Tensor:
    """What NDCG gives for an item's label, (2^y − 1)/2^Y with Y the list's largest: [N], in float64.

    NDCG is a ratio of gains, so that 2^Y, which may be beyond any float, cancels.
    """
    labels = lists.labels.to(wide_dtype(lists.labels.device))
    largest = labels.new_zeros(lists.count).scatter_reduce(0, lists.owner, labels, "amax")
    largest = largest[lists.owner]
    return torch.exp2(labels - largest) - torch.exp2(-largest)


@dataclass(frozen=True)
class Halves:
    """Segments with items below and above: every pair of one below and one above is told apart."""

    below: Tensor
    """[n], scores, segment by segment."""
    below_offsets: Tensor
    """int64 [S + 1]."""
    above: Tensor
    """[n′]."""
    above_offsets: Tensor
    """int64 [S + 1]."""
    owner: Tensor
    """[n′], the list that each item above is of."""


def halved(lists: Lists, segment: Tensor, is_above: Tensor) -> Halves:
    """Both halves of segments; those without a pair are left out.

    Args:
        lists: the items.
        segment: int64 [N], ascending from 0.
        is_above: bool [N].
    """
    size = torch.bincount(segment)
    above = torch.bincount(segment[is_above], minlength=size.numel())
    paired = (above > 0) & (above < size)
    used = paired[segment]
    up, down = is_above & used, ~is_above & used
    return Halves(
        lists.scores[down],
        ends((size - above)[paired]),
        lists.scores[up],
        ends(above[paired]),
        lists.owner[up],
    )


def told_apart(lists: Lists) -> Iterator[Halves]:
    """Every pair of items of a list with different labels, once: ⌈log₂ G⌉ halvings for G labels a list.

    Items are sorted by label. Two labels differ first in one bit of their places among the list's
    labels, and where it is set is the item above: a halving for each bit, of all segments at once.
    """
    order = lists.ordered(lists.labels)
    lists = lists.take(order)
    labels = runs_of(lists.owner, lists.labels)
    first = lists.offsets()[:-1].clamp(max=max(labels.index.numel() - 1, 0))
    grade = labels.index
    if grade.numel():
        grade = grade - grade[first][lists.owner]
    for bit in range(int(grade.max()).bit_length() if grade.numel() else 0):
        segment = runs_of(lists.owner, grade >> (bit + 1)).index
        yield halved(lists, segment, (grade >> bit) & 1 == 1)


def pairs_told_apart(lists: Lists) -> Tensor:
    """How many pairs of each list have different labels: int64 [L]."""
    order = lists.ordered(lists.labels)
    runs = runs_of(lists.owner[order], lists.labels[order])
    length = lists.lengths()
    return (length * length - lists.sum(runs.length)) // 2


def check_lists(
    scores: object, labels: object, mask: object, offsets: object, names: tuple[str, str]
) -> None:
    """Checks the arguments of `Lists.of`."""
    x = check_floating(names[0], scores)
    if x.dim() == 0:
        raise ValueError(f"{names[0]} must have at least one dimension; got a scalar")
    _check_like(names[1], labels, x, names[0])
    assert isinstance(labels, Tensor)
    if labels.is_complex():
        raise TypeError(f"{names[1]} must be real; got {labels.dtype}")
    if mask is not None:
        _check_like("mask", mask, x, names[0])
        assert isinstance(mask, Tensor)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, True where an item is; got {mask.dtype}")
    if offsets is not None:
        _check_offsets(offsets, x, names[0])


def _check_like(argument: str, given: object, x: Tensor, name: str) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor; got {type(given).__name__}")
    if given.shape != x.shape:
        raise ValueError(
            f"{argument} must have the shape of {name}, {tuple(x.shape)}; got {tuple(given.shape)}"
        )
    if given.device != x.device:
        raise ValueError(f"all tensors must be on one device; got {argument} on {given.device}")


def _check_offsets(offsets: object, x: Tensor, name: str) -> None:
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64:
        came = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"offsets must be an int64 tensor; got {came}")
    if x.dim() != 1 or offsets.dim() != 1 or offsets.numel() == 0:
        raise ValueError(
            f"offsets must be [lists + 1], with {name} [items]; got {tuple(offsets.shape)} and "
            f"{tuple(x.shape)}"
        )
    if offsets.device != x.device:
        raise ValueError(f"all tensors must be on one device; got offsets on {offsets.device}")
    ascending = bool((offsets.diff() >= 0).all())
    first, last = int(offsets[0]), int(offsets[-1])
    if not ascending or first != 0 or last != x.numel():
        raise ValueError(
            f"offsets must ascend from 0 to the number of items, {x.numel()}; got from {first} to "
            f"{last}{'' if ascending else ', not ascending'}"
        )
