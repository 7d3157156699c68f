"""The options of the contrastive loss, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..checks import check_floating, check_positive, one_of, wide_dtype
from ..products import DEPTHS
from ..recipe import check_means


class ContrastiveOptions(TypedDict, total=False):
    """The options of the contrastive loss; their defaults and meaning are `ContrastiveRecipe`'s."""

    temperature: float | Tensor | None
    logit_scale: float | Tensor | None
    bias: float | Tensor | None
    normalize: bool
    symmetric: bool
    form: str
    reduction: str
    chunk_bytes: int | None
    backend: str
    products: str


@dataclass(frozen=True)
class ContrastiveRecipe:
    """What a contrastive loss computes, and how.

    Raises:
        TypeError, ValueError: a field is not what is said here.
    """

    temperature: float | Tensor | None = None
    """τ > 0: logits are q·k/τ. A tensor of one number gets a gradient. None: 0.07, or by logit_scale."""
    logit_scale: float | Tensor | None = None
    """1/τ, instead of temperature."""
    bias: float | Tensor | None = None
    """Added to the logits of the sigmoid form; a tensor of one number gets a gradient."""
    normalize: bool = True
    """Whether features are divided by their norms: logits are cosines then."""
    symmetric: bool = False
    """The mean of both directions, each query among the keys and each key among the queries."""
    form: str = "softmax"
    """"softmax" or "sigmoid"."""
    reduction: str = "mean"
    """"mean" or "sum" over anchors, or "none": one value an anchor."""
    chunk_bytes: int | None = None
    """Working memory of the passes over anchors; None: see `sweep.default_chunk_bytes`."""
    backend: str = "auto"
    """What computes: see `python -m pc_kernels.info`."""
    products: str = "ieee"
    """How inner products of features are taken: a choice of `products.DEPTHS`."""

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("normalize", "symmetric"):
            one_of(name, getattr(self, name), (True, False))
        one_of("form", self.form, ("softmax", "sigmoid"))
        one_of("products", self.products, tuple(DEPTHS))
        check_means(self.reduction, self.chunk_bytes, self.backend)
        if self.temperature is not None and self.logit_scale is not None:
            raise ValueError(
                "temperature and logit_scale are inverse to each other: give one of them"
            )
        for name in ("temperature", "logit_scale"):
            _check_number(name, getattr(self, name), above_zero=True)
        _check_number("bias", self.bias)
        if self.form == "softmax" and self.bias is not None:
            raise ValueError("bias is of form='sigmoid': a softmax does not change by it")
        if self.form == "sigmoid" and self.symmetric:
            raise ValueError("symmetric is of form='softmax': the sigmoid form has both directions")

    def scale(self) -> float | Tensor:
        """What makes logits of inner products; a tensor as wide as can be, without dimensions."""
        given = self.temperature if self.logit_scale is None else self.logit_scale
        given = 0.07 if given is None else given
        if isinstance(given, Tensor):
            given = given.to(wide_dtype(given.device)).reshape(())
        return 1 / given if self.logit_scale is None else given

    def shared(self) -> dict[str, Any]:
        """What the ranks of a group must have alike."""
        named = (name for name in OPTIONS if name not in ("chunk_bytes", "backend"))
        given = {name: getattr(self, name) for name in named}
        return {name: "a tensor" if isinstance(x, Tensor) else x for name, x in given.items()}


OPTIONS = tuple(field.name for field in fields(ContrastiveRecipe))


def _check_number(argument: str, given: object, above_zero: bool = False) -> None:
    """Raises TypeError or ValueError unless `given` is a number, a tensor of one, or None."""
    if given is None:
        return
    if isinstance(given, Tensor):
        check_floating(argument, given)
        if given.numel() != 1:
            raise ValueError(f"{argument} must hold one number; got shape {tuple(given.shape)}")
        if not above_zero or given.device.type != "cpu" or torch.compiler.is_compiling():
            return
        given = float(given.detach())
    if above_zero:
        check_positive(argument, given)
    elif isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"{argument} must be a number or a tensor; got {type(given).__name__}")
    elif not math.isfinite(given):
        raise ValueError(f"{argument} must be finite; got {given}")
