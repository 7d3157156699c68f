"""The loss of several layers at once, and what makes vectors of feature maps and token sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_floating
from .losses import PerceptionCoherenceLoss
from .options import one_of

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
            teacher: the teacher's, by the same names or in the same order; one tensor serves all layers.
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
        shares = self.layer_weights
        if shares is None:
            shares = dict.fromkeys(students, 1 / len(students))
        _same_layers("layer_weights", shares, students)
        losses = [
            shares[layer]
            * self.loss_fn(
                self._pooled(f"student[{layer!r}]", layer, students[layer]),
                self._pooled(f"teacher[{layer!r}]", layer, teachers[layer]),
                weights=weights,
                pair_mask=pair_mask,
            )
            for layer in students
        ]
        return torch.stack(losses).sum(0)

    def _pooled(self, name: str, layer: str, x: Tensor) -> Tensor:
        pool = self.pool.get(layer) if isinstance(self.pool, Mapping) else self.pool
        return pool_features(x, pool, name)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"layer_weights={self.layer_weights}, pool={self.pool!r}"


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
