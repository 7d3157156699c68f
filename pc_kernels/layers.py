"""The loss of several layers at once, and what makes vectors of feature maps and token sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops  # noqa: F401 - registers the operators
from .backends import check_usable
from .checks import (
    check_features,
    check_floating,
    check_weighting,
    first_order_only,
)
from .losses import PerceptionCoherenceLoss
from .options import one_of
from .weighting import anchor_weights, shares

POOLS = ("mean", "max", "first", "flatten")

Features = Mapping[str, Tensor] | Sequence[Tensor]


def pool_features(x: Tensor, pool: str | None, name: str = "x") -> Tensor:
    """Features [B, width] of vectors, token sequences or feature maps.

    Args:
        x: [B, D], which stays as it is; tokens [B, T, D]; or maps [B, C, H, W] (or of any other number
            of positions after C).
        pool: "mean" or "max" over tokens or positions; "first": the first token, as a class token;
            "flatten": all of them side by side, so that distances compare position with position.
            None: x must be [B, D] already.
        name: what to call x in an error message.

    Raises:
        TypeError, ValueError: an argument is not what is said here; nothing is flattened unasked.
    """
    check_floating(name, x)
    if pool is not None:
        one_of("pool", pool, POOLS)
    shape = tuple(x.shape)
    if x.dim() == 2:
        return x
    if x.dim() < 2:
        raise ValueError(f"{name} must be [B, D], [B, T, D] or [B, C, H, W]; got shape {shape}")
    if pool is None:
        raise ValueError(f"{name} has shape {shape}: say how to pool it, by pool= one of {POOLS}")
    if pool == "flatten":
        return x.flatten(1)
    if pool == "first":
        if x.dim() != 3:
            raise ValueError(f"pool='first' takes tokens [B, T, D]; got {name} of shape {shape}")
        return x[:, 0]
    positions = (1,) if x.dim() == 3 else tuple(range(2, x.dim()))
    if any(shape[d] == 0 for d in positions):
        raise ValueError(f"{name} has nothing to pool: its shape is {shape}")
    return x.mean(positions) if pool == "mean" else x.amax(positions)


class MultiLayerPerceptionCoherenceLoss(nn.Module):
    """Σ_l λ_l L_l: `PerceptionCoherenceLoss` of several layers.

    Example:
        >>> loss_fn = pc_kernels.MultiLayerPerceptionCoherenceLoss({"mid": 0.5, "out": 1.0}, pool="mean")
        >>> loss = loss_fn({"mid": maps, "out": student}, {"mid": teacher_maps, "out": teacher})
    """

    def __init__(
        self,
        layer_weights: Mapping[str, float] | Sequence[float] | None = None,
        *,
        pool: str | Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Takes what each layer weighs.

        Args:
            layer_weights: λ by layer, named or in order as the features will be; by default one over the
                number of layers.
            pool: for features that are not vectors, see `pool_features`; for all layers, or by name.
            options: as for `PerceptionCoherenceLoss`.

        Raises:
            TypeError, ValueError: an argument is not what is said here.
        """
        super().__init__()
        self.loss_fn = PerceptionCoherenceLoss(**options)
        self.layer_weights = (
            None if layer_weights is None else _by_name("layer_weights", layer_weights)
        )
        for choice in pool.values() if isinstance(pool, Mapping) else (pool,):
            if choice is not None:
                one_of("pool", choice, POOLS)
        self.pool = pool

    def forward(
        self,
        student: Features,
        teacher: Features | Tensor,
        *,
        weights: Tensor | None = None,
        pair_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of all layers.

        Args:
            student: features by layer, a mapping or a sequence.
            teacher: the teacher's, by the same names or in the same order; one tensor serves all layers,
                and is ranked once for all of them.
            weights: of anchors; see `perception_coherence_loss`, as for `pair_mask`.
            pair_mask: of pairs.

        Returns:
            A scalar, or [A] for reduction "none".
        """
        students = _by_name("student", student)
        if isinstance(teacher, Tensor):
            teachers = dict.fromkeys(students, teacher)
        else:
            teachers = _by_name("teacher", teacher)
        if not students:
            raise ValueError("student has no layers")
        _same_layers("teacher", teachers, students)
        layer_weights = self.layer_weights
        if layer_weights is None:
            layer_weights = dict.fromkeys(students, 1 / len(students))
        _same_layers("layer_weights", layer_weights, students)
        pooled = {
            layer: (
                self._pooled(f"student[{layer!r}]", layer, students[layer]),
                self._pooled(f"teacher[{layer!r}]", layer, teachers[layer]),
            )
            for layer in students
        }
        if isinstance(teacher, Tensor) and self._may_share():
            together = [student for student, _ in pooled.values()]
            _, common = pooled[next(iter(students))]
            return _shared_teacher_loss(
                together,
                common,
                [layer_weights[layer] for layer in students],
                self.loss_fn,
                weights,
                pair_mask,
            )
        losses = [
            layer_weights[layer] * self.loss_fn(*pair, weights=weights, pair_mask=pair_mask)
            for layer, pair in pooled.items()
        ]
        return torch.stack(losses).sum(0)

    def _may_share(self) -> bool:
        """Whether one pass can serve all layers: of one process, with metrics that have names."""
        metrics = (self.loss_fn.dissimilarity, self.loss_fn.teacher_dissimilarity)
        return self.loss_fn.process_group is None and not any(callable(m) for m in metrics)

    def _pooled(self, name: str, layer: str, x: Tensor) -> Tensor:
        pool = self.pool.get(layer) if isinstance(self.pool, Mapping) else self.pool
        return pool_features(x, pool, name)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"layer_weights={self.layer_weights}, pool={self.pool!r}"


def _shared_teacher_loss(
    students: Sequence[Tensor],
    teacher: Tensor,
    layer_weights: Sequence[float],
    loss_fn: PerceptionCoherenceLoss,
    weights: Tensor | None,
    pair_mask: Tensor | None,
) -> Tensor:
    """Σ_l λ_l L_l of students [B, D_l] of one teacher [B, Dt], in one pass over anchors."""
    for student in students:
        check_features(student, teacher, None, None)
    anchors = teacher.shape[0]
    check_weighting(weights, pair_mask, anchors, anchors, teacher.device)
    check_usable(loss_fn.backend, teacher, *students)
    metric = loss_fn.dissimilarity
    return _SharedTeacherFunction.apply(
        teacher.detach(),
        weights,
        pair_mask,
        torch.tensor(layer_weights),
        loss_fn.reduction,
        (
            metric,
            metric if loss_fn.teacher_dissimilarity is None else loss_fn.teacher_dissimilarity,
            loss_fn.relaxation,
            float(loss_fn.temperature),
            loss_fn.scale,
            loss_fn.penalty,
            loss_fn.chunk_bytes,
            loss_fn.backend,
        ),
        *students,
    )


class _SharedTeacherFunction(torch.autograd.Function):
    """`PerceptionCoherenceFunction` for several students of one teacher."""

    @staticmethod
    def forward(
        ctx: Any,
        teacher: Tensor,
        weights: Tensor | None,
        pair_mask: Tensor | None,
        layer_weights: Tensor,
        reduction: str,
        options: tuple[Any, ...],
        *students: Tensor,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad[6:])
        ctx.at_once = wanted and reduction != "none"
        weighting = anchor_weights((*students, teacher), weights, pair_mask, 0)
        if reduction == "mean":
            weighting = shares(weighting)
        weighting = layer_weights.to(weighting)[:, None] * weighting
        losses, grads = torch.ops.pc_kernels.perception_coherence_layers(
            students, teacher, weighting, pair_mask, *options, ctx.at_once
        )
        ctx.options = options
        ctx.like = [(student.shape, student.dtype) for student in students]
        if ctx.at_once:
            ctx.save_for_backward(grads)
        elif wanted:
            ctx.save_for_backward(teacher, weighting, pair_mask, *students)
        total = (losses * weighting).sum(0)
        return total if reduction == "none" else total.sum()

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        if ctx.at_once:
            grads = ctx.saved_tensors[0] * grad_loss
        else:
            teacher, weighting, pair_mask, *students = ctx.saved_tensors
            _, grads = torch.ops.pc_kernels.perception_coherence_layers(
                students, teacher, weighting * grad_loss, pair_mask, *ctx.options, True
            )
        parts = grads.split([shape.numel() for shape, _ in ctx.like])
        to_students = [
            part.view(shape).to(dtype) for part, (shape, dtype) in zip(parts, ctx.like, strict=True)
        ]
        return *(None,) * 6, *to_students


def _by_name(argument: str, layers: Any) -> dict[str, Any]:
    """Layers by name; those of a sequence by their numbers."""
    if isinstance(layers, Mapping):
        return dict(layers)
    if isinstance(layers, Sequence) and not isinstance(layers, str):
        return {str(index): layer for index, layer in enumerate(layers)}
    raise TypeError(f"{argument} must be a mapping or a sequence; got {type(layers).__name__}")


def _same_layers(argument: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if given.keys() != wanted.keys():
        raise ValueError(
            f"{argument} must have the layers of student, {list(wanted)}; got {list(given)}"
        )
