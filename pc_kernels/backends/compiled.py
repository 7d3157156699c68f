"""The backends of compiled extensions: `cpu` (csrc/cpu) and `cuda` (csrc/cuda)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cdf_rows import CdfRows, sums_by_matrices
from ..dissimilarities.row_maker import (
    CANCELLED,
    FAR,
    FEW_PAIRS,
    NO_MARKS,
    SMALLEST_BLOCK,
    Marks,
    NearOrigin,
    in_unit,
)
from ..dissimilarities.rows import Chunk, Pairs, Rows
from ..formulas import KERNELS, Projection, Relaxation
from ..installation import OLD_TORCH, why_not_loaded
from ..pair_counts import PairCounts, pairs_of
from ..products import IN_FLOAT32, Products
from .architectures import architecture_obstacle
from .base import FusedBackend
from .contrast_rows import ColumnSums, LogitRows

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..sweep import Batch


AT_ONCE = ("euclidean", "sqeuclidean")
"""Dissimilarities of batches of which one operator makes everything."""

MOST_AT_ONCE = (2 * SMALLEST_BLOCK) ** 2
"""Pairs from which on their products are worth being halved, see `upper_product`."""


class CompiledBackend(FusedBackend):
    """A backend of compiled kernels: each stage is an operator with the backend's name in front."""

    def operator(self, stage: str) -> Callable[..., Any]:
        """The operator that computes `stage`."""
        return getattr(torch.ops.pc_kernels, f"{self.name}_{stage}")

    def dissimilarity(self, rows: Rows) -> Tensor:
        """See `Backend`."""
        self.operator("dissimilarity_")(*_fields(rows))
        return rows.values

    def hard_rank(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `Backend`."""
        return self.operator("hard_rank")(x.contiguous(), keep)

    def soft_rank(
        self, x: Tensor, recipe: Recipe, with_grad: bool, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        if not self.knows(recipe.formula):
            return super().soft_rank(x, recipe, with_grad, keep)
        return self.operator("soft_rank")(x.contiguous(), keep, *_scaling(recipe), with_grad)

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
        return self.operator("soft_rank_backward")(
            grad_rank.contiguous(), x.contiguous(), density, keep, *_scaling(recipe)
        )

    def kernel_sums(self, rows: CdfRows, recipe: Recipe, kernels: tuple[str, ...]) -> list[Tensor]:
        """See `Backend`; a row at a time."""
        if not self.knows(recipe.formula):
            return super().kernel_sums(rows, recipe, kernels)
        wanted = [kernel in kernels for kernel in KERNELS]
        sums = self.operator("kernel_sums")(*rows, recipe.temperature, recipe.relaxation, wanted)
        return [sums[KERNELS.index(kernel)] for kernel in kernels]

    def hard_rank_rows(self, teacher: Rows, pairs: Pairs) -> Rows:
        """See `Backend`."""
        self.operator("hard_rank_rows_")(*_fields(teacher), *_pairs(pairs))
        return Rows(teacher.values, "ranked")

    def fused_rows(self, chunk: Chunk, recipe: Recipe, with_grad: bool) -> Tensor:
        """See `FusedBackend`; a row at a time."""
        return self.operator("coherence_rows")(
            *_fields(chunk.student),
            *_fields(chunk.teacher),
            chunk.weights,
            *_pairs(chunk.pairs),
            *_scaling(recipe),
            recipe.penalty,
            with_grad,
        )

    def contrast_bytes(self, dtype: torch.dtype) -> int:
        """See `Backend`; in place."""
        return 0

    def contrast_columns(self, rows: LogitRows, sums: ColumnSums) -> None:
        """See `Backend`."""
        self.operator("contrast_columns_")(
            rows.values, rows.keep, rows.start, sums.top, sums.total, sums.positive
        )

    def contrast_rows(self, rows: LogitRows, weights: Tensor, with_grad: bool) -> Tensor:
        """See `Backend`."""
        columns = list(rows.columns or ())
        return self.operator("contrast_rows")(
            rows.values, rows.keep, rows.start, rows.target, columns, weights, rows.form, with_grad
        )


class CpuBackend(CompiledBackend):
    """The C++ extension (csrc/cpu): threads over rows, SIMD chosen at run time."""

    name = "cpu"
    chunk_rows = 1024
    tile_bytes = 2 << 20  # of a core's second cache
    whole_bytes = 512 << 20

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Needs the compiled extension, CPU tensors, and float32 to compute in."""
        reason = extension_obstacle()
        if reason is not None:
            return reason
        if device.type != "cpu":
            return f"it computes on CPU tensors; got device {device}"
        if dtype != torch.float32:
            return f"it computes in float32; for {dtype} use backend='torch'"
        return None

    def knows(self, relaxation: Relaxation | Projection) -> bool:
        """See `FusedBackend`; its kernels scan and project as well."""
        return relaxation.code is not None

    def sweep_at_once(
        self, batch: Batch, recipe: Recipe, with_grad: bool
    ) -> tuple[Tensor, list[Tensor]] | None:
        """See `Backend`; of few pairs, where calls cost more than what they compute."""
        names = recipe.dissimilarity, recipe.ranked_by
        plain = len(batch.students) == 1 and batch.pair_mask is None and not batch.given
        known = all(name in AT_ONCE for name in names) and recipe.products == "ieee"
        pairs, room = len(batch.teacher) * batch.references, recipe.chunk_bytes
        fits = pairs < MOST_AT_ONCE and (room is None or 8 * pairs <= room)
        if not (plain and known and fits and self.fuses(recipe)):
            return None
        losses, gradients = torch.ops.pc_kernels.cpu_sweep(
            _points(batch.students[0], batch.student_refs),
            _points(batch.teacher, batch.teacher_refs),
            batch.weights[0].float().contiguous(),
            -1 if batch.self_start is None else batch.self_start,
            *names,
            *_scaling(recipe),
            recipe.penalty,
            FAR,
            FEW_PAIRS,
            CANCELLED,
            with_grad,
        )
        return losses[None], gradients

    def isotonic_blocks(self, s: Tensor, w: Tensor, kl: bool) -> Tensor:
        """See `Backend`; by pooling adjacent violators, threads over rows."""
        blocks: Tensor = torch.ops.pc_kernels.cpu_isotonic_blocks(s, w, kl)
        return blocks

    def empty_rows(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """See `RowMaker`; memory that is kept from call to call (csrc/cpu/kept_memory.h)."""
        made: Tensor = torch.ops.pc_kernels.cpu_empty_rows(like, rows, columns)
        return made

    def pair_counts(self, x: Tensor, y: Tensor, offsets: Tensor) -> PairCounts:
        """See `Backend`; by merging, a list at a time."""
        counts = torch.ops.pc_kernels.cpu_pair_counts(x, y, offsets)
        return PairCounts(pairs_of(offsets.diff()), *counts.unbind(1))

    def near_origin(
        self, points: list[Tensor], products: Products = IN_FLOAT32, marks: Marks = NO_MARKS
    ) -> NearOrigin:
        """See `RowMaker`; a few passes over the features, by threads."""
        if marks.inverse:
            return super().near_origin(points, products, marks)
        moved, squares, *rest = torch.ops.pc_kernels.cpu_near_origin(points, FAR)
        if marks.poison:
            squares = [sq + poison for sq, poison in zip(squares, marks.poison, strict=True)]
        return NearOrigin(moved or points, squares, *rest)

    def normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowMaker`."""
        normalized: tuple[Tensor, Tensor] = torch.ops.pc_kernels.cpu_scaled(x, 1.0)
        return normalized

    def normalized_backward(self, grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
        """See `RowMaker`."""
        to_x, _ = torch.ops.pc_kernels.cpu_scaled_backward(grad, unit, inverse, 1.0)
        return to_x

    def mirror(self, values: Tensor, start: int) -> None:
        """See `RowMaker`; through registers."""
        torch.ops.pc_kernels.cpu_mirror_(values, start)

    def with_mirror(self, v: Tensor) -> Tensor:
        """See `RowMaker`; in place."""
        mirrored: Tensor = torch.ops.pc_kernels.cpu_with_mirror(v)
        return mirrored

    def pull(
        self,
        v: Tensor,
        x: Tensor,
        y: Tensor,
        products: Products = IN_FLOAT32,
        unit: float | Tensor = 1.0,
    ) -> Tensor:
        """See `RowMaker`."""
        if products.parts:
            return super().pull(v, x, y, products, unit)
        return in_unit(torch.ops.pc_kernels.cpu_pull(v, x, y, FEW_PAIRS, CANCELLED), unit)


class CudaBackend(CompiledBackend):
    """The CUDA extension (csrc/cuda): a block of threads a row."""

    name = "cuda"

    def serves(self, device: torch.device) -> bool:
        """CUDA devices."""
        return device.type == "cuda"

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Needs CUDA tensors, the compiled extension for their GPU, and float32 to compute in."""
        if device.type != "cuda":
            return f"it computes on CUDA tensors; got device {device}"
        if torch.version.hip is not None:
            return "it needs an NVIDIA GPU; this torch is built for ROCm"
        if torch.compiler.is_compiling():  # nothing to trace; the operator asks again when it runs
            return None
        reason = cuda_extension_obstacle() or _architecture_obstacle(device)
        if reason is not None:
            return reason
        if dtype != torch.float32:
            return f"it computes in float32; for {dtype} use backend='torch'"
        return None

    def kernel_sums(self, rows: CdfRows, recipe: Recipe, kernels: tuple[str, ...]) -> list[Tensor]:
        """See `Backend`; lists are rows of matrices here."""
        return sums_by_matrices(
            rows, kernels, partial(super().kernel_sums, recipe=recipe, kernels=kernels)
        )

    def near_origin(
        self, points: list[Tensor], products: Products = IN_FLOAT32, marks: Marks = NO_MARKS
    ) -> NearOrigin:
        """See `RowMaker`; two launches."""
        far = math.inf if marks.inverse else FAR
        lists = list(marks.poison), list(marks.inverse)
        near = self.operator("near_origin")(points, *lists, products.whole_parts, far)
        return NearOrigin(*near)

    def normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowMaker`; one launch."""
        normalized: tuple[Tensor, Tensor] = self.operator("scaled")(x, 1.0)
        return normalized

    def normalized_backward(self, grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
        """See `RowMaker`; one launch."""
        to_x, _ = self.operator("scaled_backward")(grad, unit, inverse, 1.0)
        return to_x

    def quarantine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowMaker`; one launch."""
        quarantined: tuple[Tensor, Tensor] = self.operator("quarantine")(x)
        return quarantined

    def pull(
        self,
        v: Tensor,
        x: Tensor,
        y: Tensor,
        products: Products = IN_FLOAT32,
        unit: float | Tensor = 1.0,
    ) -> Tensor:
        """See `RowMaker`; a product, and a launch that looks at every row."""
        few = v.numel() <= FEW_PAIRS
        pulled = torch.empty_like(x) if few else products.weighed(v, y)
        unit = x.new_ones(1) if isinstance(unit, float) else unit
        self.operator("pull_")(pulled, v, x, y, unit, not few, CANCELLED)
        return pulled


def _points(*features: Tensor | None) -> list[Tensor]:
    return [x.detach().float().contiguous() for x in features if x is not None]


def _fields(rows: Rows) -> tuple[Tensor, str, list[Tensor]]:
    return rows.values, rows.dissimilarity, list(rows.gram or ())


def _pairs(pairs: Pairs) -> tuple[Tensor | None, int]:
    return pairs.keep, -1 if pairs.self_start is None else pairs.self_start


def _scaling(recipe: Recipe) -> tuple[float, str, bool]:
    return recipe.temperature, recipe.relaxation, recipe.scale == "std"


@cache
def extension_obstacle() -> str | None:
    """Why the compiled extension is not loaded, or None; loads it on the first call."""
    if "cpu" in OLD_TORCH:
        return OLD_TORCH["cpu"]
    try:
        from .. import _C  # noqa: F401 - registers the operators
    except ImportError as error:
        return why_not_loaded("cpu", error)
    return None


@cache
def cuda_extension_obstacle() -> str | None:
    """Why the CUDA extension is not loaded, or None; loads it on the first call."""
    if "cuda" in OLD_TORCH:
        return OLD_TORCH["cuda"]
    try:
        from .. import _C_cuda  # noqa: F401 - registers the operators
    except ImportError as error:
        return why_not_loaded("cuda", error)
    return None


def _architecture_obstacle(device: torch.device) -> str | None:
    """Why kernels of the loaded CUDA extension do not run on this GPU, or None."""
    from .. import _C_cuda

    return architecture_obstacle(_C_cuda.architectures, torch.cuda.get_device_capability(device))
