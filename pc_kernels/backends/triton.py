"""The `triton` backend (triton_kernels/)."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..options import CoherenceOptions, RankOptions
from ..rows import Rows
from .base import Backend


class TritonBackend(Backend):
    """Triton kernels (triton_kernels/): a GPU and `pip install triton` are all they need."""

    name = "triton"
    working_bytes = 0

    def serves(self, device: torch.device) -> bool:
        """GPUs; the interpreter, on the CPU, is for tests."""
        return device.type in ("cuda", "xpu") and not _interpreted()

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Needs Triton and a GPU that it compiles for (or its interpreter), and float32."""
        if device.type == "cpu" and not _interpreted():
            return (
                "it computes on GPUs; on CPU tensors only in Triton's interpreter, for tests: set "
                "TRITON_INTERPRET=1 before the start"
            )
        if device.type not in ("cpu", "cuda", "xpu"):
            return f"it computes on cuda (also ROCm) and xpu devices; got device {device}"
        if dtype != torch.float32:
            return f"it computes in float32; for {dtype} use backend='torch'"
        return triton_obstacle() or _capability_obstacle(device)

    def dissimilarity(self, rows: Rows) -> Tensor:
        """See `Backend`."""
        _launch().dissimilarity(rows)
        return rows.values

    def straight(self, rows: Rows) -> bool:
        """See `RowMaker`: one kernel for narrow features, products and all."""
        return bool(_launch().straight_dissimilarity(rows))

    def hard_rank(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `Backend`; where `keep` [N, m] is False the value is absent, and its rank 0."""
        return _launch().hard_rank(x.contiguous(), keep)

    def soft_rank(
        self, x: Tensor, options: RankOptions, with_grad: bool, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`; where `keep` [N, m] is False the value is absent, its rank and density 0."""
        return _launch().soft_rank(x.contiguous(), options, with_grad, keep)

    def soft_rank_backward(
        self,
        grad_rank: Tensor,
        x: Tensor,
        density: Tensor,
        options: RankOptions,
        keep: Tensor | None = None,
    ) -> Tensor:
        """See `Backend`; the gradient is 0 where `keep` [N, m] is False."""
        return _launch().soft_rank_backward(
            grad_rank.contiguous(), x.contiguous(), density, options, keep
        )

    def hard_rank_rows(self, teacher: Rows, self_start: int | None, keep: Tensor | None) -> Rows:
        """See `Backend`."""
        return _launch().hard_rank_rows(teacher, self_start, keep)

    def coherence_rows(
        self,
        student: Rows,
        teacher: Rows,
        weights: Tensor,
        options: CoherenceOptions,
        self_start: int | None,
        keep: Tensor | None,
        with_grad: bool,
    ) -> Tensor:
        """See `Backend`; two kernels, `hard_rank_rows` and all the rest."""
        return _launch().coherence_rows(
            student, teacher, weights, options, self_start, keep, with_grad
        )


def _launch() -> Any:
    """The kernels; loads Triton on the first call."""
    from ..triton_kernels import launch

    return launch


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def triton_obstacle() -> str | None:
    """Why Triton cannot be imported, or None; loads it on the first call."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not importable ({error}): `pip install triton`"
    return None


@cache
def _capability_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"Triton compiles for compute capability 8.0 and above; this GPU has {major}.{minor}"
    return None
