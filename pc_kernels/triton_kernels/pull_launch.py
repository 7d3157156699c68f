"""Launches of pull.py: gradients of points from V, without what cancels and without waiting."""

from __future__ import annotations

import triton
from torch import Tensor

from ..dissimilarities.row_maker import CANCELLED
from ..products import Products
from .launch import on
from .pull import pull_kernel
from .settings import compiler_options

STRAIGHT_TILE = {"ROWS": 8, "COLUMNS": 128, "num_warps": 4}
TURNED_TILE = {"ROWS": 32, "COLUMNS": 32, "num_warps": 4}
"""Of V in memory: a warp reads 128 bytes side by side."""


def pull(v: Tensor, x: Tensor, y: Tensor, products: Products, unit: Tensor) -> Tensor:
    """Σ_j v_ij (x_i − y_j) over the unit [n, D]; see `RowMaker.pull`."""
    turned = not v.is_contiguous()
    (rows, count), width = v.shape, x.shape[1]
    tile = TURNED_TILE if turned else STRAIGHT_TILE
    pulled = products.weighed(v, y)
    with on(v.device):
        pull_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            pulled,
            v,
            x,
            y,
            unit,
            rows,
            count,
            width,
            v.stride(1) if turned else v.stride(0),
            CANCELLED,
            TURNED=turned,
            **tile,
            **compiler_options(v.device),
        )
    return pulled
