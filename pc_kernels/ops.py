"""The operators, as PyTorch's dispatcher knows them: schema, kernel, fake kernel, autograd.

`torch.ops.pc_kernels.*` is what `torch.compile`, `torch.export` and autocast see. The kernels choose a
backend by name at run time. Options travel as plain strings and numbers; the public functions check
them, and the option classes do so again here for whoever calls an operator directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import select
from .checks import check_features, compute_dtype, first_order_only
from .dissimilarity import GivenSide, MaskedSide, make_side
from .options import CoherenceOptions, Metric, RankOptions
from .sweep import chunk_anchors, default_chunk_bytes, exact_arithmetic, sweep

_library = torch.library.Library("pc_kernels", "FRAGMENT")


def operator(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Registers `kernel` as pc_kernels::<its name>, with the schema that its annotations say.

    One kernel for all devices: it chooses the backend itself. (torch.library.custom_op would do, but
    loads the compiler stack, a second and more, on the first call.)
    """
    schema = torch.library.infer_schema(kernel, mutates_args=())
    name = kernel.__name__
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    return kernel


def fake(name: str) -> Callable[..., Any]:
    """Registers the decorated function as what pc_kernels::name does to shapes and dtypes."""
    return torch.library.register_fake(f"pc_kernels::{name}", lib=_library)


def autograd(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Registers the backward of pc_kernels::name."""
    torch.library.register_autograd(
        f"pc_kernels::{name}", backward, setup_context=setup, lib=_library
    )


def run_features(
    student: Tensor,
    teacher: Tensor,
    student_refs: Tensor | None,
    teacher_refs: Tensor | None,
    weights: Tensor,
    pair_mask: Tensor | None,
    dissimilarity: Metric,
    teacher_dissimilarity: Metric,
    options: CoherenceOptions,
    self_start: int | None,
    chunk_bytes: int | None,
    backend: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [A], and the gradients in student and student_refs of Σ_i weights_i L_i (or empty).

    Where pair_mask, bool and broadcast to [A, M], is False, the reference is absent for that anchor.
    Gradients come in the compute dtype: casting them is the last thing a backward does.
    """
    losses, gradients = run_layers(
        [student],
        teacher,
        student_refs,
        teacher_refs,
        weights[None],
        pair_mask,
        dissimilarity,
        teacher_dissimilarity,
        options,
        self_start,
        chunk_bytes,
        backend,
        with_grad,
    )
    nothing = losses.new_empty(0)
    if not with_grad:
        return losses[0], nothing, nothing.clone()
    grad, grad_refs = gradients[0]
    return losses[0], grad, nothing if grad_refs is None else grad_refs


def run_layers(
    students: Sequence[Tensor],
    teacher: Tensor,
    student_refs: Tensor | None,
    teacher_refs: Tensor | None,
    weights: Tensor,
    pair_mask: Tensor | None,
    dissimilarity: Metric,
    teacher_dissimilarity: Metric,
    options: CoherenceOptions,
    self_start: int | None,
    chunk_bytes: int | None,
    backend: str,
    with_grad: bool,
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """`run_features` for L students of one teacher: losses [L, A], and each student's gradients.

    weights are [L, A]. student_refs go with a single student.
    """
    device = teacher.device
    dtype = compute_dtype(*students, teacher)
    engine = select(backend, device, dtype)

    def ready(x: Tensor) -> Tensor:
        return x.detach().to(dtype).contiguous()

    s_refs, t_refs = (None if x is None else ready(x) for x in (student_refs, teacher_refs))
    anchors = teacher.shape[0]
    references = anchors if t_refs is None else t_refs.shape[0]
    side_of = make_side if pair_mask is None else MaskedSide
    with torch.no_grad(), exact_arithmetic(device):
        sides = [side_of(dissimilarity, ready(s), s_refs, with_grad, engine) for s in students]
        if teacher_dissimilarity == "euclidean":  # squares rank alike, and no root rounds to a tie
            teacher_dissimilarity = "sqeuclidean"
        budget = default_chunk_bytes(device) if chunk_bytes is None else chunk_bytes
        losses = sweep(
            sides,
            side_of(teacher_dissimilarity, ready(teacher), t_refs, False, engine),
            weights.to(dtype).contiguous(),
            options,
            engine,
            chunk=chunk_anchors(engine, references, dtype.itemsize, budget, len(sides)),
            self_start=0 if student_refs is None else self_start,
            pair_mask=None if pair_mask is None else pair_mask.expand(anchors, references),
            with_grad=with_grad,
        )
        return losses, [side.gradients() for side in sides] if with_grad else []


@operator
def perception_coherence(
    student: Tensor,
    teacher: Tensor,
    student_refs: Tensor | None,
    teacher_refs: Tensor | None,
    weights: Tensor,
    pair_mask: Tensor | None,
    dissimilarity: str,
    teacher_dissimilarity: str,
    relaxation: str,
    temperature: float,
    scale: str | None,
    penalty: str,
    self_start: int | None,
    chunk_bytes: int | None,
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
        pair_mask,
        dissimilarity,
        teacher_dissimilarity,
        CoherenceOptions(relaxation, temperature, scale, penalty),
        self_start,
        chunk_bytes,
        backend,
        with_grad,
    )


@fake("perception_coherence")
def _(
    student: Tensor,
    teacher: Tensor,
    student_refs: Tensor | None,
    teacher_refs: Tensor | None,
    weights: Tensor,
    pair_mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    with_grad = options[-1]
    losses = student.new_empty(student.shape[0], dtype=dtype)
    grad = student.new_empty(student.shape if with_grad else (0,), dtype=dtype)
    refs_shape = student_refs.shape if with_grad and student_refs is not None else (0,)
    return losses, grad, student.new_empty(refs_shape, dtype=dtype)


def _save_features(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4], inputs[5])
    ctx.options = inputs[6:-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@first_order_only
def _features_backward(ctx: Any, grad_losses: Tensor | None, *_: Any) -> tuple[Any, ...]:
    student, teacher, student_refs, teacher_refs, pair_mask = ctx.saved_tensors
    skipped = (None,) * (len(ctx.options) + 3)  # weights … with_grad
    if grad_losses is None:
        return None, None, None, None, *skipped
    _, grad, grad_refs = torch.ops.pc_kernels.perception_coherence(
        student, teacher, student_refs, teacher_refs, grad_losses, pair_mask, *ctx.options, True
    )
    to_refs = None if student_refs is None else grad_refs.to(student_refs.dtype)
    return grad.to(student.dtype), None, to_refs, None, *skipped


autograd("perception_coherence", _features_backward, _save_features)


@operator
def perception_coherence_layers(
    students: list[Tensor],
    teacher: Tensor,
    weights: Tensor,
    pair_mask: Tensor | None,
    dissimilarity: str,
    teacher_dissimilarity: str,
    relaxation: str,
    temperature: float,
    scale: str | None,
    penalty: str,
    chunk_bytes: int | None,
    backend: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """`run_layers` for metrics that have names: losses [L, A], and all gradients in one vector."""
    for student in students:
        check_features(student, teacher, None, None)
    losses, gradients = run_layers(
        students,
        teacher,
        None,
        None,
        weights,
        pair_mask,
        dissimilarity,
        teacher_dissimilarity,
        CoherenceOptions(relaxation, temperature, scale, penalty),
        None,
        chunk_bytes,
        backend,
        with_grad,
    )
    if not with_grad:
        return losses, losses.new_empty(0)
    return losses, torch.cat([grad.flatten() for grad, _ in gradients])


@fake("perception_coherence_layers")
def _(
    students: list[Tensor], teacher: Tensor, weights: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(*students, teacher)
    losses = teacher.new_empty((len(students), teacher.shape[0]), dtype=dtype)
    size = sum(student.numel() for student in students) if options[-1] else 0
    return losses, teacher.new_empty(size, dtype=dtype)


@operator
def coherence_from_dissimilarities(
    d_s: Tensor,
    d_t: Tensor,
    weights: Tensor,
    pair_mask: Tensor | None,
    exclude_self: bool,
    relaxation: str,
    temperature: float,
    scale: str | None,
    penalty: str,
    chunk_bytes: int | None,
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
        (losses,) = sweep(
            [side],
            GivenSide(d_t.to(dtype), False),
            weights[None].to(dtype).contiguous(),
            options,
            engine,
            chunk=chunk_anchors(engine, d_s.shape[1], dtype.itemsize, budget),
            self_start=0 if exclude_self else None,
            pair_mask=None if pair_mask is None else pair_mask.expand(d_s.shape),
            with_grad=with_grad,
        )
    return losses, side.gradients()[0] if with_grad else losses.new_empty(0)


@fake("coherence_from_dissimilarities")
def _(
    d_s: Tensor, d_t: Tensor, weights: Tensor, pair_mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(d_s, d_t)
    losses = d_s.new_empty(d_s.shape[0], dtype=dtype)
    return losses, d_s.new_empty(d_s.shape if options[-1] else (0,), dtype=dtype)


def _save_matrices(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2], inputs[3])
    ctx.options = inputs[4:-1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@first_order_only
def _matrices_backward(ctx: Any, grad_losses: Tensor | None, _: Any) -> tuple[Any, ...]:
    d_s, d_t, pair_mask = ctx.saved_tensors
    skipped = (None,) * (len(ctx.options) + 4)  # d_t … with_grad
    if grad_losses is None:
        return None, *skipped
    _, grad = torch.ops.pc_kernels.coherence_from_dissimilarities(
        d_s, d_t, grad_losses, pair_mask, *ctx.options, True
    )
    return grad.to(d_s.dtype), *skipped


autograd("coherence_from_dissimilarities", _matrices_backward, _save_matrices)


@operator
def soft_rank(
    x: Tensor, temperature: float, relaxation: str, scale: str | None, backend: str, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Soft ranks of the rows of x [N, m], in its dtype; with_grad, also the density for the backward.

    The density comes in the compute dtype, and is empty if no gradient is wanted.
    """
    dtype = compute_dtype(x)
    options = RankOptions(relaxation, temperature, scale)
    with exact_arithmetic(x.device):
        engine = select(backend, x.device, dtype)
        rank, density = engine.soft_rank(x.to(dtype).contiguous(), options, with_grad)
    return rank.to(x.dtype).contiguous(), density


@fake("soft_rank")
def _(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    rank = torch.empty_like(x, memory_format=torch.contiguous_format)
    return rank, x.new_empty(x.shape if options[-1] else (0,), dtype=compute_dtype(x))


@operator
def soft_rank_backward(
    grad_rank: Tensor,
    x: Tensor,
    density: Tensor,
    temperature: float,
    relaxation: str,
    scale: str | None,
    backend: str,
) -> Tensor:
    """The gradient in x [N, m] of soft ranks with gradient grad_rank [N, m], in the dtype of x."""
    dtype = compute_dtype(x)
    options = RankOptions(relaxation, temperature, scale)
    with exact_arithmetic(x.device):
        grad = select(backend, x.device, dtype).soft_rank_backward(
            grad_rank.to(dtype).contiguous(), x.to(dtype).contiguous(), density, options
        )
    return grad.to(x.dtype).contiguous()


@fake("soft_rank_backward")
def _(grad_rank: Tensor, x: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_points(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.options = inputs[1:-1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@first_order_only
def _rank_backward(ctx: Any, grad_rank: Tensor | None, _: Any) -> tuple[Any, ...]:
    x, density = ctx.saved_tensors
    if grad_rank is None:
        return (None,) * 6
    if density.shape != x.shape:
        raise RuntimeError("pc_kernels::soft_rank was called with_grad=False: it has no backward")
    grad = torch.ops.pc_kernels.soft_rank_backward(grad_rank, x, density, *ctx.options)
    return grad, None, None, None, None, None


autograd("soft_rank", _rank_backward, _save_points)


@operator
def hard_rank(x: Tensor, backend: str) -> Tensor:
    """Mid-ranks of the rows of x [N, m], in the dtype of x."""
    dtype = compute_dtype(x)
    rank = select(backend, x.device, dtype).hard_rank(x.to(dtype).contiguous())
    return rank.to(x.dtype).contiguous()


@fake("hard_rank")
def _(x: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
