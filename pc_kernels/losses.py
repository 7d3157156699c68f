"""Perception coherence: features -> dissimilarity -> rank -> loss -> gradient. Read this first.

The path of a call: `PerceptionCoherenceLoss` -> `perception_coherence_loss` (checks) ->
`PerceptionCoherenceFunction` (autograd) -> `torch.ops.pc_kernels.perception_coherence` (dispatcher,
ops.py) -> `sweep` (chunks of anchors, sweep.py) -> a backend's `coherence_rows` (backends/).
The definitions are in reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .backends import BACKENDS, check_usable
from .checks import (
    check_features,
    check_matrix,
    check_same_device,
    check_weighting,
    first_order_only,
)
from .distributed import Group, gather_batch, joint_loss, sum_over_ranks
from .options import REDUCTIONS, CoherenceOptions, Metric, check_metric, one_of
from .weighting import anchor_weights, shares


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
        weights: Tensor | None = None,
        pair_mask: Tensor | None = None,
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
        own = 0 if student_refs is None else self_start
        weighting = anchor_weights((student, teacher), weights, pair_mask, own)
        if reduction == "mean":
            weighting = shares(weighting)
        losses, grad, grad_refs = _run(features, weighting, pair_mask, arguments, at_once)
        ctx.arguments = arguments
        ctx.wanted, ctx.at_once = wanted, at_once
        ctx.dtypes = (student.dtype, None if student_refs is None else student_refs.dtype)
        if at_once:
            ctx.save_for_backward(grad, grad_refs)
        elif wanted:
            ctx.save_for_backward(*features, weighting, pair_mask)
        return losses * weighting if reduction == "none" else (losses * weighting).sum()

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        """Gradients of student and student_refs, in their dtypes."""
        if not ctx.wanted:
            return (None,) * 16
        if ctx.at_once:
            grad, grad_refs = (saved * grad_loss for saved in ctx.saved_tensors)
        else:
            *features, weighting, pair_mask = ctx.saved_tensors
            weighting = weighting * grad_loss
            _, grad, grad_refs = _run(features, weighting, pair_mask, ctx.arguments, True)
        dtype, refs_dtype = ctx.dtypes
        to_refs = None if refs_dtype is None else grad_refs.to(refs_dtype)
        return grad.to(dtype), None, to_refs, *(None,) * 13


def _run(
    features: Sequence[Any],
    weights: Tensor,
    pair_mask: Tensor | None,
    arguments: tuple[Any, ...],
    with_grad: bool,
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
            pair_mask,
            metric,
            teacher_metric,
            CoherenceOptions(relaxation, temperature, scale, penalty),
            self_start,
            chunk_bytes,
            backend,
            with_grad,
        )
    return torch.ops.pc_kernels.perception_coherence(
        *features, weights, pair_mask, *arguments, with_grad
    )


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
    weights: Tensor | None = None,
    pair_mask: Tensor | None = None,
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
        weights: [A], how much each anchor counts: "mean" is Σ w_i L_i / Σ w_i (0 if all weights are 0),
            "sum" Σ w_i L_i, "none" w_i L_i. They get no gradient.
        pair_mask: bool [A, M], or 1 in place of either; True where the pair counts. A masked pair is as
            if that reference were absent: not ranked, not counted (padding, other views of the anchor).
            An anchor left with fewer than 2 references has loss 0 and does not count in the mean.
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
    check_metric("dissimilarity", dissimilarity)
    teacher_dissimilarity = (
        dissimilarity if teacher_dissimilarity is None else teacher_dissimilarity
    )
    check_metric("teacher_dissimilarity", teacher_dissimilarity)
    CoherenceOptions(relaxation, temperature, scale, penalty)
    _check_run(reduction, chunk_bytes, backend)
    options = (
        dissimilarity,
        teacher_dissimilarity,
        relaxation,
        float(temperature),
        scale,
        penalty,
    )
    if process_group is not None:
        return _joint_loss(
            (student, teacher, student_refs, teacher_refs),
            weights,
            pair_mask,
            options,
            reduction,
            chunk_bytes,
            backend,
            process_group,
        )
    check_features(student, teacher, student_refs, teacher_refs)
    references = (student if student_refs is None else student_refs).shape[0]
    check_weighting(weights, pair_mask, student.shape[0], references, student.device)
    check_usable(backend, student, teacher)
    return PerceptionCoherenceFunction.apply(
        student,
        teacher.detach(),
        student_refs,
        None if teacher_refs is None else teacher_refs.detach(),
        weights,
        pair_mask,
        *options,
        reduction,
        None,
        chunk_bytes,
        backend,
    )


def _joint_loss(
    features: tuple[Any, ...],
    weights: Tensor | None,
    pair_mask: Tensor | None,
    options: tuple[Any, ...],
    reduction: str,
    chunk_bytes: int | None,
    backend: str,
    group: Group,
) -> Tensor:
    """The loss of a batch that several ranks hold: this rank's anchors against all ranks' rows."""
    student, teacher, student_refs, _ = features

    def check() -> None:
        if student_refs is not None:
            raise ValueError("process_group gathers the references itself: leave student_refs out")
        check_features(*features)
        columns = pair_mask.shape[-1] if isinstance(pair_mask, Tensor) and pair_mask.dim() else 1
        check_weighting(weights, pair_mask, student.shape[0], columns, student.device)
        check_usable(backend, student, teacher)

    joint = gather_batch(student, teacher, pair_mask, check, group)
    weighting = anchor_weights((student, teacher), weights, pair_mask, joint.start)
    if reduction == "mean":
        weighting = shares(weighting, sum_over_ranks(weighting.sum(), group))
    losses = PerceptionCoherenceFunction.apply(
        student,
        teacher.detach(),
        joint.student,
        joint.teacher,
        weighting,
        pair_mask,
        *options,
        "none" if reduction == "none" else "sum",
        joint.start,
        chunk_bytes,
        backend,
    )
    return joint_loss(losses, reduction, group)


def coherence_loss_from_dissimilarities(
    d_s: Tensor,
    d_t: Tensor,
    *,
    weights: Tensor | None = None,
    pair_mask: Tensor | None = None,
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
        weights: [A]; see `perception_coherence_loss`, as for `pair_mask`.
        pair_mask: bool [A, M], or 1 in place of either; True where the pair counts.
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
    check_weighting(weights, pair_mask, d_s.shape[0], d_s.shape[1], d_s.device)
    CoherenceOptions(relaxation, temperature, scale, penalty)
    _check_run(reduction, chunk_bytes, backend)
    check_usable(backend, d_s, d_t)
    return _MatrixFunction.apply(
        d_s,
        d_t.detach(),
        weights,
        pair_mask,
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
    def forward(
        ctx: Any,
        d_s: Tensor,
        d_t: Tensor,
        weights: Tensor | None,
        pair_mask: Tensor | None,
        reduction: str,
        exclude_self: bool,
        *options: Any,
    ) -> Tensor:
        ctx.at_once = ctx.needs_input_grad[0] and reduction != "none"
        weighting = anchor_weights((d_s, d_t), weights, pair_mask, 0 if exclude_self else None)
        if reduction == "mean":
            weighting = shares(weighting)
        losses, grad = torch.ops.pc_kernels.coherence_from_dissimilarities(
            d_s, d_t, weighting, pair_mask, exclude_self, *options, ctx.at_once
        )
        ctx.options, ctx.dtype = (exclude_self, *options), d_s.dtype
        if ctx.at_once:
            ctx.save_for_backward(grad)
        elif ctx.needs_input_grad[0]:
            ctx.save_for_backward(d_s, d_t, weighting, pair_mask)
        return losses * weighting if reduction == "none" else (losses * weighting).sum()

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        if ctx.at_once:
            grad = ctx.saved_tensors[0] * grad_loss
        else:
            d_s, d_t, weighting, pair_mask = ctx.saved_tensors
            _, grad = torch.ops.pc_kernels.coherence_from_dissimilarities(
                d_s, d_t, weighting * grad_loss, pair_mask, *ctx.options, True
            )
        return grad.to(ctx.dtype), *(None,) * (len(ctx.options) + 4)


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
        *,
        weights: Tensor | None = None,
        pair_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of features [A, Ds] and [A, Dt], against references [M, Ds] and [M, Dt] if given."""
        return perception_coherence_loss(
            student,
            teacher,
            student_refs,
            teacher_refs,
            weights=weights,
            pair_mask=pair_mask,
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
