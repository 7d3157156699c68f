"""Launches of points.py: features brought near the origin without waiting for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..dissimilarities.row_maker import FAR, Marks, NearOrigin
from ..products import Products
from .launch import on
from .normalized import normalized_backward_kernel, normalized_kernel, quarantine_kernel
from .points import move_kernel, shift_kernel
from .settings import compiler_options

TILE = {"ROWS": 32, "COLUMNS": 32, "num_warps": 4}
"""Of a pass down the columns: a warp reads 128 bytes of each row."""

MOVED_TILE = {"ROWS": 8, "COLUMNS": 128, "num_warps": 8}
"""Of a pass over rows: a warp has one."""

LONGEST = 1024
"""Elements of a block of what the last program does."""


def near_origin(points: list[Tensor], products: Products, marks: Marks) -> NearOrigin:
    """Points [·, D], the references last, made ready for products; see `RowMaker.near_origin`."""
    anchors, references = points[0], points[-1]
    shared = len(points) == 1
    moved, squares = [torch.empty_like(x) for x in points], [x.new_empty(len(x)) for x in points]
    offsets = torch.empty_like(squares[0])
    (count, width), device = references.shape, references.device
    tiles = max(1, triton.cdiv(width, TILE["COLUMNS"]))
    room = 2 << max(count - 1, 0).bit_length()
    shift, largest, unit = (references.new_empty(n) for n in (width, tiles, 1))
    twins, progress = (torch.empty(n, dtype=torch.int32, device=device) for n in (count + 1, 2))
    table = torch.empty(room + 1, dtype=torch.int64, device=device)
    inverse, poison = marks.inverse or points, marks.poison or squares  # or stand-ins
    rows = MOVED_TILE["ROWS"]
    programs = triton.cdiv(count, rows) + (0 if shared else triton.cdiv(len(anchors), rows))
    with on(device):
        shift_kernel[(tiles,)](
            anchors,
            references,
            inverse[0],
            inverse[-1],
            shift,
            largest,
            table,
            progress,
            len(anchors),
            count,
            width,
            room,
            SHARED=shared,
            UNIT=len(marks.inverse) > 0,
            PARTS=products.whole_parts,
            **TILE,
        )
        if programs:
            move_kernel[(programs,)](
                anchors,
                moved[0],
                squares[0],
                poison[0],
                references,
                moved[-1],
                squares[-1],
                poison[-1],
                shift,
                largest,
                unit,
                offsets,
                twins,
                table,
                progress,
                len(anchors),
                count,
                width,
                tiles,
                room,
                math.inf if marks.inverse else float(FAR),
                SHARED=shared,
                POISONED=len(marks.poison) > 0,
                BLOCK=LONGEST,
                **MOVED_TILE,
                **compiler_options(device),
            )
    return NearOrigin(moved, squares, offsets, twins, unit)


def normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Points over their norms, and 1/|x| [n, 1]; see `RowMaker.normalized`."""
    y, inverse = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float64)
    _by_rows(normalized_kernel, x, y, inverse)
    return y, inverse


def normalized_backward(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient in points of that in what they are over their norms."""
    to_x = torch.empty_like(grad)
    _by_rows(normalized_backward_kernel, grad, unit, inverse, to_x)
    return to_x


def quarantine(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `RowMaker.quarantine`."""
    finite, poison = torch.empty_like(x), x.new_empty(len(x))
    _by_rows(quarantine_kernel, x, finite, poison)
    return finite, poison


def _by_rows(kernel: Any, points: Tensor, *others: Tensor) -> None:
    """Launches a kernel of tiles of points."""
    count, width = points.shape
    if count:
        with on(points.device):
            programs = triton.cdiv(count, MOVED_TILE["ROWS"])
            kernel[(programs,)](points, *others, count, width, **MOVED_TILE)
