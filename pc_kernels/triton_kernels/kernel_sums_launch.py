"""What the backend calls for sums of kernels: tensors in, one launch, tensors out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formulas import KERNELS
from .formulas import code_of
from .kernel_sums import PAIRS_PER_POINT, kernel_sums_kernel
from .launch import Launch, scratch_of
from .settings import THREADS, Setting, long_rows, power_of_two_above
from .tables import FAR, padded, tables

if TYPE_CHECKING:
    from ..cdf_rows import CdfRows
    from ..recipe import Recipe

MOST_PAIRS = 1 << 28
"""Of a row, that a program may have to sum one by one: some 20 ms."""

CELLS_PER_POINT = 2
MOST_CELLS = 1 << 16
"""Room on a row's grid; wider rows go by all pairs."""

PAIR_TILE = 512
"""Pairs that a program takes at a time where rows have no grid."""


def fits(rows: CdfRows) -> bool:
    """Whether these rows of matrices have few enough pairs, whatever they are."""
    return rows.sources.shape[1] * rows.queries.shape[1] <= MOST_PAIRS


def kernel_sums(rows: CdfRows, recipe: Recipe, kernels: tuple[str, ...]) -> list[Tensor]:
    """Sums [W, N, n] of rows of matrices, counted from their lower end."""
    shape = (rows.channels, *rows.queries.shape)
    found = {kernel: rows.queries.new_empty(shape) for kernel in kernels}
    if rows.queries.numel() == 0:
        return [found[kernel] for kernel in kernels]
    (number, sources), queries = rows.sources.shape, rows.queries.shape[1]
    points = sources + queries
    grid = sources * queries > PAIRS_PER_POINT.value * points
    capacity = padded(min(CELLS_PER_POINT * points, MOST_CELLS)) if grid else 16
    settings = long_rows(points) if grid else (pair_setting(sources, queries),)
    programs, scratch = scratch_of(rows.queries, number, capacity, settings)
    some = next(iter(found.values()))
    given = [some if x is None else x for x in (rows.weights, rows.source_mask, rows.query_mask)]
    arguments = (
        rows.sources,
        rows.queries,
        *(x.view(torch.uint8) if x.dtype == torch.bool else x for x in given),
        *(found.get(kernel, some) for kernel in KERNELS),
        tables(recipe.relaxation, rows.queries.device, far=True),
        *scratch.memory,
        sources,
        queries,
        capacity,
        scratch.floats,
        recipe.temperature,
        number,
        rows.channels,
    )
    constants = {
        "HAS_WEIGHTS": rows.weights is not None,
        "HAS_SOURCE_KEEP": rows.source_mask is not None,
        "HAS_QUERY_KEEP": rows.query_mask is not None,
        "DENSITY": "pdf" in kernels,
        "CDF": "cdf" in kernels,
        "INTEGRAL": "integral" in kernels,
        "RELAXATION": FAR + code_of(recipe.smooth_step),
        "GRID": grid,
    }
    launch = Launch(kernel_sums_kernel, some[0], programs, arguments, constants, settings)
    launch.tuned(recipe.relaxation, kernels, grid)
    return [found[kernel] for kernel in kernels]


def pair_setting(sources: int, queries: int) -> Setting:
    """Blocks of a row whose pairs are all summed: no wider than its queries."""
    block = power_of_two_above(queries, 4, 128)
    pairs = power_of_two_above(max(sources, 1), 4, PAIR_TILE // block)
    return Setting(block, pairs, max(1, block // THREADS))
