"""What the backend calls, stage by stage: tensors in, launches, tensors out. Never waits for the device.

Programs are persistent: each takes every n-th row and reuses its scratch memory, whose size follows
from shapes and options alone. Which way a row goes, the kernel decides.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..dissimilarities.rows import Chunk, Pairs, Rows
from ..formulas import PENALTIES
from .coherence_rows import coherence_rows_kernel
from .dissimilarity import CODES, dissimilarity_kernel, straight_dissimilarity_kernel
from .formulas import code_of
from .hard_rank import ARRAYS, SPARE, hard_rank_kernel
from .settings import (
    COMPARED_ROWS,
    SHORT_ROWS,
    STRAIGHT_TILE,
    THREADS,
    Setting,
    compiler_options,
    long_rows,
    power_of_two_above,
    programs,
    resident,
    trimmed,
    tuned,
    warps_of,
)
from .soft_rank import soft_rank_backward_kernel, soft_rank_kernel
from .tables import DENSITY_PAD, MASS_PAD, TERMS, padded, tables

if TYPE_CHECKING:
    from ..recipe import Recipe

ALL_PAIRS = 256
"""References up to which a row's soft ranks are summed over all pairs (docs/gpu.md, "Triton")."""

ALL_COMPARED = COMPARED_ROWS[0].block
"""References up to which hard ranks compare all pairs, in one block."""

CELLS_PER_POINT = 8
"""Beyond this all pairs serve: rows are nearly hard (docs/method.md, "Regimes")."""

NARROW = 64
"""Features up to which δ comes straight from them (docs/gpu.md, "Triton")."""


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device: this makes it the tensors' one."""
    if device.type == "cpu":
        return nullcontext()
    module: Any = getattr(torch, device.type)
    return module.device(device)


@dataclass(frozen=True)
class Launch:
    """A kernel of rows with all its arguments but the setting, which is tuned."""

    kernel: Any
    rows: Tensor
    """[rows, count]: what the kernel overwrites, and may read."""
    programs: int
    """The most there is memory for."""
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    settings: tuple[Setting, ...]

    def __call__(self, setting: Setting, rows: int | None = None) -> None:
        """Launches it, for all rows or the first few."""
        programs = min(self.programs, resident(self.rows.device, setting.warps))
        self.kernel[(programs,)](
            *self.arguments,
            rows=len(self.rows) if rows is None else rows,
            **self.constants,
            BLOCK=setting.block,
            PAIRS=setting.pairs,
            num_warps=setting.warps,
            **compiler_options(self.rows.device),
        )

    def tuned(self, *variant: Hashable) -> None:
        """Launches it with the setting that is best for the variant and the rows' length.

        Where that is not known yet, it is found on two rows a program: more would only take memory.
        """
        size = power_of_two_above(self.rows.shape[1], 16, 1 << 30)
        key = (self.kernel.fn.__name__, self.rows.device, size, *variant)
        few = self.rows[: 2 * self.programs]
        with on(self.rows.device):
            self(tuned(key, self.settings, partial(self, rows=len(few)), few))


class Scratch(NamedTuple):
    """Scratch memory of all programs, as kernels take it."""

    memory: tuple[Tensor, ...]
    """Moments and floats of a `grid.Grid`, and spare rows if there are any."""
    floats: int
    """Floats of one program."""


def scratch_of(
    like: Tensor, rows: int, capacity: int, settings: tuple[Setting, ...], spare: int = 0
) -> tuple[int, Scratch]:
    """How many programs share the rows, and their memory: grids of so many cells, spare floats beside."""
    moments = TERMS * capacity
    floats = (3 + TERMS) * capacity + MASS_PAD + DENSITY_PAD
    number = programs(like.device, rows, settings, 8 * moments + 4 * (floats + spare))
    memory = (
        like.new_empty(number * moments, dtype=torch.int64),
        like.new_empty(number * floats, dtype=torch.float32),
        *([like.new_empty(number * spare)] if spare else []),
    )
    return number, Scratch(memory, floats)


def soft_launch(
    kernel: Any,
    tensors: tuple[Any, ...],
    overwritten: Tensor,
    recipe: Recipe,
    constants: dict[str, Any],
    spare: int = 0,
) -> Launch:
    """Of a kernel that ranks softly: its own arguments, then what all such kernels take.

    That is the method's constants, scratch memory of the programs (with `spare` rows for the kernel to
    use), sizes and the recipe.
    """
    rows, count = overwritten.shape
    relaxation = code_of(recipe.smooth_step)
    grid = count > ALL_PAIRS
    capacity = grid_capacity(count, recipe) if grid else 16
    settings = long_rows(count) if grid else trimmed(SHORT_ROWS, count)
    number, scratch = scratch_of(overwritten, rows, capacity, settings, spare * count)
    shared = (
        tables(recipe.relaxation, overwritten.device),
        *scratch.memory,
        count,
        capacity,
        scratch.floats,
        recipe.temperature,
    )
    constants = {
        **constants,
        "RELAXATION": relaxation,
        "SCALE_STD": recipe.scale == "std",
        "GRID": grid,
    }
    return Launch(kernel, overwritten, number, (*tensors, *shared), constants, settings)


def grid_capacity(count: int, recipe: Recipe) -> int:
    """Cells to have room for: a multiple of 16, that most rows do not need.

    The range of `count` values is at most √(2 count) of their standard deviations.
    """
    cells = float(CELLS_PER_POINT * count)
    if recipe.scale == "std":
        inverse_step = recipe.smooth_step.grid(torch.float32).inverse_step
        cells = min(cells, math.sqrt(2 * count) / recipe.temperature * inverse_step + 4)
    return padded(int(cells))


def _gram(rows: Rows) -> tuple[Any, ...]:
    """The fields of a `Gram`, and the features' width; of given dissimilarities, stand-ins."""
    if rows.gram is None:
        return (rows.values,) * 7 + (0,)
    gram, count = rows.gram, rows.values.shape[1]
    if gram.twins.numel() == 0:
        gram = gram._replace(twins=gram.offsets.new_zeros(count + 1, dtype=torch.int32))
    if gram.unit.numel() == 0:
        gram = gram._replace(unit=gram.offsets.new_ones(1))
    return (*gram, gram.anchors.shape[1])


def _present(pairs: Pairs, values: Tensor) -> tuple[Tensor, int]:
    """Which pairs count, as the kernels read it: a mask, or a stand-in, and the first anchor's place."""
    keep = values if pairs.keep is None else pairs.keep.contiguous().view(torch.uint8)
    return keep, -1 if pairs.self_start is None else pairs.self_start


def dissimilarity(rows: Rows) -> None:
    """The stage, in place."""
    count = rows.values.shape[1]
    if rows.gram is None or rows.ready or rows.values.numel() == 0:
        return
    block = power_of_two_above(count, THREADS, 256)
    with on(rows.values.device):
        dissimilarity_kernel[(rows.values.shape[0],)](
            rows.values,
            *_gram(rows),
            count,
            CODES[rows.dissimilarity],
            block,
            num_warps=warps_of(block, 4),
            enable_fp_fusion=True,
        )


def straight_dissimilarity(rows: Rows) -> bool:
    """Values <- δ straight from the features, if these are narrow; says whether they are."""
    number, count = rows.values.shape
    *tensors, width = _gram(rows)
    if width > NARROW or rows.values.numel() == 0:
        return False
    tile = STRAIGHT_TILE
    grid = triton.cdiv(number, tile.anchors), triton.cdiv(count, tile.references)
    with on(rows.values.device):
        straight_dissimilarity_kernel[grid](
            rows.values,
            *tensors,
            width,
            number,
            count,
            DISSIMILARITY=CODES[rows.dissimilarity],
            WIDTH=power_of_two_above(width, 16, NARROW),
            ANCHORS=tile.anchors,
            REFERENCES=tile.references,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
    return True


def hard_rank(x: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mid-ranks of the rows of x [N, m]; where `keep` is False the value is absent, its rank 0."""
    rank = torch.empty_like(x)
    if x.numel() > 0:
        _hard_rank(Rows(x), rank, Pairs(None, keep), finite=False)
    return rank


def hard_rank_rows(teacher: Rows, pairs: Pairs) -> Rows:
    """The teacher's ranks in the place of its rows."""
    if teacher.values.numel() > 0:
        _hard_rank(teacher, teacher.values, pairs, finite=True)
    return Rows(teacher.values, "ranked")


def _hard_rank(rows: Rows, rank: Tensor, pairs: Pairs, *, finite: bool) -> None:
    number, count = rows.values.shape
    device = rows.values.device
    short = count <= ALL_COMPARED
    room = 0 if short else padded(count + SPARE.value)
    settings = trimmed(COMPARED_ROWS, count) if short else long_rows(count)
    scratch = ARRAYS.value * room
    grid = programs(device, number, settings, 4 * scratch)
    arguments = (
        rows.values,
        *_gram(rows),
        *_present(pairs, rows.values),
        rank,
        torch.empty(grid * scratch, dtype=torch.int32, device=device),
        count,
        room,
    )
    constants = {
        "DISSIMILARITY": CODES["given" if rows.ready else rows.dissimilarity],
        "FINITE": finite,
        "HAS_KEEP": pairs.keep is not None,
        "SHORT": short,
    }
    launch = Launch(hard_rank_kernel, rank, grid, arguments, constants, settings)
    launch.tuned(rows.dissimilarity, rows.ready)


def soft_rank(
    x: Tensor, recipe: Recipe, with_grad: bool, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Soft ranks of the rows of x [N, m]; with_grad, the density that the backward needs.

    Where `keep` is False the value is absent, its rank and density 0.
    """
    rank = torch.empty_like(x)
    density = torch.empty_like(x) if with_grad else x.new_empty(0)
    if x.numel() > 0:
        tensors = (x, _present(Pairs(None, keep), x)[0], rank, density if with_grad else rank)
        constants = {"HAS_KEEP": keep is not None, "WITH_GRAD": with_grad}
        launch = soft_launch(soft_rank_kernel, tensors, rank, recipe, constants)
        launch.tuned(recipe.relaxation)
    return rank, density


def soft_rank_backward(
    grad_rank: Tensor,
    x: Tensor,
    density: Tensor,
    recipe: Recipe,
    keep: Tensor | None = None,
) -> Tensor:
    """The gradient in x [N, m] of ranks with gradient grad_rank [N, m]; 0 where `keep` is False."""
    grad = torch.empty_like(x)
    if x.numel() > 0:
        tensors = (x, _present(Pairs(None, keep), x)[0], grad_rank, density, grad)
        constants = {"HAS_KEEP": keep is not None}
        launch = soft_launch(soft_rank_backward_kernel, tensors, grad, recipe, constants)
        launch.tuned(recipe.relaxation)
    return grad


def coherence_rows(chunk: Chunk, recipe: Recipe, with_grad: bool) -> Tensor:
    """Losses [C] of a chunk; see `Backend.coherence_rows`."""
    student, teacher, weights, pairs = chunk
    if student.values.numel() == 0:
        return torch.zeros_like(weights)
    penalty = code_of(PENALTIES[recipe.penalty])
    losses = torch.empty_like(weights)
    if teacher.dissimilarity != "ranked":
        teacher = hard_rank_rows(teacher, pairs)
    tensors = (
        student.values,
        *_gram(student),
        *_present(pairs, student.values),
        teacher.values,
        weights,
        losses,
    )
    constants = {
        "DISSIMILARITY": CODES[student.dissimilarity],
        "READY": student.ready,
        "HAS_KEEP": pairs.keep is not None,
        "PENALTY": penalty,
        "WITH_GRAD": with_grad,
    }
    launch = soft_launch(coherence_rows_kernel, tensors, student.values, recipe, constants, spare=2)
    launch.tuned(recipe.relaxation, with_grad, student.ready)
    return losses
