"""Perception coherence: features -> dissimilarity -> rank -> loss -> gradient. Read this first.

The path of a call: `PerceptionCoherenceLoss` -> `perception_coherence_loss` (checks) ->
`PerceptionCoherenceFunction` (autograd) -> `torch.ops.pc_kernels.perception_coherence` (dispatcher,
ops.py) -> `sweep` (chunks of anchors, sweep.py) -> a backend's `coherence_rows` (backends.py).
The definitions are in reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .backends import BACKENDS, select
from .checks import (
    check_features,
    check_matrix,
    check_same_device,
    compute_dtype,
    first_order_only,
)
from .distributed import Group, gather_features, joint_loss
from .options import REDUCTIONS, CoherenceOptions, Metric, check_metric, one_of


class PerceptionCoherenceFunction(torch.autograd.Function):
    """The loss with its custom backward.

    The forward computes the gradients beside the loss, in one pass, and the backward scales them by
    the incoming gradient. For reduction "none" the incoming gradient weights the anchors, so the
    backward runs a second pass with these weights. The teacher gets no gradient: ranks are steps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        student_refs: Tensor | None = None,
        teacher_refs: Tensor | None = None,
        dissimilarity: Metric = "euclidean",
        teacher_dissimilarity: Metric = "euclidean",
        relaxation: str = "logistic",
        temperature: float = 0.1,
        scale: str | None = "std",
        penalty: str = "squared",
        reduction: str = "mean",
        self_start: int | None = None,
        chunk_bytes: int | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """The loss: a scalar, or [A] for reduction "none", in float32 (float64 if an input is)."""
        anchors = student.shape[0]
        features = (student, teacher, student_refs, teacher_refs)
        arguments = (
            dissimilarity,
            teacher_dissimilarity,
            relaxation,
            temperature,
            scale,
            penalty,
            self_start,
            chunk_bytes,
            backend,
        )
        wanted = any(ctx.needs_input_grad[0:3:2])  # student, student_refs
        at_once = wanted and reduction != "none"
        weight = 1.0 / max(anchors, 1) if reduction == "mean" else 1.0
        weights = student.new_full((anchors,), weight, dtype=compute_dtype(student, teacher))
        losses, grad, grad_refs = _run(features, weights, arguments, at_once)
        ctx.arguments = arguments
        ctx.wanted, ctx.at_once = wanted, at_once
        ctx.dtypes = (student.dtype, None if student_refs is None else student_refs.dtype)
        if at_once:
            ctx.save_for_backward(grad, grad_refs)
        elif wanted:
            ctx.save_for_backward(student, teacher, student_refs, teacher_refs)
        return losses if reduction == "none" else (losses * weights).sum()

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        """Gradients of student and student_refs, in their dtypes."""
        if not ctx.wanted:
            return (None,) * 14
        if ctx.at_once:
            grad, grad_refs = (saved * grad_loss for saved in ctx.saved_tensors)
        else:
            _, grad, grad_refs = _run(ctx.saved_tensors, grad_loss, ctx.arguments, True)
        dtype, refs_dtype = ctx.dtypes
        to_refs = None if refs_dtype is None else grad_refs.to(refs_dtype)
        return grad.to(dtype), None, to_refs, *(None,) * 11


def _run(
    features: tuple[Any, ...], weights: Tensor, arguments: tuple[Any, ...], with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the dispatcher where the metrics have names, straight to the sweep for callables."""
    metric, teacher_metric, relaxation, temperature, scale, penalty, *rest = arguments
    if callable(metric) or callable(teacher_metric):
        student, teacher, student_refs, teacher_refs = features
        self_start, chunk_bytes, backend = rest
        return ops.run_features(
            student,
            teacher,
            student_refs,
            teacher_refs,
            weights,
            metric,
            teacher_metric,
            CoherenceOptions(relaxation, temperature, scale, penalty),
            self_start,
            chunk_bytes,
            backend,
            with_grad,
        )
    return torch.ops.pc_kernels.perception_coherence(*features, weights, *arguments, with_grad)


def _check_run(reduction: str, chunk_bytes: int | None, backend: str) -> None:
    one_of("reduction", reduction, REDUCTIONS)
    if chunk_bytes is not None:
        if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int):
            raise TypeError(f"chunk_bytes must be an int or None; got {type(chunk_bytes).__name__}")
        if chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes must be > 0; got {chunk_bytes}")
    one_of("backend", backend, ("auto", *BACKENDS))


def perception_coherence_loss(
    student: Tensor,
    teacher: Tensor,
    student_refs: Tensor | None = None,
    teacher_refs: Tensor | None = None,
    *,
    dissimilarity: Metric = "euclidean",
    teacher_dissimilarity: Metric | None = None,
    relaxation: str = "logistic",
    temperature: float = 0.1,
    scale: str | None = "std",
    penalty: str = "squared",
    reduction: str = "mean",
    chunk_bytes: int | None = None,
    process_group: Group | None = None,
    backend: str = "auto",
) -> Tensor:
    """How differently student and teacher rank the references around each anchor.

    Every row is an anchor. Its references are the other rows, or the rows of `student_refs` and
    `teacher_refs` where these are given. L_i = mean_j ℓ(r_S(i, j) − r_T(i, j)), with the teacher's
    hard ranks and the student's soft ranks, both in [0, 1]; see `pc_kernels.reference`. After
    perception coherence, arXiv 2505.06595.

    Args:
        student: features [A, Ds]; float32, float64, bfloat16 or float16 (computed in float32, or in
            float64 if any input is).
        teacher: features [A, Dt] of the same inputs. They get no gradient.
        student_refs: reference features [M, Ds], say a memory bank; they get gradients if they
            require them.
        teacher_refs: [M, Dt], of the same inputs as student_refs.
        dissimilarity: "euclidean", "sqeuclidean", "cosine", "cityblock", or a function of anchors
            [C, Ds] and references [M, Ds] to [C, M]. Gradients reach the features that a function
            is given, not parameters inside it.
        teacher_dissimilarity: the teacher's, if another.
        relaxation: the CDF Φ in the soft rank: "logistic" or "normal".
        temperature: τ, in units of σ_i or of the dissimilarity itself: see scale. > 0.
        scale: "std": τ_i = temperature · σ_i, the standard deviation of the anchor's dissimilarities;
            the loss then does not change when the student's features are scaled. None: τ = temperature.
        penalty: ℓ: "squared", "absolute", or "huber" (turning at a residual of 0.1).
        reduction: "mean" or "sum" over anchors, or "none": one value an anchor.
        chunk_bytes: working memory of the pass over anchors; default 256 MiB, or more on a GPU that
            has it free.
        process_group: a torch.distributed group whose ranks hold parts of one joint batch; see
            `pc_kernels.distributed`.
        backend: "auto", "cpu", "torch" or "reference"; see `python -m pc_kernels.info`.

    Returns:
        A scalar, or [A] for reduction "none". Fewer than two references rank nothing: 0. A NaN or an
        infinity in the features of a row, or of a reference of it, makes its loss NaN.

    Raises:
        TypeError, ValueError: an argument is not what is said here, or the backend is not usable.
    """
    check_features(student, teacher, student_refs, teacher_refs)
    check_metric("dissimilarity", dissimilarity)
    teacher_dissimilarity = (
        dissimilarity if teacher_dissimilarity is None else teacher_dissimilarity
    )
    check_metric("teacher_dissimilarity", teacher_dissimilarity)
    CoherenceOptions(relaxation, temperature, scale, penalty)
    _check_run(reduction, chunk_bytes, backend)
    if backend != "auto":
        select(backend, student.device, compute_dtype(student, teacher))
    teacher = teacher.detach()
    teacher_refs = None if teacher_refs is None else teacher_refs.detach()
    run_options = (
        dissimilarity,
        teacher_dissimilarity,
        relaxation,
        float(temperature),
        scale,
        penalty,
    )
    if process_group is None:
        return PerceptionCoherenceFunction.apply(
            student,
            teacher,
            student_refs,
            teacher_refs,
            *run_options,
            reduction,
            None,
            chunk_bytes,
            backend,
        )
    if student_refs is not None:
        raise ValueError("process_group gathers the references itself: leave student_refs out")
    joint_student, joint_teacher, start, sizes = gather_features(student, teacher, process_group)
    local = "none" if reduction == "none" else "sum"
    losses = PerceptionCoherenceFunction.apply(
        student,
        teacher,
        joint_student,
        joint_teacher,
        *run_options,
        local,
        start,
        chunk_bytes,
        backend,
    )
    return joint_loss(losses, reduction, sizes, process_group)


def coherence_loss_from_dissimilarities(
    d_s: Tensor,
    d_t: Tensor,
    *,
    exclude_self: bool = False,
    relaxation: str = "logistic",
    temperature: float = 0.1,
    scale: str | None = "std",
    penalty: str = "squared",
    reduction: str = "mean",
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The loss of dissimilarities that the caller has, of any metric, learned ones too.

    Args:
        d_s: the student's [A, M], a row for each anchor; gradients flow into it.
        d_t: the teacher's [A, M]; it gets no gradient.
        exclude_self: the matrices are [B, B] over one batch, and the diagonal is left out.
        relaxation: see `perception_coherence_loss`, as for the rest.
        temperature: τ, > 0.
        scale: "std" or None.
        penalty: "squared", "absolute" or "huber".
        reduction: "mean", "sum" or "none".
        chunk_bytes: working memory of the pass over anchors.
        backend: see `python -m pc_kernels.info`.

    Returns:
        A scalar, or [A] for reduction "none".

    Raises:
        TypeError, ValueError: an argument is not what is said here, or the backend is not usable.
    """
    check_matrix("d_s", d_s, "[anchors, references]")
    check_matrix("d_t", d_t, "[anchors, references]")
    if d_s.shape != d_t.shape:
        raise ValueError(
            f"d_s and d_t must have the same shape; got {tuple(d_s.shape)} and {tuple(d_t.shape)}"
        )
    if exclude_self and d_s.shape[0] != d_s.shape[1]:
        raise ValueError(f"exclude_self needs square matrices; got shape {tuple(d_s.shape)}")
    check_same_device(d_s=d_s, d_t=d_t)
    CoherenceOptions(relaxation, temperature, scale, penalty)
    _check_run(reduction, chunk_bytes, backend)
    if backend != "auto":
        select(backend, d_s.device, compute_dtype(d_s, d_t))
    return _MatrixFunction.apply(
        d_s,
        d_t.detach(),
        reduction,
        bool(exclude_self),
        relaxation,
        float(temperature),
        scale,
        penalty,
        chunk_bytes,
        backend,
    )


class _MatrixFunction(torch.autograd.Function):
    """`PerceptionCoherenceFunction` for matrices."""

    @staticmethod
    def forward(ctx: Any, d_s: Tensor, d_t: Tensor, reduction: str, *arguments: Any) -> Tensor:
        anchors = d_s.shape[0]
        ctx.at_once = ctx.needs_input_grad[0] and reduction != "none"
        weight = 1.0 / max(anchors, 1) if reduction == "mean" else 1.0
        weights = d_s.new_full((anchors,), weight, dtype=compute_dtype(d_s, d_t))
        losses, grad = torch.ops.pc_kernels.coherence_from_dissimilarities(
            d_s, d_t, weights, *arguments, ctx.at_once
        )
        ctx.arguments, ctx.dtype = arguments, d_s.dtype
        if ctx.at_once:
            ctx.save_for_backward(grad)
        elif ctx.needs_input_grad[0]:
            ctx.save_for_backward(d_s, d_t)
        return losses if reduction == "none" else (losses * weights).sum()

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        if ctx.at_once:
            grad = ctx.saved_tensors[0] * grad_loss
        else:
            _, grad = torch.ops.pc_kernels.coherence_from_dissimilarities(
                *ctx.saved_tensors, grad_loss, *ctx.arguments, True
            )
        return grad.to(ctx.dtype), *(None,) * (len(ctx.arguments) + 2)


class PerceptionCoherenceLoss(nn.Module):
    """`perception_coherence_loss` as a module.

    Example:
        >>> loss_fn = pc_kernels.PerceptionCoherenceLoss()
        >>> loss = loss_fn(student, teacher)    # [B, Ds], [B, Dt] -> scalar
        >>> loss.backward()

    Args, result and errors: see `perception_coherence_loss`.
    """

    def __init__(
        self,
        dissimilarity: Metric = "euclidean",
        teacher_dissimilarity: Metric | None = None,
        relaxation: str = "logistic",
        temperature: float = 0.1,
        scale: str | None = "std",
        penalty: str = "squared",
        reduction: str = "mean",
        chunk_bytes: int | None = None,
        process_group: Group | None = None,
        backend: str = "auto",
    ) -> None:
        """Checks the options, so that a mistake shows where it is made."""
        super().__init__()
        check_metric("dissimilarity", dissimilarity)
        if teacher_dissimilarity is not None:
            check_metric("teacher_dissimilarity", teacher_dissimilarity)
        CoherenceOptions(relaxation, temperature, scale, penalty)
        _check_run(reduction, chunk_bytes, backend)
        self.dissimilarity = dissimilarity
        self.teacher_dissimilarity = teacher_dissimilarity
        self.relaxation = relaxation
        self.temperature = temperature
        self.scale = scale
        self.penalty = penalty
        self.reduction = reduction
        self.chunk_bytes = chunk_bytes
        self.process_group = process_group
        self.backend = backend

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_refs: Tensor | None = None,
        teacher_refs: Tensor | None = None,
    ) -> Tensor:
        """The loss of features [A, Ds] and [A, Dt], against references [M, Ds] and [M, Dt] if given."""
        return perception_coherence_loss(
            student,
            teacher,
            student_refs,
            teacher_refs,
            dissimilarity=self.dissimilarity,
            teacher_dissimilarity=self.teacher_dissimilarity,
            relaxation=self.relaxation,
            temperature=self.temperature,
            scale=self.scale,
            penalty=self.penalty,
            reduction=self.reduction,
            chunk_bytes=self.chunk_bytes,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        names = (
            "dissimilarity",
            "relaxation",
            "temperature",
            "scale",
            "penalty",
            "reduction",
            "backend",
        )
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
