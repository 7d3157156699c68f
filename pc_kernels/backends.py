"""The backends: what each needs, and the stages as it computes them.

A backend is its stages: `dissimilarity` of a chunk's rows; `hard_rank`, `soft_rank` and
`soft_rank_backward` of matrices of rows; and `coherence_rows`, an anchor's whole chain
dissimilarity -> rank -> loss -> gradient. The backends in plain PyTorch share a form of the last that
calls the others; the compiled ones fuse it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import grid, reference
from .dissimilarity import (
    Rows,
    dissimilarities,
    dissimilarities_backward,
    true_dissimilarities,
)
from .options import CoherenceOptions, RankOptions


class Backend:
    """A way to compute the stages."""

    name: str
    working_bytes = 16
    """Working memory for each pair of a chunk, beside its two rows of dissimilarities."""
    chunk_rows = 1 << 30
    """Anchors beyond which a chunk gains nothing."""

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why tensors of this device and dtype cannot be computed on, or None."""
        raise NotImplementedError

    def dissimilarity(self, rows: Rows) -> Tensor:
        """δ(i, j) [C, M] of a chunk, less offsets (see `Rows`); may reuse the memory of its values."""
        return dissimilarities(rows)

    def hard_rank(self, x: Tensor) -> Tensor:
        """Mid-ranks of the rows of x [N, m]."""
        raise NotImplementedError

    def soft_rank(self, x: Tensor, options: RankOptions, with_grad: bool) -> tuple[Tensor, Tensor]:
        """Soft ranks of the rows of x [N, m]; with_grad, what their backward needs, else empty.

        That is the density S1(j) = Σ_k φ((x_j − x_k)/τ) [N, m], or 0 in rows that go without.
        """
        raise NotImplementedError

    def soft_rank_backward(
        self, grad_rank: Tensor, x: Tensor, density: Tensor, options: RankOptions
    ) -> Tensor:
        """The gradient in x [N, m] of ranks with gradient grad_rank [N, m]."""
        raise NotImplementedError

    def hard_rank_rows(
        self, teacher: Rows, self_start: int | None, keep: Tensor | None
    ) -> Rows | None:
        """A teacher's rows as its ranks, metric "ranked", for several students to share.

        They may reuse the memory of its values. None: this backend has no such stage.
        """
        return None

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
        """Losses [C] of a chunk of C anchors.

        Args:
            student: the student's rows; with_grad, their values are overwritten with V, the gradient
                of Σ_i weights_i L_i (see dissimilarity.py), or with ∂L/∂δ where the metric is "given".
            teacher: the teacher's rows, whose values may be overwritten unless they are ranks already.
            weights: one for each anchor, [C].
            options: relaxation, temperature, scale and penalty.
            self_start: anchor i is reference self_start + i, and left out; None: it is none of them.
            keep: bool [C, M], contiguous: where it is False the reference is absent; None: all are there.
            with_grad: whether V is wanted.
        """
        raise NotImplementedError


class StagewiseBackend(Backend):
    """A backend in plain PyTorch: `coherence_rows` calls one stage after the other.

    Its rank stages take `keep`, bool [N, m] or None: where it is False the value is absent. It has
    no say in the ranks of the others, gradient 0, and a rank that means nothing.
    """

    def hard_rank(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `Backend`."""
        raise NotImplementedError

    def soft_rank(
        self, x: Tensor, options: RankOptions, with_grad: bool, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        raise NotImplementedError

    def soft_rank_backward(
        self,
        grad_rank: Tensor,
        x: Tensor,
        density: Tensor,
        options: RankOptions,
        keep: Tensor | None = None,
    ) -> Tensor:
        """See `Backend`."""
        raise NotImplementedError

    def hard_rank_rows(
        self, teacher: Rows, self_start: int | None, keep: Tensor | None
    ) -> Rows | None:
        """See `Backend`."""
        d_t = self.dissimilarity(teacher)
        keep = torch.ones_like(d_t, dtype=torch.bool) if keep is None else keep.clone()
        if self_start is not None:
            keep.diagonal(self_start)[: len(keep)].fill_(False)
        d_t = torch.where(keep, d_t, 0)
        rank = torch.where(keep, self.hard_rank(d_t, keep), 0)
        finite = d_t.isfinite().all(1, keepdim=True)
        return Rows(torch.where(finite, rank, torch.nan), "ranked")

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
        """See `Backend`."""
        d_s, d_t = self.dissimilarity(student), self.dissimilarity(teacher)
        others = None
        if self_start is not None:
            others = _others(d_s.shape, self_start, d_s.device)
            d_s, d_t = d_s.gather(1, others), d_t.gather(1, others)
            keep = None if keep is None else keep.gather(1, others)
        if keep is not None:
            d_s, d_t = (torch.where(keep, d, 0) for d in (d_s, d_t))
        m = torch.full_like(weights, d_s.shape[1]) if keep is None else keep.sum(1).to(d_s.dtype)
        target = d_t if teacher.metric == "ranked" else self.hard_rank(d_t, keep)
        rank, density = self.soft_rank(d_s, options, with_grad, keep)
        residual = rank - target
        if keep is not None:
            residual = torch.where(keep, residual, 0)
        loss = reference.rank_penalty(residual, options.penalty).sum(1) / m.clamp(min=1)
        loss = torch.where(m < 2, 0, loss)  # nothing to rank
        loss = torch.where((d_s.isfinite() & d_t.isfinite()).all(1), loss, torch.nan)
        if with_grad:
            scale = torch.where(m < 2, 0, weights / m.clamp(min=1))
            slope = penalty_slope(residual, options.penalty) * scale[:, None]
            grad = self.soft_rank_backward(slope, d_s, density, options, keep)
            grad = torch.where(loss.isnan()[:, None], torch.nan, grad)
            grad = dissimilarities_backward(student, true_dissimilarities(student, d_s), grad)
            if keep is not None:
                grad = torch.where(keep, grad, 0)
            if others is None:
                student.values.copy_(grad)
            else:
                student.values.zero_().scatter_(1, others, grad)
        return loss


def _others(shape: torch.Size, self_start: int, device: torch.device) -> Tensor:
    """Columns [C, M−1] of every anchor's references but itself."""
    own = torch.arange(self_start, self_start + shape[0], device=device)[:, None]
    column = torch.arange(shape[1] - 1, device=device)[None, :]
    return column + (column >= own)


def penalty_slope(residual: Tensor, kind: str) -> Tensor:
    """ℓ′(residual)."""
    if kind == "squared":
        return 2 * residual
    if kind == "absolute":
        return residual.sign()
    return residual.clamp(-reference.HUBER_DELTA, reference.HUBER_DELTA)


class ReferenceBackend(StagewiseBackend):
    """The direct formulas of reference.py: O(m²) a row, for tests and for reading."""

    name = "reference"

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs anywhere."""
        return None

    def hard_rank(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `StagewiseBackend`."""
        return reference.hard_rank(x, keep=keep)

    def soft_rank(
        self, x: Tensor, options: RankOptions, with_grad: bool, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `StagewiseBackend`; its backward starts from x."""
        rank = reference.soft_rank(
            x, options.temperature, options.relaxation, options.scale, keep=keep
        )
        return rank, torch.zeros_like(x) if with_grad else x.new_empty(0)

    def soft_rank_backward(
        self,
        grad_rank: Tensor,
        x: Tensor,
        density: Tensor,
        options: RankOptions,
        keep: Tensor | None = None,
    ) -> Tensor:
        """See `StagewiseBackend`; by explicit formula, since operators run below autograd."""
        if x.shape[1] == 0:
            return x.clone()
        keep = torch.ones_like(x, dtype=torch.bool) if keep is None else keep
        count = keep.sum(1, keepdim=True)
        x = torch.where(keep, x, 0)
        sigma, standard = torch.ones_like(count, dtype=x.dtype), torch.zeros_like(x)
        constant = count < 2
        if options.scale == "std":
            centred = torch.where(keep, x - x.sum(1, keepdim=True) / count.clamp(min=1), 0)
            low = torch.where(keep, x, torch.inf).amin(1, keepdim=True)
            constant = constant | ((x == low) | ~keep).all(1, keepdim=True)
            sigma = (centred.square().sum(1, keepdim=True) / count.clamp(min=1)).sqrt()
            standard = torch.where(constant, 0, centred / sigma)
        tau = options.temperature * sigma
        difference = x[:, :, None] - x[:, None, :]
        density = grid.relaxation_pdf(difference / tau[:, :, None], options.relaxation)
        slope = (grad_rank[:, :, None] - grad_rank[:, None, :]) * keep[:, None, :]
        grad = torch.where(keep, (slope * density).sum(2) / tau / (count - 1).clamp(min=1), 0)
        grad = grad - standard * (grad * standard).sum(1, keepdim=True) / count.clamp(min=1)
        grad = torch.where(constant, 0, grad)
        return torch.where(x.isfinite().all(1, keepdim=True), grad, torch.nan)


class TorchBackend(StagewiseBackend):
    """The grid method in PyTorch operators: fast on any device, no compiler needed."""

    name = "torch"
    working_bytes = 160

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs anywhere."""
        return None

    def hard_rank(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `StagewiseBackend`."""
        return grid.hard_rank(x, keep)

    def soft_rank(
        self, x: Tensor, options: RankOptions, with_grad: bool, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `StagewiseBackend`."""
        return grid.soft_rank(x, options, with_grad, keep)

    def soft_rank_backward(
        self,
        grad_rank: Tensor,
        x: Tensor,
        density: Tensor,
        options: RankOptions,
        keep: Tensor | None = None,
    ) -> Tensor:
        """See `StagewiseBackend`."""
        return grid.soft_rank_backward(grad_rank, x, density, options, keep)


class CompiledBackend(Backend):
    """A backend of compiled kernels: each stage is an operator with the backend's name in front."""

    working_bytes = 0

    def operator(self, stage: str) -> Callable[..., Any]:
        """The operator that computes `stage`."""
        return getattr(torch.ops.pc_kernels, f"{self.name}_{stage}")

    def dissimilarity(self, rows: Rows) -> Tensor:
        """See `Backend`."""
        self.operator("dissimilarity_")(*_fields(rows))
        return rows.values

    def hard_rank(self, x: Tensor) -> Tensor:
        """See `Backend`."""
        return self.operator("hard_rank")(x.contiguous())

    def soft_rank(self, x: Tensor, options: RankOptions, with_grad: bool) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        return self.operator("soft_rank")(x.contiguous(), *_arguments(options), with_grad)

    def soft_rank_backward(
        self, grad_rank: Tensor, x: Tensor, density: Tensor, options: RankOptions
    ) -> Tensor:
        """See `Backend`."""
        return self.operator("soft_rank_backward")(
            grad_rank.contiguous(), x.contiguous(), density, *_arguments(options)
        )

    def hard_rank_rows(
        self, teacher: Rows, self_start: int | None, keep: Tensor | None
    ) -> Rows | None:
        """See `Backend`."""
        start = -1 if self_start is None else self_start
        self.operator("hard_rank_rows_")(*_fields(teacher), keep, start)
        return Rows(teacher.values, "ranked")

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
        """See `Backend`; fused, a row at a time."""
        return self.operator("coherence_rows")(
            *_fields(student),
            *_fields(teacher),
            weights,
            keep,
            -1 if self_start is None else self_start,
            *_arguments(options),
            options.penalty,
            with_grad,
        )


class CpuBackend(CompiledBackend):
    """The C++ extension (csrc/cpu): threads over rows, SIMD chosen at run time."""

    name = "cpu"
    chunk_rows = 1024

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


class CudaBackend(CompiledBackend):
    """The CUDA extension (csrc/cuda): a block of threads a row."""

    name = "cuda"

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


def _arguments(options: RankOptions) -> tuple[float, str, bool]:
    return options.temperature, options.relaxation, options.scale == "std"


def _fields(rows: Rows) -> tuple[Any, ...]:
    return (
        rows.values,
        rows.metric,
        rows.anchors,
        rows.references,
        rows.anchor_sq,
        rows.reference_sq,
        rows.offsets,
    )


@cache
def extension_obstacle() -> str | None:
    """Why the compiled extension is not loaded, or None; loads it on the first call."""
    try:
        from . import _C  # noqa: F401 - registers the operators
    except ImportError as error:
        if "_C" in str(error) and "cannot import name" in str(error):
            return (
                "the C++ extension was not built: install with a C++ compiler and "
                "`pip install --no-build-isolation`"
            )
        return f"the C++ extension does not load (built for another torch?): {error}"
    return None


@cache
def cuda_extension_obstacle() -> str | None:
    """Why the CUDA extension is not loaded, or None; loads it on the first call."""
    try:
        from . import _C_cuda  # noqa: F401 - registers the operators
    except ImportError as error:
        if "_C_cuda" in str(error) and "cannot import name" in str(error):
            return (
                "the CUDA extension was not built: install with nvcc and a CUDA build of torch at "
                "hand, with `pip install --no-build-isolation`"
            )
        return f"the CUDA extension does not load (built for another torch?): {error}"
    return None


def _architecture_obstacle(device: torch.device) -> str | None:
    """Why kernels of the loaded CUDA extension do not run on this GPU, or None."""
    from . import _C_cuda

    oldest = min(
        tuple(map(int, re.findall(r"\d+", a)[:2])) for a in _C_cuda.architectures.split(";")
    )
    capability = torch.cuda.get_device_capability(device)
    if capability >= oldest:
        return None
    return (
        f"it was built for compute capability {_C_cuda.architectures}, this GPU has "
        f"{capability[0]}.{capability[1]}: rebuild with TORCH_CUDA_ARCH_LIST set"
    )


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (CudaBackend(), CpuBackend(), TorchBackend(), ReferenceBackend())
}
"""By name, in the order in which `auto` tries them; `reference` is never picked for speed."""


def select(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called `name`, or for "auto" the first that is usable.

    Raises:
        ValueError: no backend has this name, or the one that has cannot be used, and why.
    """
    if name == "auto":
        return next(b for b in BACKENDS.values() if b.obstacle(device, dtype) is None)
    if name not in BACKENDS:
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend must be one of {names}; got {name!r}")
    reason = BACKENDS[name].obstacle(device, dtype)
    if reason is not None:
        raise ValueError(f"backend {name!r} is not usable here: {reason}")
    return BACKENDS[name]
