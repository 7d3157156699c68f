"""Stage `dissimilarity`: features in, chunks of rows δ(i, j) out, and gradients back.

A dissimilarity is a `Side`. Those made of inner products (gram_side.py) leave the stage as Gram rows,
which the backend turns into dissimilarities where it ranks them; any other leaves as dissimilarities, and
its own backward takes ∂L/∂δ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from .gram_side import CosineSide, GramSide
from .others import CallableSide, CityblockSide, GivenSide, MaskedSide
from .row_maker import PLAIN, RowMaker
from .rows import Chunk, Gram, Pairs, Rows
from .side import Points, Side

__all__ = [
    "DISSIMILARITIES",
    "Chunk",
    "Dissimilarity",
    "GivenSide",
    "Gram",
    "Pairs",
    "Points",
    "RowMaker",
    "Rows",
    "Side",
    "check_dissimilarity",
    "make_side",
]

Dissimilarity = str | Callable[[Tensor, Tensor], Tensor]
"""A name, or a function of anchors [C, D] and references [M, D] to [C, M]."""

DISSIMILARITIES: dict[str, Callable[[Points, RowMaker], Side]] = {
    "euclidean": partial(GramSide, "euclidean"),
    "sqeuclidean": partial(GramSide, "sqeuclidean"),
    "cosine": partial(CosineSide, "cosine"),
    "cityblock": lambda points, _: CityblockSide(points),
}
"""What makes the side of features, by the names of `scipy.spatial.distance.cdist`."""


def check_dissimilarity(argument: str, given: Any) -> None:
    """Raises TypeError or ValueError unless `given` is a known name or a callable."""
    if callable(given):
        return
    if not isinstance(given, str):
        raise TypeError(f"{argument} must be a name or a callable; got {type(given).__name__}")
    if given not in DISSIMILARITIES:
        names = ", ".join(map(repr, DISSIMILARITIES))
        raise ValueError(f"{argument} must be one of {names} or a callable; got {given!r}")


def make_side(
    dissimilarity: Dissimilarity,
    points: Points,
    *,
    with_grad: bool,
    masked: bool = False,
    maker: RowMaker = PLAIN,
) -> Side:
    """The side that computes a dissimilarity of features.

    Args:
        dissimilarity: a name, or a function.
        points: the features, contiguous, in the compute dtype.
        with_grad: whether gradients will be asked for.
        masked: whether some pairs are; features that are not finite then stay with the pairs they are in.
        maker: what makes Gram rows: the backend.
    """

    def side(points: Points) -> Side:
        if callable(dissimilarity):
            return CallableSide(dissimilarity, points, with_grad)
        return DISSIMILARITIES[dissimilarity](points, maker)

    return MaskedSide(side, points, maker) if masked else side(points)
