"""The `triton` backend (triton_kernels/)."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cdf_rows import CdfRows, sums_by_matrices
from ..dissimilarities.row_maker import (
    FEW_PAIRS,
    NO_MARKS,
    Marks,
    NearOrigin,
    in_unit,
    pull_by_differences,
)
from ..dissimilarities.rows import Chunk, Pairs, Rows
from ..products import IN_FLOAT32, Products
from .base import FusedBackend
from .contrast_rows import ColumnSums, LogitRows

if TYPE_CHECKING:
    from ..recipe import Recipe


class TritonBackend(FusedBackend):
    """Triton kernels (triton_kernels/): a GPU and `pip install triton` are all they need."""

    name = "triton"

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

    def near_origin(
        self, points: list[Tensor], products: Products = IN_FLOAT32, marks: Marks = NO_MARKS
    ) -> NearOrigin:
        """See `RowMaker`; two kernels."""
        return _points().near_origin(points, products, marks)

    def normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowMaker`; one kernel."""
        return _points().normalized(x)

    def normalized_backward(self, grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
        """See `RowMaker`; one kernel."""
        return _points().normalized_backward(grad.contiguous(), unit, inverse)

    def quarantine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowMaker`; one kernel."""
        return _points().quarantine(x)

    def straight(self, rows: Rows) -> bool:
        """See `RowMaker`: one kernel for narrow features, products and all."""
        return bool(_launch().straight_dissimilarity(rows))

    def pull(
        self,
        v: Tensor,
        x: Tensor,
        y: Tensor,
        products: Products = IN_FLOAT32,
        unit: float | Tensor = 1.0,
    ) -> Tensor:
        """See `RowMaker`; a product, and one kernel that looks for what has cancelled."""
        if v.numel() <= FEW_PAIRS or x.numel() == 0:
            return in_unit(pull_by_differences(v, x, y), unit)
        from ..triton_kernels.pull_launch import pull

        unit = x.new_ones(1) if isinstance(unit, float) else unit
        return pull(v, x.contiguous(), y.contiguous(), products, unit)

    def hard_rank(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `Backend`."""
        return _launch().hard_rank(x.contiguous(), keep)

    def soft_rank(
        self, x: Tensor, recipe: Recipe, with_grad: bool, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        if not self.knows(recipe.formula):
            return super().soft_rank(x, recipe, with_grad, keep)
        return _launch().soft_rank(x.contiguous(), recipe, with_grad, keep)

    def soft_rank_backward(
        self,
        grad_rank: Tensor,
        x: Tensor,
        density: Tensor,
        recipe: Recipe,
        keep: Tensor | None = None,
    ) -> Tensor:
        """See `Backend`."""
        if not self.knows(recipe.formula):
            return super().soft_rank_backward(grad_rank, x, density, recipe, keep)
        return _launch().soft_rank_backward(
            grad_rank.contiguous(), x.contiguous(), density, recipe, keep
        )

    def kernel_sums(self, rows: CdfRows, recipe: Recipe, kernels: tuple[str, ...]) -> list[Tensor]:
        """See `Backend`; lists are rows of matrices here, and very long ones go in plain PyTorch."""
        from ..triton_kernels import kernel_sums_launch as launch

        def sums(part: CdfRows) -> list[Tensor]:
            if not launch.fits(part):
                return super(TritonBackend, self).kernel_sums(part, recipe, kernels)
            return launch.kernel_sums(part.to(torch.float32), recipe, kernels)

        if not self.knows(recipe.formula):
            return super().kernel_sums(rows, recipe, kernels)
        return sums_by_matrices(rows, kernels, sums)

    def hard_rank_rows(self, teacher: Rows, pairs: Pairs) -> Rows:
        """See `Backend`."""
        return _launch().hard_rank_rows(teacher, pairs)

    def fused_rows(self, chunk: Chunk, recipe: Recipe, with_grad: bool) -> Tensor:
        """See `FusedBackend`; two kernels, `hard_rank_rows` and all the rest."""
        return _launch().coherence_rows(chunk, recipe, with_grad)

    def contrast_bytes(self, dtype: torch.dtype) -> int:
        """See `Backend`; in place."""
        return 0

    def contrast_columns(self, rows: LogitRows, sums: ColumnSums) -> None:
        """See `Backend`."""
        _contrast_launch().contrast_columns(rows, sums)

    def contrast_rows(self, rows: LogitRows, weights: Tensor, with_grad: bool) -> Tensor:
        """See `Backend`."""
        return _contrast_launch().contrast_rows(rows, weights, with_grad)


def _contrast_launch() -> Any:
    """The kernels of the contrastive loss; loads Triton on the first call."""
    from ..triton_kernels import contrast_launch

    return contrast_launch


def _points() -> Any:
    """The kernels on points; loads Triton on the first call."""
    from ..triton_kernels import near_origin

    return near_origin


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
