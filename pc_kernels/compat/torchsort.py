"""torchsort's `soft_rank` and `soft_sort`: `from pc_kernels.compat import torchsort`.

The same signatures and results (Teddy Koker's torchsort 0.1.10, after google-research/fast-soft-sort), in
half precision too, without a compiler and on any device. Ranks go from 1, of the lowest value, to m.
"""

from __future__ import annotations

from torch import Tensor

from .. import ranks, sorting
from ..checks import check_floating, check_positive, one_of

__all__ = ["soft_rank", "soft_sort"]


def soft_rank(
    values: Tensor, regularization: str = "l2", regularization_strength: float = 1.0
) -> Tensor:
    """Ranks of the rows of `values` [N, m], in [1, m]; Blondel et al. (ICML 2020).

    Args:
        values: [N, m].
        regularization: "l2" or "kl".
        regularization_strength: ε, in units of the values. > 0.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
    """
    epsilon = _checked(values, regularization, regularization_strength)
    others = values.shape[1] - 1
    if regularization == "kl":
        rank = ranks.soft_rank(values, epsilon, "projection_kl")
    else:
        rank = ranks.soft_rank(values, epsilon * max(others, 1), "projection")
    return 1 + others * rank


def soft_sort(
    values: Tensor, regularization: str = "l2", regularization_strength: float = 1.0
) -> Tensor:
    """The rows of `values` [N, m] in ascending order, softly; see `pc_kernels.soft_sort`.

    Args:
        values: [N, m].
        regularization: "l2" or "kl".
        regularization_strength: ε, in units of 1/values. > 0.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
    """
    epsilon = _checked(values, regularization, regularization_strength)
    return sorting.soft_sort(values, epsilon, regularization)


def _checked(values: Tensor, regularization: str, strength: float) -> float:
    x = check_floating("values", values)
    if x.dim() != 2:
        raise ValueError(f"values must have 2 dimensions; got shape {tuple(x.shape)}")
    one_of("regularization", regularization, sorting.REGULARIZATIONS)
    return check_positive("regularization_strength", strength)
