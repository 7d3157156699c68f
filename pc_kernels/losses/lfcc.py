"""LFCC: low frequencies of several layers, projected into a compact space and contrasted there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_same_device, one_of
from ..training.distributed import live_group, together
from ..training.low_pass import LowPass
from .contrastive import ContrastiveLoss
from .layers import Features, by_name, same_layers

PROJECTIONS = ("linear", "conv")
Filters = LowPass | Mapping[str, LowPass]


class LFCCLoss(nn.Module):
    """Σ_l λ_l Σ_s w_s L_ls: the contrastive losses of a student's and a teacher's low frequencies.

    For each layer l and scale s, `LowPass` takes the low frequencies of both networks' features, one
    projection a side takes them into a compact space of the same width, and `contrastive_loss` draws the
    two vectors of a sample together and those of different samples apart. Each network may be a CNN, a
    transformer or an MLP, of any width: nothing has to be reshaped.

    After the abstract of LFCC, arXiv 2405.18524; what it leaves open is an option here, see docs/lfcc.md.

    The projections are parameters of this module, the teacher's too: **give them to the optimiser**, and
    synchronise them among processes like the student's (DDP around a module that holds both). Those whose
    widths are not given take them from the first batch (`torch.nn.LazyLinear`). An optimiser may be made
    before it; what needs to know the weights, DDP or counting them, refuses until then.

    Example:
        >>> student = pc_kernels.LayerOutputs(cnn, {"early": "layer2", "late": "layer4"})
        >>> teacher = pc_kernels.LayerOutputs(vit, {"early": "blocks.3", "late": "blocks.11"})
        >>> loss_fn = pc_kernels.LFCCLoss(
        ...     {"early": 0.5, "late": 1.0},
        ...     teacher_filter=pc_kernels.LowPass(grid=(14, 14), class_tokens=1),
        ... )
        >>> optimizer = torch.optim.AdamW([*student.parameters(), *loss_fn.parameters()])
        >>> loss = loss_fn(student(images).layers, teacher_layers)
    """

    def __init__(
        self,
        layer_weights: Mapping[str, float] | Sequence[float],
        *,
        student_filter: Filters | None = None,
        teacher_filter: Filters | None = None,
        scale_weights: Mapping[int, float] | None = None,
        width: int = 128,
        projection: str = "linear",
        channels: Mapping[str, tuple[int, int]] | Sequence[tuple[int, int]] | None = None,
        **contrast: Any,
    ) -> None:
        """Builds the projections.

        Args:
            layer_weights: λ by layer, named or in order as the features will be.
            student_filter: a `LowPass` for all layers of the student, or one for each by name; by default
                `LowPass()`, averages at the scales 1, 2 and 4. It says how the student's tokens lie.
            teacher_filter: the teacher's, of the same kind and scales in each layer; by default
                `LowPass()`.
            scale_weights: w by scale; by default one over a layer's number of scales.
            width: of the compact space: a vector of this length a sample ("linear") or a position
                ("conv").
            projection: "linear": a linear map of all s·s·C numbers; "conv": one of the C numbers at a
                position, the same at all s·s, a 1×1 convolution, so that position meets position.
            channels: (student's C, teacher's C) by layer, if they are known; else the first batch says.
            contrast: options of `contrastive_loss`: temperature, symmetric, process_group and others.

        Raises:
            TypeError, ValueError: an argument is not what is said here.
        """
        super().__init__()
        self.layer_weights = by_name("layer_weights", layer_weights)
        if not self.layer_weights:
            raise ValueError("layer_weights has no layers")
        for layer, weight in self.layer_weights.items():
            if not isinstance(weight, Real):
                raise TypeError(
                    f"layer_weights must be numbers; got {weight!r} for layer {layer!r}"
                )
        one_of("projection", projection, PROJECTIONS)
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"width must be an int ≥ 1; got {width!r}")
        self.contrastive_loss = ContrastiveLoss(**contrast)
        of_student = self._by_layer("student_filter", student_filter)
        of_teacher = self._by_layer("teacher_filter", teacher_filter)
        self.filters = {
            layer: (of_student[layer], of_teacher[layer]) for layer in self.layer_weights
        }
        self.scale_weights = scale_weights
        known = self._channels(channels)
        self.student_projections, self.teacher_projections = nn.ModuleDict(), nn.ModuleDict()
        for layer in self.layer_weights:
            mine, theirs = known[layer]
            for scale in self._scales(layer):
                key, shape = _key(layer, scale), (projection, scale, width)
                self.student_projections[key] = Projection(*shape, mine)
                self.teacher_projections[key] = Projection(*shape, theirs)

    def forward(self, student: Features, teacher: Features, **of_pairs: Tensor) -> Tensor:
        """The loss of all layers and scales: a scalar, or [B] for reduction "none".

        Args:
            student: features by layer, a mapping or a sequence: maps [B, C, H, W], tokens [B, T, C] or
                vectors [B, C].
            teacher: the teacher's, by the same names or in the same order. They get no gradient.
            of_pairs: weights of samples and pair_mask, as for `contrastive_loss`.

        Raises:
            TypeError, ValueError: an argument is not what is said here, or does not fit the filters or
                the projections.
        """
        losses = [
            self._weight(layer, scale) * loss
            for (layer, scale), loss in self.terms(student, teacher, **of_pairs).items()
        ]
        return torch.stack(losses).sum(0)

    def terms(
        self, student: Features, teacher: Features, **of_pairs: Tensor
    ) -> dict[tuple[str, int], Tensor]:
        """L_ls by layer and scale, before any weight; arguments and errors: see `forward`."""
        project = partial(self._project, student, teacher)
        group = live_group(self.contrastive_loss.process_group)
        if group is None:
            pairs = project()
        else:  # what one rank's features do not fit is an error on all
            device = next(self.parameters()).device
            pairs = together(project, "projecting features", device, group)
        return {key: self.contrastive_loss(*pair, **of_pairs) for key, pair in pairs.items()}

    def _project(
        self, student: Features, teacher: Features
    ) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """The student's and the teacher's compact vectors by layer and scale."""
        students, teachers = by_name("student", student), by_name("teacher", teacher)
        same_layers("student", students, self.layer_weights)
        same_layers("teacher", teachers, self.layer_weights)
        pairs = {}
        for layer, (of_student, of_teacher) in self.filters.items():
            names = f"student[{layer!r}]", f"teacher[{layer!r}]"
            mine = of_student(students[layer], names[0])
            with torch.no_grad():
                theirs = of_teacher(teachers[layer], names[1])
            rows = [len(x[layer]) for x in (students, teachers)]
            if rows[0] != rows[1]:
                raise ValueError(
                    f"{' and '.join(names)} must hold the same inputs: got {rows[0]} and {rows[1]} rows"
                )
            for scale in mine:
                key = _key(layer, scale)
                pairs[layer, scale] = (
                    self.student_projections[key](mine[scale], names[0]),
                    self.teacher_projections[key](theirs[scale], names[1]),
                )
        return pairs

    def _by_layer(self, argument: str, given: Filters | None) -> Mapping[str, LowPass]:
        """A filter for each layer."""
        given = LowPass() if given is None else given
        by_layer = given if isinstance(given, Mapping) else dict.fromkeys(self.layer_weights, given)
        same_layers(argument, by_layer, self.layer_weights)
        for layer, low_pass in by_layer.items():
            if not isinstance(low_pass, LowPass):
                came = type(low_pass).__name__
                raise TypeError(f"{argument} must be a LowPass in layer {layer!r}; got {came}")
        return by_layer

    def _channels(self, given: Any) -> Mapping[str, tuple[int | None, int | None]]:
        """The student's and the teacher's channels by layer; None: the first batch says."""
        if given is None:
            return dict.fromkeys(self.layer_weights, (None, None))
        by_layer = by_name("channels", given)
        same_layers("channels", by_layer, self.layer_weights)
        for layer, pair in by_layer.items():
            if (
                not isinstance(pair, Sequence)
                or [type(n) for n in pair] != [int, int]
                or min(pair) < 1
            ):
                raise ValueError(
                    f"channels must be the student's and the teacher's, two ints ≥ 1, in each layer; got "
                    f"{pair!r} for layer {layer!r}"
                )
        return by_layer

    def _scales(self, layer: str) -> tuple[int, ...]:
        """The scales of a layer's filters, which must go together."""
        mine, theirs = self.filters[layer]
        if (mine.kind, mine.scales) != (theirs.kind, theirs.scales):
            raise ValueError(
                "student_filter and teacher_filter must have one kind and the same scales; in layer "
                f"{layer!r} got {mine.kind!r}, {mine.scales} and {theirs.kind!r}, {theirs.scales}"
            )
        missing = [s for s in mine.scales if s not in (self.scale_weights or mine.scales)]
        if missing:
            raise ValueError(f"scale_weights lacks the scales {missing} of layer {layer!r}")
        return mine.scales

    def _weight(self, layer: str, scale: int) -> float:
        """λ_l w_s."""
        scales = self.filters[layer][0].scales
        share = 1 / len(scales) if self.scale_weights is None else self.scale_weights[scale]
        return self.layer_weights[layer] * share

    def extra_repr(self) -> str:
        """The options, for printing."""
        filters = "".join(
            f"\n{name}: {mine}, {theirs}" for name, (mine, theirs) in self.filters.items()
        )
        return f"{self.layer_weights}, scale_weights={self.scale_weights}{filters}"


class Projection(nn.Module):
    """Low frequencies into the space in which two networks are compared."""

    def __init__(self, kind: str, scale: int, width: int, channels: int | None) -> None:
        """Makes the linear map; without `channels`, from the first batch on."""
        super().__init__()
        self.positions = scale * scale if kind == "conv" else 1
        outer = 1 if kind == "conv" else scale * scale
        self.linear = (
            nn.LazyLinear(width) if channels is None else nn.Linear(channels * outer, width)
        )

    def forward(self, low: Tensor, name: str) -> Tensor:
        """[B, C·s·s] -> [B, width], or [B, s·s·width] of "conv"; `name` is for errors."""
        weight = self.linear.weight
        check_same_device(**{name: low, "projection": weight})
        rows = low.to(weight.dtype).unflatten(1, (-1, self.positions)).mT
        known = not isinstance(weight, nn.UninitializedParameter)
        if known and rows.shape[2] != weight.shape[1]:
            raise ValueError(
                f"{name} has {low.shape[1]} low frequencies; its projection was made for "
                f"{weight.shape[1] * self.positions}: the number of channels has changed"
            )
        return self.linear(rows).flatten(1)


def _key(layer: str, scale: int) -> str:
    """The name of a projection; a module's has no dots."""
    return f"{layer.replace('.', '/')} {scale}x{scale}"
