"""The loss of several layers at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import one_of
from ..recipe import Recipe
from ..training.pooling import POOLS, pool_features
from .coherence import PerceptionCoherenceLoss
from .function import PerceptionCoherenceFunction, Task
from .ranking import Inputs

Features = Mapping[str, Tensor] | Sequence[Tensor]


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
            None if layer_weights is None else by_name("layer_weights", layer_weights)
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
        students = by_name("student", student)
        if isinstance(teacher, Tensor):
            teachers = dict.fromkeys(students, teacher)
        else:
            teachers = by_name("teacher", teacher)
        if not students:
            raise ValueError("student has no layers")
        same_layers("teacher", teachers, students)
        layer_weights = self.layer_weights
        if layer_weights is None:
            layer_weights = dict.fromkeys(students, 1 / len(students))
        same_layers("layer_weights", layer_weights, students)
        pooled = {
            layer: (
                self._pooled(f"student[{layer!r}]", layer, students[layer]),
                self._pooled(f"teacher[{layer!r}]", layer, teachers[layer]),
            )
            for layer in students
        }
        if isinstance(teacher, Tensor) and self._may_share(teacher, students):
            _, common = pooled[next(iter(students))]
            layers = [Inputs(s, common, None, None, weights, pair_mask) for s, _ in pooled.values()]
            shares = tuple(float(layer_weights[layer]) for layer in students)
            return _shared_teacher_loss(layers, self.loss_fn.recipe, shares)
        losses = [
            layer_weights[layer] * self.loss_fn(*pair, weights=weights, pair_mask=pair_mask)
            for layer, pair in pooled.items()
        ]
        return torch.stack(losses).sum(0)

    def _may_share(self, teacher: Tensor, layers: Mapping[str, Any]) -> bool:
        """Whether one pass can serve all layers: of one process, with one and the same teacher."""
        one_pool = len({self._pool_of(layer) for layer in layers}) == 1
        return self.loss_fn.process_group is None and (teacher.dim() == 2 or one_pool)

    def _pool_of(self, layer: str) -> str | None:
        return self.pool.get(layer) if isinstance(self.pool, Mapping) else self.pool

    def _pooled(self, name: str, layer: str, x: Tensor) -> Tensor:
        return pool_features(x, self._pool_of(layer), name)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"layer_weights={self.layer_weights}, pool={self.pool!r}"


def _shared_teacher_loss(
    layers: Sequence[Inputs], recipe: Recipe, layer_weights: tuple[float, ...]
) -> Tensor:
    """Σ_l λ_l L_l of students [B, D_l] of one teacher [B, Dt], which is ranked once for all of them."""
    for inputs in layers:
        inputs.check(recipe)
    first, *others = layers
    return PerceptionCoherenceFunction.apply(
        first.student,
        first.teacher.detach(),
        None,
        None,
        first.weights,
        first.pair_mask,
        Task(recipe, layer_weights=layer_weights),
        *(inputs.student for inputs in others),
    )


def by_name(argument: str, layers: Any) -> dict[str, Any]:
    """Layers by name; those of a sequence by their numbers."""
    if isinstance(layers, Mapping):
        return dict(layers)
    if isinstance(layers, Sequence) and not isinstance(layers, str):
        return {str(index): layer for index, layer in enumerate(layers)}
    raise TypeError(f"{argument} must be a mapping or a sequence; got {type(layers).__name__}")


def same_layers(argument: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError unless an argument has a student's layers."""
    if given.keys() != wanted.keys():
        raise ValueError(
            f"{argument} must have the layers of student, {list(wanted)}; got {list(given)}"
        )
