"""What the backend calls, stage by stage: tensors in, launches, tensors out. Never waits for the device.

Programs are persistent: each takes every n-th row and reuses its scratch memory, whose size follows
from shapes and options alone. Which way a row goes, the kernel decides.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from ..options import CoherenceOptions, RankOptions
from ..rows import Rows
from .coherence_rows import coherence_rows_kernel
from .dissimilarity import dissimilarity_kernel, straight_dissimilarity_kernel
from .hard_rank import hard_rank_kernel
from .settings import (
    COMPARED_ROWS,
    LONG_ROWS,
    SHORT_ROWS,
    STRAIGHT_TILE,
    Setting,
    power_of_two_above,
    programs,
    trimmed,
    tuned,
)
from .soft_rank import soft_rank_backward_kernel, soft_rank_kernel
from .tables import DENSITY_PAD, INVERSE_STEP, MASS_PAD, TERMS, tables

METRICS = {"given": 0, "euclidean": 1, "sqeuclidean": 2, "cosine": 3}
RELAXATIONS = {"logistic": 0, "normal": 1}
PENALTIES = {"squared": 0, "absolute": 1, "huber": 2}

ALL_PAIRS = 256
"""References up to which a row's soft ranks are summed over all pairs (docs/gpu.md, "Triton")."""

ALL_COMPARED = COMPARED_ROWS.block
"""References up to which hard ranks compare all pairs, in one block."""

CELLS_PER_POINT = 8
"""Beyond this all pairs serve: rows are nearly hard (docs/method.md, "Regimes")."""

NARROW = 64
"""Features up to which δ comes straight from them (docs/gpu.md, "Triton")."""

MOST_BUCKETS = 1 << 20


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device: this makes it the tensors' one."""
    if device.type == "cpu":
        return nullcontext()
    module: Any = getattr(torch, device.type)
    return module.device(device)


class Grid:
    """Scratch memory of the programs that rank rows of `count`, and what the kernels know of it."""

    def __init__(
        self, like: Tensor, rows: int, count: int, options: RankOptions, spare: int = 0
    ) -> None:
        """Takes a tensor on the device, the rows' number and length, and spare rows to have."""
        self.used = count > ALL_PAIRS
        self.capacity = grid_capacity(count, options) if self.used else 16
        self.floats = (3 + TERMS) * self.capacity + MASS_PAD + DENSITY_PAD
        self.floats += spare * padded(count)
        moments = TERMS * self.capacity
        self.programs = programs(
            like.device, rows, 2 if self.used else 8, 8 * moments + 4 * self.floats
        )
        self.moments_memory = like.new_empty(self.programs * moments, dtype=torch.int64)
        self.floats_memory = like.new_empty(self.programs * self.floats, dtype=torch.float32)
        self.tables = tables(options.relaxation, like.device)
        self.settings = trimmed(LONG_ROWS if self.used else SHORT_ROWS, count)


def padded(count: int) -> int:
    """The next multiple of 16."""
    return -(-count // 16) * 16


def grid_capacity(count: int, options: RankOptions) -> int:
    """Cells to have room for: a multiple of 16, that most rows do not need.

    The range of `count` values is at most √(2 count) of their standard deviations.
    """
    cells = float(CELLS_PER_POINT * count)
    if options.scale == "std":
        most = math.sqrt(2 * count) / options.temperature * INVERSE_STEP[options.relaxation]
        cells = min(cells, most + 4)
    return padded(int(cells))


def _sides(rows: Rows) -> tuple[Any, ...]:
    """Anchors, references, squared norms, offsets and width; of given dissimilarities, stand-ins."""
    if rows.metric == "given":
        return (rows.values,) * 5 + (0,)
    assert rows.anchors is not None
    return (
        rows.anchors,
        rows.references,
        rows.anchor_sq,
        rows.reference_sq,
        rows.offsets,
        rows.anchors.shape[1],
    )


def dissimilarity(rows: Rows) -> None:
    """The stage, in place."""
    count = rows.values.shape[1]
    if rows.metric == "given" or rows.values.numel() == 0:
        return
    block = power_of_two_above(count, 16, 256)
    *tensors, width = _sides(rows)
    with on(rows.values.device):
        dissimilarity_kernel[(rows.values.shape[0], triton.cdiv(count, block))](
            rows.values, *tensors, width, count, METRICS[rows.metric], block, num_warps=4
        )


def straight_dissimilarity(rows: Rows) -> bool:
    """Values <- δ straight from the features, if these are narrow; says whether they are."""
    number, count = rows.values.shape
    *tensors, width = _sides(rows)
    if width > NARROW or rows.values.numel() == 0:
        return False
    tile = STRAIGHT_TILE
    grid = triton.cdiv(number, tile.anchors), triton.cdiv(count, tile.references)
    with on(rows.values.device):
        straight_dissimilarity_kernel[grid](
            rows.values,
            *tensors,
            number,
            count,
            width,
            METRIC=METRICS[rows.metric],
            WIDTH=power_of_two_above(width, 16, NARROW),
            ANCHORS=tile.anchors,
            REFERENCES=tile.references,
            num_warps=tile.warps,
        )
    return True


def hard_rank(x: Tensor) -> Tensor:
    """Mid-ranks of the rows of x [N, m]."""
    rank = torch.empty_like(x)
    if x.numel() > 0:
        _hard_rank(Rows(x), rank, -1, None, finite=False)
    return rank


def hard_rank_rows(teacher: Rows, self_start: int | None, keep: Tensor | None) -> Rows:
    """The teacher's ranks in the place of its rows."""
    if teacher.values.numel() > 0:
        own = -1 if self_start is None else self_start
        _hard_rank(teacher, teacher.values, own, keep, finite=True)
    return Rows(teacher.values, "ranked")


def _hard_rank(
    rows: Rows, rank: Tensor, self_start: int, keep: Tensor | None, *, finite: bool
) -> None:
    number, count = rows.values.shape
    device = rows.values.device
    short = count <= ALL_COMPARED
    buckets = power_of_two_above(count, 64, MOST_BUCKETS)
    ints, floats = (0, 0) if short else (2 * buckets + padded(count), padded(count))
    grid = programs(device, number, 4, 4 * (ints + floats))
    ints_memory = torch.empty(grid * ints, dtype=torch.int32, device=device)
    floats_memory = torch.empty(grid * floats, dtype=torch.float32, device=device)
    *tensors, width = _sides(rows)

    def launch(setting: Setting) -> None:
        hard_rank_kernel[(grid,)](
            rows.values,
            rank,
            *tensors,
            width,
            rows.values if keep is None else keep.view(torch.uint8),
            ints_memory,
            floats_memory,
            number,
            count,
            buckets,
            ints,
            floats,
            self_start,
            METRIC=METRICS["given" if rows.ready else rows.metric],
            FINITE=finite,
            HAS_KEEP=keep is not None,
            SHORT=short,
            BLOCK=setting.block,
            PAIRS=setting.pairs,
            num_warps=setting.warps,
        )

    settings = trimmed((COMPARED_ROWS,) if short else LONG_ROWS, count)
    key = ("hard_rank", device, power_of_two_above(count, 16, 1 << 30), rows.metric, rows.ready)
    with on(device):
        tuned(key, settings, launch, (rows.values,))


def soft_rank(x: Tensor, options: RankOptions, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Soft ranks of the rows of x [N, m]; with_grad, the density that the backward needs."""
    rank = torch.empty_like(x)
    density = torch.empty_like(x) if with_grad else x.new_empty(0)
    rows, count = x.shape
    if x.numel() == 0:
        return rank, density
    grid = Grid(x, rows, count, options)

    def launch(setting: Setting) -> None:
        soft_rank_kernel[(grid.programs,)](
            x,
            rank,
            density if with_grad else rank,
            grid.tables,
            grid.moments_memory,
            grid.floats_memory,
            rows,
            count,
            grid.capacity,
            grid.floats,
            options.temperature,
            RELAXATION=RELAXATIONS[options.relaxation],
            SCALE_STD=options.scale == "std",
            WITH_GRAD=with_grad,
            GRID=grid.used,
            BLOCK=setting.block,
            PAIRS=setting.pairs,
            num_warps=setting.warps,
        )

    key = ("soft_rank", x.device, power_of_two_above(count, 16, 1 << 30), options.relaxation)
    with on(x.device):
        tuned(key, grid.settings, launch, (rank,))
    return rank, density


def soft_rank_backward(
    grad_rank: Tensor, x: Tensor, density: Tensor, options: RankOptions
) -> Tensor:
    """The gradient in x [N, m] of ranks with gradient grad_rank [N, m]."""
    grad = torch.empty_like(x)
    rows, count = x.shape
    if x.numel() == 0:
        return grad
    grid = Grid(x, rows, count, options)

    def launch(setting: Setting) -> None:
        soft_rank_backward_kernel[(grid.programs,)](
            grad_rank,
            x,
            density,
            grad,
            grid.tables,
            grid.moments_memory,
            grid.floats_memory,
            rows,
            count,
            grid.capacity,
            grid.floats,
            options.temperature,
            RELAXATION=RELAXATIONS[options.relaxation],
            SCALE_STD=options.scale == "std",
            GRID=grid.used,
            BLOCK=setting.block,
            PAIRS=setting.pairs,
            num_warps=setting.warps,
        )

    key = ("backward", x.device, power_of_two_above(count, 16, 1 << 30), options.relaxation)
    with on(x.device):
        tuned(key, grid.settings, launch, (grad,))
    return grad


def coherence_rows(
    student: Rows,
    teacher: Rows,
    weights: Tensor,
    options: CoherenceOptions,
    self_start: int | None,
    keep: Tensor | None,
    with_grad: bool,
) -> Tensor:
    """Losses [C] of a chunk; see `Backend.coherence_rows`."""
    rows, count = student.values.shape
    device = student.values.device
    if student.values.numel() == 0:
        return torch.zeros_like(weights)
    losses = torch.empty_like(weights)
    own = -1 if self_start is None else self_start
    if teacher.metric != "ranked":
        teacher = hard_rank_rows(teacher, self_start, keep)
    grid = Grid(student.values, rows, count, options, spare=2)
    *tensors, width = _sides(student)

    def launch(setting: Setting) -> None:
        coherence_rows_kernel[(grid.programs,)](
            student.values,
            *tensors,
            width,
            teacher.values,
            student.values if keep is None else keep.view(torch.uint8),
            weights,
            losses,
            grid.tables,
            grid.moments_memory,
            grid.floats_memory,
            rows,
            count,
            grid.capacity,
            grid.floats,
            own,
            options.temperature,
            METRIC=METRICS[student.metric],
            READY=student.ready,
            RELAXATION=RELAXATIONS[options.relaxation],
            SCALE_STD=options.scale == "std",
            PENALTY=PENALTIES[options.penalty],
            HAS_KEEP=keep is not None,
            WITH_GRAD=with_grad,
            GRID=grid.used,
            BLOCK=setting.block,
            PAIRS=setting.pairs,
            num_warps=setting.warps,
        )

    size = power_of_two_above(count, 16, 1 << 30)
    key = ("coherence_rows", device, size, options.relaxation, with_grad, student.ready)
    with on(device):
        tuned(key, grid.settings, launch, (student.values,))
    return losses
