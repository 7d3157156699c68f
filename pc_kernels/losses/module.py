"""What modules of losses share: options that are fields of a recipe, and a reduction over lists."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..recipe import FEATURE_OPTIONS, make_recipe, signature_with


class RecipeModule(nn.Module):
    """A module whose options are fields of a recipe: attributes, which may be set between calls."""

    allowed: ClassVar[tuple[str, ...]] = FEATURE_OPTIONS
    """The fields of the recipe that mean something here."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Options that define the loss, and that the user therefore cannot choose."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults that are not the recipe's."""
    options: ClassVar[tuple[str, ...]] = FEATURE_OPTIONS
    """The names of the options that the user has."""
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Gives the subclass its options, as attributes and for help()."""
        super().__init_subclass__(**arguments)
        cls.options = tuple(name for name in cls.allowed if name not in cls.fixed)
        cls.__signature__ = cls._shown()
        for name in cls.options:
            setattr(cls, name, _option(name))

    @classmethod
    def _shown(cls) -> inspect.Signature:
        """The parameters of its own, those of the class that it extends, and the options."""
        signature = signature_with(cls.__init__, cls.options, defaults=cls.defaults)
        _, *own = signature.parameters.values()
        names = {*FEATURE_OPTIONS, *(parameter.name for parameter in own)}
        extended = inspect.signature(cls.__bases__[0]).parameters.values()
        more = [p for p in extended if p.kind is p.KEYWORD_ONLY and p.name not in names]
        count = len(own) - len(cls.options)
        return inspect.Signature([*own[:count], *more, *own[count:]])

    def __init__(self, *values: Any, **options: Any) -> None:
        """Checks the options, so that a mistake shows where it is made."""
        super().__init__()
        given = {**dict(zip(self.options, values, strict=False)), **options}
        unsaid = {name: value for name, value in self.defaults.items() if name not in given}
        recipe = make_recipe(type(self).__name__, {**unsaid, **options}, self.options, values)
        self.recipe = replace(recipe, **self.fixed)

    def extra_repr(self) -> str:
        """The options, for printing."""
        shown = (
            name for name in self.options if name not in ("teacher_dissimilarity", "chunk_bytes")
        )
        return ", ".join(f"{name}={getattr(self.recipe, name)!r}" for name in shown)


def _option(name: str) -> property:
    """An attribute that is a field of the recipe."""

    def change(module: RecipeModule, value: Any) -> None:
        module.recipe = replace(module.recipe, **{name: value})

    return property(lambda module: getattr(module.recipe, name), change)


def reduced(losses: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Losses [L] as the recipe's reduction says; 0 where not counted, and left out of the mean.

    A NaN stays one, counted or not.
    """
    losses = torch.where(counted | losses.isnan(), losses, 0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / counted.sum().clamp(min=1)
