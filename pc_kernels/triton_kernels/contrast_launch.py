"""What the backend calls for the contrastive loss: launches, which never wait for the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..backends.contrast_rows import ColumnSums, LogitRows
from .contrast_rows import CODES, contrast_columns_kernel, contrast_rows_kernel
from .launch import on
from .settings import power_of_two_above

ROW_BLOCK, COLUMN_BLOCK = 1024, 64
"""Logits of a row, and columns, that a program has in registers at a time."""


def _keep_of(rows: LogitRows) -> Tensor:
    """The mask as the kernels read it, or a stand-in."""
    return rows.values if rows.keep is None else rows.keep.contiguous().view(torch.uint8)


def contrast_columns(rows: LogitRows, sums: ColumnSums) -> None:
    """See `Backend.contrast_columns`."""
    values = rows.values
    if values.numel() == 0:
        return
    columns = len(sums.top)
    with on(values.device):
        contrast_columns_kernel[(triton.cdiv(columns, COLUMN_BLOCK),)](
            values,
            _keep_of(rows),
            sums.top,
            sums.total,
            sums.positive,
            *values.shape,
            rows.start,
            columns,
            HAS_KEEP=rows.keep is not None,
            BLOCK=COLUMN_BLOCK,
            num_warps=2,
        )


def contrast_rows(rows: LogitRows, weights: Tensor, with_grad: bool) -> Tensor:
    """See `Backend.contrast_rows`."""
    values = rows.values
    losses = torch.empty_like(weights)
    if values.numel() == 0:
        return losses
    shift, factor, own = rows.columns or (values, values, weights)
    columns = 0 if rows.columns is None else len(shift)
    target = values if rows.target is None else rows.target
    block = power_of_two_above(values.shape[1], 16, ROW_BLOCK)
    with on(values.device):
        contrast_rows_kernel[(len(values),)](
            values,
            _keep_of(rows),
            target,
            shift,
            factor,
            own,
            weights,
            losses,
            values.shape[1],
            rows.start,
            columns,
            FORM=CODES[rows.form],
            HAS_KEEP=rows.keep is not None,
            HAS_COLUMNS=columns > 0,
            WITH_GRAD=with_grad,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
    return losses
