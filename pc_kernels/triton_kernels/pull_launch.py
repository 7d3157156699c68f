"""Launches of pull.py: gradients of points from V, without what cancels and without waiting."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..dissimilarities.row_maker import CANCELLED
from ..products import Products
from .launch import on
from .pull import mend_kernel, weigh_kernel

STRAIGHT_TILE = {"ROWS": 8, "COLUMNS": 128, "num_warps": 4}
TURNED_TILE = {"ROWS": 32, "COLUMNS": 32, "num_warps": 4}
"""Of V in memory: a warp reads 128 bytes side by side."""

MENDED_TILE = {"ROWS": 8, "COLUMNS": 128, "num_warps": 4}


def pull(v: Tensor, x: Tensor, y: Tensor, products: Products) -> Tensor:
    """Σ_j v_ij (x_i − y_j) [n, D]; see `RowMaker.pull`."""
    turned = not v.is_contiguous()
    stride = v.stride(1) if turned else v.stride(0)
    (rows, count), width = v.shape, x.shape[1]
    target, squares = torch.empty_like(x), x.new_empty(rows)
    tile = TURNED_TILE if turned else STRAIGHT_TILE
    with on(v.device):
        weigh_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            v, x, target, squares, rows, count, width, stride, TURNED=turned, **tile
        )
        grad = products.add(target, v, y, -1.0)
        mend_kernel[(rows,)](
            grad,
            squares,
            v,
            x,
            y,
            count,
            width,
            stride,
            CANCELLED,
            TURNED=turned,
            **MENDED_TILE,
        )
    return grad
