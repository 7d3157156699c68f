"""What a weighted smooth CDF is computed of: rows of sources and queries, and the options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from .checks import one_of
from .formulas import KERNELS
from .recipe import Recipe

TAILS = ("lower", "upper")


class CdfKeywords(TypedDict, total=False):
    """The options of `smooth_cdf`; their defaults and meaning are those of `CdfOptions`."""

    temperature: float
    relaxation: str
    tail: str
    integral: bool
    source_offsets: Tensor | None
    query_offsets: Tensor | None
    source_mask: Tensor | None
    query_mask: Tensor | None
    backend: str


@dataclass(frozen=True)
class CdfOptions:
    """The options of `smooth_cdf`.

    Raises:
        TypeError, ValueError: a field is not what is said here.
    """

    temperature: float = 0.1
    """τ, in units of the values. > 0."""
    relaxation: str = "logistic"
    """Φ: a row of `formulas.RELAXATIONS`."""
    tail: str = "lower"
    """"lower": of (y − x)/τ, counted from the lowest value; "upper": of (x − y)/τ, from the highest."""
    integral: bool = False
    """Of ∫Φ from −∞ instead of Φ."""
    source_offsets: Tensor | None = None
    """Int64 [L + 1]: list l of the sources is sources[offsets[l] : offsets[l + 1]]."""
    query_offsets: Tensor | None = None
    """The same of the queries."""
    source_mask: Tensor | None = None
    """Bool, like the sources: False where one does not count."""
    query_mask: Tensor | None = None
    """Bool, like the queries: False where the result is 0, with no gradient."""
    backend: str = "auto"
    """What computes: see `python -m pc_kernels.info`."""

    def __post_init__(self) -> None:
        """Checks all but the tensors' shapes."""
        recipe = self.recipe
        one_of("tail", self.tail, TAILS)
        one_of("integral", self.integral, (False, True))
        recipe.smooth_step.kernel(self.kernel)
        for name in ("source_offsets", "query_offsets"):
            offsets = getattr(self, name)
            if offsets is not None and not isinstance(offsets, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor; got {type(offsets).__name__}")
        if (self.source_offsets is None) != (self.query_offsets is None):
            missing = "source_offsets" if self.source_offsets is None else "query_offsets"
            raise ValueError(f"source_offsets and query_offsets go together; {missing} is missing")

    @property
    def recipe(self) -> Recipe:
        """As of a soft rank."""
        return Recipe(
            relaxation=self.relaxation,
            temperature=self.temperature,
            scale=None,
            backend=self.backend,
        )

    @property
    def kernel(self) -> str:
        """What is summed: one of `formulas.KERNELS`."""
        return "integral" if self.integral else "cdf"


CDF_OPTIONS = tuple(field.name for field in fields(CdfOptions))


def make_options(options: Mapping[str, Any]) -> CdfOptions:
    """The options that a user passed by keyword.

    Raises:
        TypeError, ValueError: one is unknown, or not what `CdfOptions` says.
    """
    for name in options:
        if name not in CDF_OPTIONS:
            raise TypeError(f"smooth_cdf() has no option {name!r}; it has {', '.join(CDF_OPTIONS)}")
    return CdfOptions(**options)


class CdfRows(NamedTuple):
    """Sources and queries, row by row: matrices, or lists one after the other."""

    sources: Tensor
    """[N, m], or [S] with offsets."""
    queries: Tensor
    """[N, n], or [Q] with offsets."""
    weights: Tensor | None
    """[W, N, m] or [W, S]: W sums of the same sources. None: one, of ones."""
    source_offsets: Tensor | None = None
    """Int64 [L + 1]."""
    query_offsets: Tensor | None = None
    source_mask: Tensor | None = None
    """Bool like the sources: False where one is absent."""
    query_mask: Tensor | None = None
    upper: bool = False
    """Counted from the highest value, of (x − y)/τ."""

    @property
    def channels(self) -> int:
        """W."""
        return 1 if self.weights is None else self.weights.shape[0]

    @property
    def result_dtype(self) -> torch.dtype:
        """What all that is given has in common."""
        dtype = torch.promote_types(self.sources.dtype, self.queries.dtype)
        return dtype if self.weights is None else torch.promote_types(dtype, self.weights.dtype)

    def check(self) -> None:
        """What no schema can say; else backends might read out of bounds.

        Raises:
            ValueError: shapes do not fit, or offsets are none.
        """
        lists = self.source_offsets is not None
        if lists != (self.query_offsets is not None):
            raise ValueError("source_offsets and query_offsets go together")
        for name, x in (("sources", self.sources), ("queries", self.queries)):
            if x.dim() != (1 if lists else 2):
                wanted = "1 dimension with offsets" if lists else "2 dimensions"
                raise ValueError(f"{name} must have {wanted}; got shape {tuple(x.shape)}")
        if not lists and len(self.sources) != len(self.queries):
            raise ValueError(
                "sources and queries must have as many rows; got "
                f"{len(self.sources)} and {len(self.queries)}"
            )
        if self.weights is not None and self.weights.shape[1:] != self.sources.shape:
            raise ValueError(
                f"weights must be [channels, *sources], with sources {tuple(self.sources.shape)}; "
                f"got {tuple(self.weights.shape)}"
            )
        check_mask("source_mask", self.source_mask, "sources", self.sources)
        check_mask("query_mask", self.query_mask, "queries", self.queries)
        if self.source_offsets is None or self.query_offsets is None:
            return
        _check_offsets("source_offsets", self.source_offsets, "sources", self.sources)
        _check_offsets("query_offsets", self.query_offsets, "queries", self.queries)
        if len(self.source_offsets) != len(self.query_offsets):
            raise ValueError(
                "source_offsets and query_offsets must make as many lists; got "
                f"{len(self.source_offsets) - 1} and {len(self.query_offsets) - 1}"
            )

    def turned(self, weights: Tensor) -> CdfRows:
        """The queries as sources, with these weights, and the other tail."""
        return CdfRows(
            self.queries,
            self.sources,
            weights,
            self.query_offsets,
            self.source_offsets,
            self.query_mask,
            self.source_mask,
            not self.upper,
        )

    def to(self, dtype: torch.dtype) -> CdfRows:
        """Contiguous, values and weights in this dtype."""

        def contiguous(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.contiguous()

        return CdfRows(
            self.sources.to(dtype).contiguous(),
            self.queries.to(dtype).contiguous(),
            None if self.weights is None else self.weights.to(dtype).contiguous(),
            contiguous(self.source_offsets),
            contiguous(self.query_offsets),
            contiguous(self.source_mask),
            contiguous(self.query_mask),
            self.upper,
        )

    def as_lower(self) -> CdfRows:
        """Mirrored if the upper tail is wanted: its mirror image is the lower."""
        if not self.upper:
            return self
        return self._replace(sources=-self.sources, queries=-self.queries, upper=False)

    def matrices(self) -> Iterator[tuple[CdfRows, Tensor, Tensor]]:
        """Lists as rows of matrices, those of like size together: padded to four times their own at most.

        Yields:
            Rows, the places of their queries in the whole [N, n], and whether they are there at all.
        """
        assert self.source_offsets is not None and self.query_offsets is not None
        size = self.source_offsets.diff() + self.query_offsets.diff()
        level = torch.log2(size.clamp(min=1).float()).ceil()
        for here in sorted(set(level.tolist())):
            lists = (level == here).nonzero()
            place, there = _padded(self.source_offsets, lists)
            query_place, query_there = _padded(self.query_offsets, lists)
            rows = CdfRows(
                self.sources[place],
                self.queries[query_place],
                None if self.weights is None else self.weights[:, place],
                source_mask=_both(there, self.source_mask, place),
                query_mask=_both(query_there, self.query_mask, query_place),
            )
            yield rows, query_place, query_there


def _padded(offsets: Tensor, lists: Tensor) -> tuple[Tensor, Tensor]:
    """Places of these lists' [N, 1] values, [N, most of one], and whether they are there."""
    first, past = offsets[lists], offsets[lists + 1]
    place = first + torch.arange(int((past - first).max()), device=offsets.device)
    there = place < past
    return torch.where(there, place, 0), there


def _both(there: Tensor, mask: Tensor | None, place: Tensor) -> Tensor:
    return there if mask is None else there & mask[place]


def pulled(
    slopes: Tensor, weights: Tensor | None, mask: Tensor | None, temperature: float
) -> Tensor:
    """Σ over channels of weights · slopes / τ, 0 where the mask is False; τ < 0 turns the sign."""
    if weights is not None:
        weights = weights.to(slopes.dtype)
        slopes = (weights if mask is None else torch.where(mask, weights, 0)) * slopes
    total = slopes[0] if len(slopes) == 1 else slopes.sum(0)
    if abs(temperature) < 1e-30 and total.device.type != "mps":  # its inverse may leave float32
        return (total.double() / temperature).to(total.dtype)
    return total / temperature


def check_mask(name: str, mask: object, other: str, values: Tensor) -> None:
    """Checks a mask of sources or queries; None is one."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, True for what is there; got {came}")
    if mask.shape != values.shape:
        raise ValueError(
            f"{name} must have the shape of the {other}, {tuple(values.shape)}; "
            f"got {tuple(mask.shape)}"
        )


def _check_offsets(name: str, offsets: Tensor, other: str, values: Tensor) -> None:
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or len(offsets) == 0:
        raise ValueError(
            f"{name} must be int64 [lists + 1]; got {offsets.dtype} {tuple(offsets.shape)}"
        )
    whole = offsets[0] == 0 and offsets[-1] == len(values)
    if not whole or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"{name} must rise from 0 to the number of {other}, {len(values)}; got "
            f"{offsets.tolist()[:8]}{' ...' if len(offsets) > 8 else ''}"
        )


def sums_by_matrices(
    rows: CdfRows, kernels: tuple[str, ...], compute: Callable[[CdfRows], list[Tensor]]
) -> list[Tensor]:
    """Sums of lists, for each kernel [W, Q], where `compute` makes those of matrices, [W, N, n]."""
    rows = rows.as_lower()
    if rows.source_offsets is None:
        return compute(rows)
    totals = [rows.queries.new_zeros(rows.channels, rows.queries.shape[0]) for _ in kernels]
    for part, place, there in rows.matrices():
        for total, sums in zip(totals, compute(part), strict=True):
            total[:, place[there]] = sums[:, there]
    return totals


def slope_of(kernel: str) -> str:
    """The kernel's derivative."""
    return KERNELS[KERNELS.index(kernel) - 1]
