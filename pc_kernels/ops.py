"""The operators, as PyTorch's dispatcher knows them: schema, kernel, fake kernel, autograd.

`torch.ops.pc_kernels.*` is what `torch.compile`, `torch.export` and autocast see. The kernels choose a
backend by name at run time. Options travel as plain strings and numbers; the public functions check
them, and the option classes do so again here for whoever calls an operator directly.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from .backends import select
from .checks import check_features, compute_dtype
from .dissimilarity import GivenSide, make_side
from .options import CoherenceOptions, Metric, RankOptions
from .sweep import chunk_anchors, default_chunk_bytes, exact_arithmetic, sweep

# Schemas are inferred from annotations, which must then be objects of the `typing` kind.
# ruff: noqa: UP045


def run_features(
    student: Tensor,
    teacher: Tensor,
    student_refs: Tensor | None,
    teacher_refs: Tensor | None,
    weights: Tensor,
    dissimilarity: Metric,
    teacher_dissimilarity: Metric,
    options: CoherenceOptions,
    self_start: int | None,
    chunk_bytes: int | None,
    backend: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [A], and the gradients in student and student_refs of Σ_i weights_i L_i (or empty).

    Gradients come in the compute dtype: casting them is the last thing a backward does.
    """
    device = student.device
    dtype = compute_dtype(student, teacher)
    engine = select(backend, device, dtype)
    features = [
        None if x is None else x.detach().to(dtype).contiguous()
        for x in (student, teacher, student_refs, teacher_refs)
    ]
    if student_refs is None:
        self_start = 0
    with torch.no_grad(), exact_arithmetic(device):
        s, t, s_refs, t_refs = features
        assert s is not None and t is not None
        student_side = make_side(dissimilarity, s, s_refs, with_grad)
        teacher_side = make_side(teacher_dissimilarity, t, t_refs, False)
        references = s.shape[0] if s_refs is None else s_refs.shape[0]
        budget = default_chunk_bytes(device) if chunk_bytes is None else chunk_bytes
        losses = sweep(
            student_side,
            teacher_side,
            weights.to(dtype).contiguous(),
            options,
            engine,
            chunk=chunk_anchors(engine, references, dtype.itemsize, budget),
            self_start=self_start,
            with_grad=with_grad,
        )
        nothing = losses.new_empty(0)
        if not with_grad:
            return losses, nothing, nothing.clone()
        grad, grad_refs = student_side.gradients()
    return losses, grad, nothing if grad_refs is None else grad_refs


@torch.library.custom_op("pc_kernels::perception_coherence", mutates_args=())
def perception_coherence(
    student: Tensor,
    teacher: Tensor,
    student_refs: Optional[Tensor],
    teacher_refs: Optional[Tensor],
    weights: Tensor,
    dissimilarity: str,
    teacher_dissimilarity: str,
    relaxation: str,
    temperature: float,
    scale: Optional[str],
    penalty: str,
    self_start: Optional[int],
    chunk_bytes: Optional[int],
    backend: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`run_features` for metrics that have names."""
    check_features(student, teacher, student_refs, teacher_refs)
    return run_features(
        student,
        teacher,
        student_refs,
        teacher_refs,
        weights,
        dissimilarity,
        teacher_dissimilarity,
        CoherenceOptions(relaxation, temperature, scale, penalty),
        self_start,
        chunk_bytes,
        backend,
        with_grad,
    )


@perception_coherence.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    student_refs: Optional[Tensor],
    teacher_refs: Optional[Tensor],
    weights: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    with_grad = options[-1]
    losses = student.new_empty(student.shape[0], dtype=dtype)
    grad = student.new_empty(student.shape if with_grad else (0,), dtype=dtype)
    refs_shape = student_refs.shape if with_grad and student_refs is not None else (0,)
    return losses, grad, student.new_empty(refs_shape, dtype=dtype)


def _save_features(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[5:-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _features_backward(ctx: Any, grad_losses: Tensor | None, *_: Any) -> tuple[Any, ...]:
    student, teacher, student_refs, teacher_refs = ctx.saved_tensors
    skipped = (None,) * (len(ctx.options) + 2)  # weights … with_grad
    if grad_losses is None:
        return None, None, None, None, *skipped
    _, grad, grad_refs = torch.ops.pc_kernels.perception_coherence(
        student, teacher, student_refs, teacher_refs, grad_losses, *ctx.options, True
    )
    to_refs = None if student_refs is None else grad_refs.to(student_refs.dtype)
    return grad.to(student.dtype), None, to_refs, None, *skipped


perception_coherence.register_autograd(_features_backward, setup_context=_save_features)


@torch.library.custom_op("pc_kernels::coherence_from_dissimilarities", mutates_args=())
def coherence_from_dissimilarities(
    d_s: Tensor,
    d_t: Tensor,
    weights: Tensor,
    exclude_self: bool,
    relaxation: str,
    temperature: float,
    scale: Optional[str],
    penalty: str,
    chunk_bytes: Optional[int],
    backend: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Losses [A] of matrices [A, M], and ∂(Σ_i weights_i L_i)/∂d_s (or empty)."""
    dtype = compute_dtype(d_s, d_t)
    engine = select(backend, d_s.device, dtype)
    options = CoherenceOptions(relaxation, temperature, scale, penalty)
    budget = default_chunk_bytes(d_s.device) if chunk_bytes is None else chunk_bytes
    with exact_arithmetic(d_s.device):
        side = GivenSide(d_s.to(dtype), with_grad)
        losses = sweep(
            side,
            GivenSide(d_t.to(dtype), False),
            weights.to(dtype).contiguous(),
            options,
            engine,
            chunk=chunk_anchors(engine, d_s.shape[1], dtype.itemsize, budget),
            self_start=0 if exclude_self else None,
            with_grad=with_grad,
        )
    return losses, side.gradients()[0] if with_grad else losses.new_empty(0)


@coherence_from_dissimilarities.register_fake
def _(d_s: Tensor, d_t: Tensor, weights: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(d_s, d_t)
    losses = d_s.new_empty(d_s.shape[0], dtype=dtype)
    return losses, d_s.new_empty(d_s.shape if options[-1] else (0,), dtype=dtype)


def _save_matrices(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[3:-1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _matrices_backward(ctx: Any, grad_losses: Tensor | None, _: Any) -> tuple[Any, ...]:
    d_s, d_t = ctx.saved_tensors
    skipped = (None,) * (len(ctx.options) + 3)
    if grad_losses is None:
        return None, *skipped
    _, grad = torch.ops.pc_kernels.coherence_from_dissimilarities(
        d_s, d_t, grad_losses, *ctx.options, True
    )
    return grad.to(d_s.dtype), *skipped


coherence_from_dissimilarities.register_autograd(_matrices_backward, setup_context=_save_matrices)


@torch.library.custom_op("pc_kernels::soft_rank", mutates_args=())
def soft_rank(
    x: Tensor, temperature: float, relaxation: str, scale: Optional[str], backend: str
) -> Tensor:
    """Soft ranks of the rows of x [N, m], in the dtype of x."""
    dtype = compute_dtype(x)
    options = RankOptions(relaxation, temperature, scale)
    with exact_arithmetic(x.device):
        rank = select(backend, x.device, dtype).soft_rank(x.to(dtype).contiguous(), options)
    return rank.to(x.dtype).contiguous()


@soft_rank.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("pc_kernels::soft_rank_backward", mutates_args=())
def soft_rank_backward(
    grad_rank: Tensor,
    x: Tensor,
    temperature: float,
    relaxation: str,
    scale: Optional[str],
    backend: str,
) -> Tensor:
    """The gradient in x [N, m] of soft ranks with gradient grad_rank [N, m], in the dtype of x."""
    dtype = compute_dtype(x)
    options = RankOptions(relaxation, temperature, scale)
    with exact_arithmetic(x.device):
        grad = select(backend, x.device, dtype).soft_rank_backward(
            grad_rank.to(dtype).contiguous(), x.to(dtype).contiguous(), options
        )
    return grad.to(x.dtype).contiguous()


@soft_rank_backward.register_fake
def _(grad_rank: Tensor, x: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_points(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.options = inputs[1:]


def _rank_backward(ctx: Any, grad_rank: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    grad = torch.ops.pc_kernels.soft_rank_backward(grad_rank, x, *ctx.options)
    return grad, None, None, None, None


soft_rank.register_autograd(_rank_backward, setup_context=_save_points)


@torch.library.custom_op("pc_kernels::hard_rank", mutates_args=())
def hard_rank(x: Tensor, backend: str) -> Tensor:
    """Mid-ranks of the rows of x [N, m], in the dtype of x."""
    dtype = compute_dtype(x)
    rank = select(backend, x.device, dtype).hard_rank(x.to(dtype).contiguous())
    return rank.to(x.dtype).contiguous()


@hard_rank.register_fake
def _(x: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
