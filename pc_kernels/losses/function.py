"""The custom backward of every loss, as a `torch.autograd.Function`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import compute_dtype, first_order_only
from ..ops import run
from ..recipe import Recipe
from ..sweep import Batch
from .weighting import anchor_weights, shares


class Given(NamedTuple):
    """The tensors that a loss is of, beside the weights; gradients go to students and student_refs."""

    students: list[Tensor]
    teacher: Tensor | None
    student_refs: Tensor | None
    teacher_refs: Tensor | None
    pair_mask: Tensor | None


@dataclass(frozen=True)
class Task:
    """What a `LossFunction` does, beside the tensors: here, perception coherence."""

    recipe: Recipe = field(default_factory=Recipe)
    self_start: int | None = None
    """Anchor i is reference self_start + i, and left out; None: it is none of them. Where the anchors
    are the references themselves, it is 0 whatever is said here."""
    given: bool = False
    """Whether student and teacher are dissimilarities, not features."""
    layer_weights: tuple[float, ...] = (1.0,)
    """λ_l, one for each student."""

    def place(self, references: Tensor | None) -> int | None:
        """Where the anchors are among the references, given these."""
        return 0 if references is None and not self.given else self.self_start

    def weigh(self, given: Given, weights: Tensor | None) -> Tensor:
        """What each anchor weighs [A], before the mean; in float64 where the device has it."""
        own = self.place(given.teacher_refs)
        return anchor_weights(given.students[0], weights, given.pair_mask, own)

    def run(self, given: Given, weights: Tensor, with_grad: bool) -> tuple[Tensor, list[Tensor]]:
        """Losses [L, A], and with_grad the gradients of Σ weights [L, A] times losses; see `sweep`."""
        students, teacher, student_refs, teacher_refs, pair_mask = given
        assert teacher is not None
        own = self.place(teacher_refs)
        batch = Batch(
            students, teacher, student_refs, teacher_refs, weights, pair_mask, own, self.given
        )
        return run(batch, self.recipe, with_grad)


class LossFunction(torch.autograd.Function):
    """Σ_l λ_l L_l of students l of one teacher; a single student is a list of one.

    The forward computes the gradients beside the loss, in one pass, and the backward scales them by
    the incoming gradient. For reduction "none" the incoming gradient weights the anchors, so the
    backward runs a second pass with these weights. The teacher gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        student_refs: Tensor | None = None,
        teacher_refs: Tensor | None = None,
        weights: Tensor | None = None,
        pair_mask: Tensor | None = None,
        *rest: Any,
    ) -> Tensor:
        """The loss: a scalar, or [A] for reduction "none", in float32 (float64 if an input is).

        Args:
            ctx: PyTorch's.
            student: features [A, Ds], or dissimilarities [A, M] if the task says so.
            teacher: [A, Dt] or [A, M].
            student_refs: [M, Ds] or None.
            teacher_refs: [M, Dt] or None.
            weights: of anchors, [A] or None.
            pair_mask: bool, broadcast to [A, M], or None.
            rest: the `Task`, by default `Task()`, and the students after the first.
        """
        task, *others = rest or (Task(),)
        students = [student, *others]
        given = Given(students, teacher, student_refs, teacher_refs, pair_mask)
        weights = _factors(task, given, weights)
        wanted = any(ctx.needs_input_grad)
        at_once = wanted and task.recipe.reduction != "none"
        losses, gradients = task.run(given, weights, at_once)
        ctx.task, ctx.at_once, ctx.with_refs = task, at_once, student_refs is not None
        ctx.inputs = len(ctx.needs_input_grad)
        ctx.dtypes = [x.dtype for x in (*students, student_refs) if x is not None]
        if at_once:
            ctx.save_for_backward(*gradients)
        elif wanted:
            saved = (weights, teacher, student_refs, teacher_refs, pair_mask, *students)
            ctx.save_for_backward(*map(_savable, saved))
        weighed = losses * weights
        total = weighed.sum(0) if len(students) > 1 else weighed[0]
        return total if task.recipe.reduction == "none" else total.sum()

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the students and of student_refs, in their dtypes."""
        if ctx.at_once:
            gradients = [saved * grad_loss for saved in ctx.saved_tensors]
        else:
            weights, teacher, student_refs, teacher_refs, pair_mask, *students = ctx.saved_tensors
            given = Given(students, teacher, student_refs, teacher_refs, pair_mask)
            _, gradients = ctx.task.run(given, weights * grad_loss, True)
        gradients = [g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        to_refs = gradients.pop() if ctx.with_refs else None
        first, *others = gradients
        return (first, None, to_refs, None, None, None, None, *others)[: ctx.inputs]


def _factors(task: Any, given: Given, weights: Tensor | None) -> Tensor:
    """What the loss of each student's anchor is multiplied by [L, A], in the compute dtype."""
    student, mean = given.students[0], task.recipe.reduction == "mean"
    anchors, alike = len(student), weights is None and given.pair_mask is None
    dtype = compute_dtype(*given.students, given.teacher, given.student_refs, given.teacher_refs)
    if alike and task.layer_weights == (1.0,):  # one launch on a GPU, where the rest takes ten
        return student.new_full((1, anchors), 1 / anchors if mean and anchors else 1.0, dtype=dtype)
    factors = task.weigh(given, weights)
    if mean:
        factors = shares(factors)
    if task.layer_weights != (1.0,):
        factors = factors.new_tensor(task.layer_weights)[:, None] * factors
    return factors.to(dtype).expand(len(given.students), -1)


def _savable(x: Tensor | None) -> Tensor | None:
    """What autograd may save: not a tensor of inference mode, as a teacher's may be."""
    if x is None or torch.compiler.is_compiling() or not x.is_inference():
        return x
    return x.clone()


class PerceptionCoherenceFunction(LossFunction):
    """The perception coherence of students and a teacher, whose ranks are steps without a gradient.

    Example:
        >>> loss = PerceptionCoherenceFunction.apply(student, teacher)
        >>> task = Task(Recipe(temperature=0.2))
        >>> loss = PerceptionCoherenceFunction.apply(student, teacher, None, None, None, None, task)
    """
