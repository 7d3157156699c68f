"""What a user may choose, checked before any kernel starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Metric = str | Callable[[Tensor, Tensor], Tensor]

METRICS = ("euclidean", "sqeuclidean", "cosine", "cityblock")
RELAXATIONS = ("logistic", "normal")
SCALES = ("std", None)
PENALTIES = ("squared", "absolute", "huber")
REDUCTIONS = ("mean", "sum", "none")


def one_of(argument: str, given: object, allowed: tuple[object, ...]) -> None:
    """Raises ValueError unless `given` is among `allowed`."""
    if not any(
        given is choice or (given == choice and type(given) is type(choice)) for choice in allowed
    ):
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{argument} must be one of {choices}; got {given!r}")


def check_metric(argument: str, metric: object) -> None:
    """Raises unless `metric` is a known name or a callable."""
    if callable(metric):
        return
    if not isinstance(metric, str):
        raise TypeError(f"{argument} must be a name or a callable; got {type(metric).__name__}")
    if metric not in METRICS:
        raise ValueError(
            f"{argument} must be one of {', '.join(map(repr, METRICS))} or a callable; got {metric!r}"
        )


@dataclass(frozen=True)
class RankOptions:
    """How dissimilarities become soft ranks: Φ, and τ = temperature, times σ under scale "std"."""

    relaxation: str = "logistic"
    temperature: float = 0.1
    scale: str | None = "std"

    def __post_init__(self) -> None:
        """Checks every field."""
        one_of("relaxation", self.relaxation, RELAXATIONS)
        one_of("scale", self.scale, SCALES)
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, int | float):
            raise TypeError(f"temperature must be a number; got {type(self.temperature).__name__}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be finite and > 0; got {self.temperature}")


@dataclass(frozen=True)
class CoherenceOptions(RankOptions):
    """Rank options, and the penalty ℓ of a rank residual."""

    penalty: str = "squared"

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        one_of("penalty", self.penalty, PENALTIES)
