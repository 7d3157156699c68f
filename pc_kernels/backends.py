"""The backends: what each needs, and the stages as it computes them.

A backend is its stages: `dissimilarity` of a chunk's rows; `hard_rank`, `soft_rank` and
`soft_rank_backward` of matrices of rows; and `coherence_rows`, an anchor's whole chain
dissimilarity -> rank -> loss -> gradient. The last has a plain PyTorch form here that any backend
inherits until it fuses its own.
"""

from __future__ import annotations

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
    """A way to compute the stages. The base class holds what the PyTorch backends share."""

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

    def coherence_rows(
        self,
        student: Rows,
        teacher: Rows,
        weights: Tensor,
        options: CoherenceOptions,
        self_start: int | None,
        with_grad: bool,
    ) -> Tensor:
        """Losses [C] of a chunk of C anchors.

        Args:
            student: the student's rows; with_grad, their values are overwritten with V, the gradient
                of Σ_i weights_i L_i (see dissimilarity.py), or with ∂L/∂δ where the metric is "given".
            teacher: the teacher's rows; their values may be overwritten.
            weights: one for each anchor, [C].
            options: relaxation, temperature, scale and penalty.
            self_start: anchor i is reference self_start + i, and left out; None: it is none of them.
            with_grad: whether V is wanted.
        """
        d_s, d_t = self.dissimilarity(student), self.dissimilarity(teacher)
        others = None
        if self_start is not None:
            others = _others(d_s.shape, self_start, d_s.device)
            d_s, d_t = d_s.gather(1, others), d_t.gather(1, others)
        m = d_s.shape[1]
        if m < 2:
            student_values = torch.zeros_like(student.values) + d_s.sum(1, keepdim=True) * 0
            if with_grad:
                student.values.copy_(student_values)
            return (d_s.sum(1) + d_t.sum(1)) * 0
        r_t = torch.where(d_t.isfinite().all(1, keepdim=True), self.hard_rank(d_t), torch.nan)
        r_s, density = self.soft_rank(d_s, options, with_grad)
        residual = r_s - r_t
        loss = reference.rank_penalty(residual, options.penalty).mean(1)
        if with_grad:
            slope = penalty_slope(residual, options.penalty) * (weights / m)[:, None]
            grad = self.soft_rank_backward(slope, d_s, density, options)
            grad = torch.where(loss.isnan()[:, None], torch.nan, grad)
            grad = dissimilarities_backward(student, true_dissimilarities(student, d_s), grad)
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


class ReferenceBackend(Backend):
    """The direct formulas of reference.py: O(m²) a row, for tests and for reading."""

    name = "reference"

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs anywhere."""
        return None

    def hard_rank(self, x: Tensor) -> Tensor:
        """See `Backend`."""
        return reference.hard_rank(x)

    def soft_rank(self, x: Tensor, options: RankOptions, with_grad: bool) -> tuple[Tensor, Tensor]:
        """See `Backend`; its backward starts from x."""
        rank = reference.soft_rank(x, options.temperature, options.relaxation, options.scale)
        return rank, torch.zeros_like(x) if with_grad else x.new_empty(0)

    def soft_rank_backward(
        self, grad_rank: Tensor, x: Tensor, density: Tensor, options: RankOptions
    ) -> Tensor:
        """See `Backend`; by explicit formula, since operators run below autograd."""
        difference = x[:, :, None] - x[:, None, :]
        centred = x - x.mean(1, keepdim=True)
        constant = (x == x[:, :1]).all(1, keepdim=True) & (options.scale == "std")
        sigma = centred.square().mean(1, keepdim=True).sqrt()
        tau = options.temperature * (sigma if options.scale == "std" else torch.ones_like(sigma))
        density = grid.relaxation_pdf(difference / tau[:, :, None], options.relaxation)
        slope = (grad_rank[:, :, None] - grad_rank[:, None, :]) / max(x.shape[1] - 1, 1)
        grad = (slope * density).sum(2) / tau
        if options.scale == "std":
            standard = centred / sigma
            grad = grad - standard * (grad * standard).mean(1, keepdim=True)
        grad = torch.where(constant, 0, grad)
        return torch.where(x.isfinite().all(1, keepdim=True), grad, torch.nan)


class TorchBackend(Backend):
    """The grid method in PyTorch operators: fast on any device, no compiler needed."""

    name = "torch"
    working_bytes = 160

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs anywhere."""
        return None

    def hard_rank(self, x: Tensor) -> Tensor:
        """See `Backend`."""
        return grid.hard_rank(x)

    def soft_rank(self, x: Tensor, options: RankOptions, with_grad: bool) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        return grid.soft_rank(x, options, with_grad)

    def soft_rank_backward(
        self, grad_rank: Tensor, x: Tensor, density: Tensor, options: RankOptions
    ) -> Tensor:
        """See `Backend`."""
        return grid.soft_rank_backward(grad_rank, x, density, options)


class CpuBackend(Backend):
    """The C++ extension (csrc/cpu): threads over rows, SIMD chosen at run time."""

    name = "cpu"
    working_bytes = 0
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

    def dissimilarity(self, rows: Rows) -> Tensor:
        """See `Backend`."""
        torch.ops.pc_kernels.cpu_dissimilarity_(*_fields(rows))
        return rows.values

    def hard_rank(self, x: Tensor) -> Tensor:
        """See `Backend`."""
        return torch.ops.pc_kernels.cpu_hard_rank(x.contiguous())

    def soft_rank(self, x: Tensor, options: RankOptions, with_grad: bool) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        return torch.ops.pc_kernels.cpu_soft_rank(x.contiguous(), *_arguments(options), with_grad)

    def soft_rank_backward(
        self, grad_rank: Tensor, x: Tensor, density: Tensor, options: RankOptions
    ) -> Tensor:
        """See `Backend`."""
        return torch.ops.pc_kernels.cpu_soft_rank_backward(
            grad_rank.contiguous(), x.contiguous(), density, *_arguments(options)
        )

    def coherence_rows(
        self,
        student: Rows,
        teacher: Rows,
        weights: Tensor,
        options: CoherenceOptions,
        self_start: int | None,
        with_grad: bool,
    ) -> Tensor:
        """See `Backend`; fused, a row at a time."""
        temperature, relaxation, scale = _arguments(options)
        return torch.ops.pc_kernels.cpu_coherence_rows(
            *_fields(student),
            *_fields(teacher),
            weights,
            -1 if self_start is None else self_start,
            temperature,
            relaxation,
            scale,
            options.penalty,
            with_grad,
        )


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


BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (CpuBackend(), TorchBackend(), ReferenceBackend())
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
