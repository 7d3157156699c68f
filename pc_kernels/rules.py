"""The step rank -> loss -> slope of an anchor's row, as small objects: row rules.

A penalty ℓ, averaged over the references, is a row rule; so is whatever else can be said of two rows of
ranks. Every backend serves every rule by the chain of stages (backends/chain.py); those with a `code` are
also fused into the kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .formulas import PENALTIES, Penalty


class RowRule:
    """What a loss makes of the student's and the teacher's ranks of an anchor's references.

    Example:
        >>> @row_rule("spearman")
        ... class Spearman(RowRule):
        ...     def value_and_slope(self, rank, target, keep): ...
        >>> class SpearmanLoss(RankingLoss):
        ...     fixed = {"penalty": "spearman"}
    """

    code: int | None = None
    """What fused kernels call it; None: only the chain of stages computes it."""

    def value_and_slope(self, rank: Tensor, target: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """The losses [C] of C anchors, and what they change by with each soft rank, [C, M].

        Args:
            rank: the student's soft ranks [C, M], in [0, 1].
            target: the teacher's hard ranks [C, M].
            keep: bool [C, M], True where a reference counts; elsewhere both ranks are 0, and the slope
                has to be.
        """
        raise NotImplementedError


class MeanPenalty(RowRule):
    """mean_j ℓ(r_S(i, j) − r_T(i, j)) over the references that count."""

    def __init__(self, penalty: Penalty) -> None:
        """Takes a row of `formulas.PENALTIES`."""
        self.penalty = penalty
        self.code = penalty.code

    def value_and_slope(self, rank: Tensor, target: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowRule`."""
        residual = rank - target
        count = keep.sum(1, keepdim=True).clamp(min=1).to(rank.dtype)
        value = torch.where(keep, self.penalty.value(residual), 0).sum(1) / count[:, 0]
        return value, torch.where(keep, self.penalty.slope(residual), 0) / count


RULES: dict[str, RowRule] = {}
"""Row rules that are not the mean of a penalty, by name; see `row_rule`."""


def row_rule(name: str) -> Callable[[type[RowRule]], type[RowRule]]:
    """Decorates a row rule, of which `penalty=name` then asks."""

    def add(rule: type[RowRule]) -> type[RowRule]:
        if name in rule_names():
            raise ValueError(f"there is a row rule {name!r} already")
        RULES[name] = rule()
        return rule

    return add


def rule_names() -> tuple[str, ...]:
    """The names of all row rules."""
    return (*PENALTIES, *RULES)


def rule_called(name: str) -> RowRule:
    """The row rule of a name among `rule_names()`."""
    return MeanPenalty(PENALTIES[name]) if name in PENALTIES else RULES[name]
