"""What ranking losses of features share: from what a user passes to the autograd function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from typing_extensions import Unpack

from ..backends import check_usable
from ..checks import check_features, check_weighting
from ..installation import warn_once
from ..recipe import FEATURE_OPTIONS, Options, Recipe
from ..training.distributed import (
    Group,
    GroupOrWorld,
    SharesGroup,
    gather_batch,
    joint_loss,
    live_group,
    sum_over_ranks,
    together,
)
from .function import PerceptionCoherenceFunction, Task
from .module import RecipeModule
from .weighting import anchor_weights, shares


class Inputs(NamedTuple):
    """The tensors that a user passes to a loss of features; unchecked."""

    student: Tensor
    teacher: Tensor
    student_refs: Tensor | None = None
    teacher_refs: Tensor | None = None
    weights: Tensor | None = None
    pair_mask: Tensor | None = None

    def check(self, recipe: Recipe, references: int | None = None) -> None:
        """Raises TypeError or ValueError unless all is in order; `references` is M if it is not here."""
        check_features(*self[:4])
        anchors = self.student.shape[0]
        if references is None:
            references = anchors if self.student_refs is None else self.student_refs.shape[0]
            own = int(self.student_refs is None)  # torch 2.10 traces no integer minus a bool
            seen = references - own
            if anchors and references and seen < (3 if recipe.scale == "std" else 2):
                warn_once("few", FEW.format(seen=seen, rows=anchors))
        check_weighting(self.weights, self.pair_mask, anchors, references, self.student.device)
        check_usable(recipe.backend, *self[:4])


FEW = (
    "pc_kernels: a batch of {rows} has {seen} references for an anchor, too few to teach anything: a "
    'ranking loss needs 2, with scale="std" 3. If it is the short last batch of an epoch, '
    "drop_last=True leaves it out"
)

MakeRecipe = Callable[[], Recipe]
"""Makes the recipe of what a user said, or raises TypeError or ValueError."""

SHARED_OPTIONS = tuple(name for name in FEATURE_OPTIONS if name not in ("chunk_bytes", "backend"))
"""What the ranks of a group must have alike: what decides on the loss, not how each computes it."""


def ranking_loss(
    inputs: Inputs, recipe_of: MakeRecipe, process_group: GroupOrWorld | None = None
) -> Tensor:
    """The loss that a recipe describes: a scalar, or [A] for reduction "none".

    With a group the recipe is made where the ranks check their arguments together: an option that one of
    them refuses is an error on all.

    Raises:
        TypeError, ValueError: an input is not what `perception_coherence_loss` says, or the backend is
            not usable.
    """
    group = live_group(process_group)
    if group is not None:
        return _joint_loss(inputs, recipe_of, group)
    recipe = recipe_of()
    inputs.check(recipe)
    student, teacher, student_refs, teacher_refs, weights, pair_mask = inputs
    return PerceptionCoherenceFunction.apply(
        student,
        teacher.detach(),
        student_refs,
        None if teacher_refs is None else teacher_refs.detach(),
        weights,
        pair_mask,
        Task(recipe),
    )


def _joint_loss(inputs: Inputs, recipe_of: MakeRecipe, group: Group) -> Tensor:
    """The loss of a batch that several ranks hold: this rank's anchors against all ranks' rows."""
    student, teacher, student_refs, _, weights, pair_mask = inputs

    def check() -> dict[str, Any]:
        recipe = recipe_of()
        if student_refs is not None:
            raise ValueError("process_group gathers the references itself: leave student_refs out")
        # The mask's width is checked where all ranks' rows have been counted.
        shape = pair_mask.shape if isinstance(pair_mask, Tensor) else ()
        inputs.check(recipe, references=shape[-1] if shape else 1)
        shared = {name: getattr(recipe, name) for name in SHARED_OPTIONS}
        return {**shared, "teacher_dissimilarity": recipe.of_teacher}

    joint = gather_batch(student, teacher, pair_mask, check, group)
    recipe = recipe_of()
    weights = anchor_weights(student, weights, pair_mask, joint.start)
    if recipe.reduction == "mean":
        weights = shares(weights, sum_over_ranks(weights.sum(), group))
        recipe = replace(recipe, reduction="sum")
    compute = partial(
        PerceptionCoherenceFunction.apply,
        student,
        teacher.detach(),
        joint.student,
        joint.teacher,
        weights,
        pair_mask,
        Task(recipe, joint.start),
    )
    ours = recipe.has_names and recipe.rule.code is not None  # all of the code that runs
    losses = compute() if ours else together(compute, "a function", student.device, group)
    return joint_loss(losses, recipe.reduction, group)


class RankingLoss(RecipeModule, SharesGroup):
    """A ranking loss of features, as a module: a subclass says in `fixed` which row rule it is.

    Each option is an attribute, which may be set between calls, and is then checked.

    Args, result and errors: see `perception_coherence_loss`, less the options that are fixed.
    """

    def __init__(
        self, *values: Any, process_group: GroupOrWorld | None = None, **options: Unpack[Options]
    ) -> None:
        """Checks the options, so that a mistake shows where it is made."""
        super().__init__(*values, **options)
        self.process_group = process_group

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
        inputs = Inputs(student, teacher, student_refs, teacher_refs, weights, pair_mask)
        return ranking_loss(inputs, lambda: self.recipe, self.process_group)
