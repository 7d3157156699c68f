"""The loss of dissimilarities that the caller has."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from ..backends import check_usable
from ..checks import check_matrix, check_same_device, check_weighting
from ..recipe import MATRIX_OPTIONS, MatrixOptions, make_recipe, shows_options
from .function import PerceptionCoherenceFunction, Task


@shows_options(MATRIX_OPTIONS)
def coherence_loss_from_dissimilarities(
    d_s: Tensor,
    d_t: Tensor,
    *,
    weights: Tensor | None = None,
    pair_mask: Tensor | None = None,
    exclude_self: bool = False,
    **options: Unpack[MatrixOptions],
) -> Tensor:
    """The loss of dissimilarities that the caller has, of any metric, learned ones too.

    Args:
        d_s: the student's [A, M], a row for each anchor; gradients flow into it.
        d_t: the teacher's [A, M]; it gets no gradient.
        weights: [A]; see `perception_coherence_loss`, as for `pair_mask`.
        pair_mask: bool [A, M], or 1 in place of either; True where the pair counts.
        exclude_self: the matrices are [B, B] over one batch, and the diagonal is left out.
        relaxation: see `perception_coherence_loss`, as for the rest.
        temperature: τ, > 0.
        scale: "std" or None.
        penalty: "squared", "absolute" or "huber".
        reduction: "mean", "sum" or "none".
        chunk_bytes: working memory of the pass over anchors.
        backend: see `python -m pc_kernels.info`.

    Returns:
        A scalar, or [A] for reduction "none".

    Raises:
        TypeError, ValueError: an argument is not what is said here, or the backend is not usable.
    """
    recipe = make_recipe("coherence_loss_from_dissimilarities", options, MATRIX_OPTIONS)
    check_matrix("d_s", d_s, "[anchors, references]")
    check_matrix("d_t", d_t, "[anchors, references]")
    if d_s.shape != d_t.shape:
        raise ValueError(
            f"d_s and d_t must have the same shape; got {tuple(d_s.shape)} and {tuple(d_t.shape)}"
        )
    if exclude_self and d_s.shape[0] != d_s.shape[1]:
        raise ValueError(f"exclude_self needs square matrices; got shape {tuple(d_s.shape)}")
    check_same_device(d_s=d_s, d_t=d_t)
    check_weighting(weights, pair_mask, d_s.shape[0], d_s.shape[1], d_s.device)
    check_usable(recipe.backend, d_s, d_t)
    task = Task(recipe, self_start=0 if exclude_self else None, given=True)
    return PerceptionCoherenceFunction.apply(
        d_s, d_t.detach(), None, None, weights, pair_mask, task
    )
