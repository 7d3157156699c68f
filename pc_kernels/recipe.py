"""The recipe: what a loss computes and how, in one object that travels from the user to the backend.

It is built once, where the user speaks, and checks every choice there. Only the operators (ops.py) take
it apart, for their schemas.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict, TypeVar

from .checks import check_positive, one_of
from .dissimilarities import Dissimilarity, check_dissimilarity
from .formulas import PROJECTIONS, RELAXATIONS, Projection, Relaxation
from .products import DEPTHS
from .rules import RowRule, rule_called, rule_names

SCALES = ("std", None)
REDUCTIONS = ("mean", "sum", "none")


class MatrixOptions(TypedDict, total=False):
    """The options of a loss of dissimilarities; their defaults and meaning are `Recipe`'s."""

    relaxation: str
    temperature: float
    scale: str | None
    penalty: str
    reduction: str
    chunk_bytes: int | None
    backend: str


SCORE_OPTIONS = ("relaxation", "temperature", "reduction", "backend")
"""The options of a loss of scores."""


class Options(MatrixOptions, total=False):
    """The options of a loss of features; their defaults and meaning are `Recipe`'s."""

    dissimilarity: Dissimilarity
    teacher_dissimilarity: Dissimilarity | None
    products: str


@dataclass(frozen=True)
class Recipe:
    """What to compute, and how.

    Raises:
        TypeError, ValueError: a field is not what is said here.
    """

    dissimilarity: Dissimilarity = "euclidean"
    """δ of the student: one of `dissimilarities.DISSIMILARITIES`, or a function."""
    teacher_dissimilarity: Dissimilarity | None = None
    """δ of the teacher; None: the student's."""
    relaxation: str = "logistic"
    """The CDF Φ in the soft rank: a row of `formulas.RELAXATIONS`; or one of `formulas.PROJECTIONS`."""
    temperature: float = 0.1
    """τ, in units of σ_i or of the dissimilarity itself: see scale. > 0."""
    scale: str | None = "std"
    """"std": τ_i = temperature · σ_i, the standard deviation of the anchor's dissimilarities; None: τ."""
    penalty: str = "squared"
    """ℓ of a rank residual, a row of `formulas.PENALTIES`; or another row rule (rules.py)."""
    reduction: str = "mean"
    """"mean" or "sum" over anchors, or "none": one value an anchor."""
    chunk_bytes: int | None = None
    """Working memory of the pass over anchors; None: see `sweep.default_chunk_bytes`."""
    backend: str = "auto"
    """What computes: see `python -m pc_kernels.info`."""
    products: str = "ieee"
    """How inner products of features are taken: a choice of `products.DEPTHS`."""

    def __post_init__(self) -> None:
        """Checks every field."""
        check_dissimilarity("dissimilarity", self.dissimilarity)
        if self.teacher_dissimilarity is not None:
            check_dissimilarity("teacher_dissimilarity", self.teacher_dissimilarity)
        one_of("relaxation", self.relaxation, (*RELAXATIONS, *PROJECTIONS))
        one_of("scale", self.scale, SCALES)
        one_of("penalty", self.penalty, rule_names())
        one_of("products", self.products, tuple(DEPTHS))
        object.__setattr__(self, "temperature", check_positive("temperature", self.temperature))
        check_means(self.reduction, self.chunk_bytes, self.backend)

    @property
    def of_teacher(self) -> Dissimilarity:
        """The teacher's dissimilarity."""
        given = self.teacher_dissimilarity
        return self.dissimilarity if given is None else given

    @property
    def ranked_by(self) -> Dissimilarity:
        """What a teacher's features are ranked by.

        Squares rank as distances do, and no root rounds to a tie.
        """
        return "sqeuclidean" if self.of_teacher == "euclidean" else self.of_teacher

    @property
    def formula(self) -> Relaxation | Projection:
        """The relaxation's row in its table."""
        return RELAXATIONS.get(self.relaxation) or PROJECTIONS[self.relaxation]

    @property
    def smooth_step(self) -> Relaxation:
        """The formulas of a relaxation with a Φ.

        Raises:
            ValueError: it is a projection.
        """
        if self.relaxation in PROJECTIONS:
            choices = ", ".join(map(repr, RELAXATIONS))
            raise ValueError(
                f"relaxation must be one with a CDF here, {choices}; got {self.relaxation!r}"
            )
        return RELAXATIONS[self.relaxation]

    @property
    def rule(self) -> RowRule:
        """What the loss makes of a row's ranks."""
        return rule_called(self.penalty)

    @property
    def has_names(self) -> bool:
        """Whether everything in it has a name, so that an operator's schema can say it."""
        return isinstance(self.dissimilarity, str) and isinstance(self.of_teacher, str)


def check_means(reduction: str, chunk_bytes: int | None, backend: str) -> None:
    """Checks what every loss has: how anchors are summed up, in what memory, by what."""
    one_of("reduction", reduction, REDUCTIONS)
    if chunk_bytes is not None:
        if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int):
            came = type(chunk_bytes).__name__
            raise TypeError(f"chunk_bytes must be an int or None; got {came}")
        if chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes must be > 0; got {chunk_bytes}")
    from .backends import BACKENDS  # which need the reference, which needs recipes

    one_of("backend", backend, ("auto", *BACKENDS))


FEATURE_OPTIONS = tuple(field.name for field in fields(Recipe))
MATRIX_OPTIONS = tuple(name for name in FEATURE_OPTIONS if name in MatrixOptions.__annotations__)


def make_recipe(
    caller: str,
    options: Mapping[str, Any],
    allowed: Sequence[str] = FEATURE_OPTIONS,
    values: Sequence[Any] = (),
) -> Recipe:
    """The recipe of the options that a user passed; see `named_options`."""
    return Recipe(**named_options(caller, options, allowed, values))


def named_options(
    caller: str, options: Mapping[str, Any], allowed: Sequence[str], values: Sequence[Any] = ()
) -> dict[str, Any]:
    """The options that a user passed to the function `caller`, by name.

    Args:
        caller: its name, for errors.
        options: what was passed by keyword.
        allowed: the options that it has, in order.
        values: what was passed by position.

    Raises:
        TypeError: an option is not among the allowed ones, or is there twice.
    """
    if len(values) > len(allowed):
        raise TypeError(f"{caller}() takes {len(allowed)} options; got {len(values)} by position")
    positional = dict(zip(allowed, values, strict=False))
    for name in options:
        if name in positional:
            raise TypeError(f"{caller}() got {name!r} by position and by keyword")
        if name not in allowed:
            raise TypeError(f"{caller}() has no option {name!r}; it has {', '.join(allowed)}")
    return {**positional, **options}


def signature_with(
    function: Callable[..., Any],
    allowed: Sequence[str],
    of: type = Recipe,
    defaults: Mapping[str, Any] | None = None,
) -> inspect.Signature:
    """The signature of a function that takes `**options`, with each of these and its default.

    Args:
        function: what takes them.
        allowed: their names.
        of: the dataclass that they are fields of.
        defaults: those that are not its own.
    """
    defaults = defaults or {}
    shown = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(f.name, f.default),
            annotation=f.type,
        )
        for f in fields(of)
        if f.name in allowed
    ]
    signature = inspect.signature(function)
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    own = [p for p in signature.parameters.values() if p.kind not in variable]
    return signature.replace(parameters=[*own, *shown])


F = TypeVar("F", bound=Callable[..., Any])


def shows_options(allowed: Sequence[str], of: type = Recipe) -> Callable[[F], F]:
    """Decorates a function that takes `**options`: help() then shows each with its default."""

    def decorate(function: F) -> F:
        function.__signature__ = signature_with(function, allowed, of)  # type: ignore[attr-defined]
        return function

    return decorate
