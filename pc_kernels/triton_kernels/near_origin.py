"""Launches of points.py: features brought near the origin without waiting for the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..dissimilarities.row_maker import FAR, NearOrigin
from ..products import Products
from .launch import on
from .points import move_kernel, offsets_kernel, shift_kernel
from .settings import power_of_two_above

TILE = {"ROWS": 32, "COLUMNS": 32, "num_warps": 4}
"""Of a pass down the columns: a warp reads 128 bytes of each row."""

LONGEST = 1024
"""Elements of a block."""


def near_origin(points: list[Tensor], products: Products) -> NearOrigin:
    """Points [·, D], the references last, made ready for products; see `RowMaker.near_origin`."""
    anchors, references = points[0], points[-1]
    with on(anchors.device):
        shift = _shift(anchors, references, products)
        moved, squares = zip(*(_move(x, shift) for x in points), strict=True)
        offsets = _offsets(squares[0], squares[-1])
    none = torch.empty(2, 0, dtype=torch.int64, device=anchors.device)
    return NearOrigin(list(moved), list(squares), offsets, none, 1.0)


def _shift(anchors: Tensor, references: Tensor, products: Products) -> Tensor:
    """[D]."""
    count, width = references.shape
    if references.numel() == 0:
        return references.new_zeros(width)
    shift = references.new_empty(width)
    shift_kernel[(triton.cdiv(width, TILE["COLUMNS"]),)](
        anchors,
        references,
        shift,
        len(anchors),
        count,
        width,
        SHARED=anchors is references,
        PARTS=products.whole_parts,
        **TILE,
    )
    return shift


def _move(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The points less the shift, and their squared norms."""
    count, width = x.shape
    moved, squares = torch.empty_like(x), x.new_zeros(count) if width == 0 else x.new_empty(count)
    if x.numel() > 0:
        columns = power_of_two_above(width, 32, LONGEST)
        warps = max(1, columns // 256)
        move_kernel[(count,)](
            x, shift, moved, squares, count, width, COLUMNS=columns, num_warps=warps
        )
    return moved, squares


def _offsets(anchor_sq: Tensor, reference_sq: Tensor) -> Tensor:
    """|a| of the anchors that are far out, 0 for the others."""
    if reference_sq.numel() == 0 or anchor_sq.numel() == 0:
        return torch.zeros_like(anchor_sq)
    offsets = torch.empty_like(anchor_sq)
    offsets_kernel[(1,)](
        anchor_sq,
        reference_sq,
        offsets,
        len(anchor_sq),
        len(reference_sq),
        float(FAR),
        BLOCK=LONGEST,
        num_warps=8,
    )
    return offsets
