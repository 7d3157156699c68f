"""Perception coherence: features -> dissimilarity -> rank -> loss -> gradient. Read this first.

The path of a call, a file each: `perception_coherence_loss` here makes a `Recipe` (recipe.py) of the
options -> `ranking_loss` (ranking.py) checks the inputs -> `PerceptionCoherenceFunction` (function.py) is
the custom backward -> `torch.ops.pc_kernels.ranking_loss` (ops.py) is what the dispatcher sees -> `sweep`
(sweep.py) goes through chunks of anchors -> a backend's `coherence_rows` (backends/) computes their rows.
The definitions are in reference.py.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from typing_extensions import Unpack

from ..recipe import FEATURE_OPTIONS, Options, make_recipe, shows_options
from ..training.distributed import GroupOrWorld
from .ranking import Inputs, RankingLoss, ranking_loss


@shows_options(FEATURE_OPTIONS)
def perception_coherence_loss(
    student: Tensor,
    teacher: Tensor,
    student_refs: Tensor | None = None,
    teacher_refs: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    pair_mask: Tensor | None = None,
    process_group: GroupOrWorld | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """How differently student and teacher rank the references around each anchor.

    Every row is an anchor. Its references are the other rows, or the rows of `student_refs` and
    `teacher_refs` where these are given. L_i = mean_j ℓ(r_S(i, j) − r_T(i, j)), with the teacher's
    hard ranks and the student's soft ranks, both in [0, 1]; see `pc_kernels.reference`. After
    perception coherence, arXiv 2505.06595.

    Args:
        student: features [A, Ds]; float32, float64, bfloat16 or float16. Each input may have another
            dtype: all is computed in float32, or in float64 if any of them is. (What comes from NumPy
            often is, and float64 is slow: cast with `.float()`.) Gradients have the dtype of their input.
        teacher: features [A, Dt] of the same inputs. They get no gradient.
        student_refs: reference features [M, Ds], say a memory bank; they get gradients if they
            require them.
        teacher_refs: [M, Dt], of the same inputs as student_refs.
        weights: [A], how much each anchor counts: "mean" is Σ w_i L_i / Σ w_i (0 if all weights are 0),
            "sum" Σ w_i L_i, "none" w_i L_i. They get no gradient.
        pair_mask: bool [A, M], or 1 in place of either; True where the pair counts. A masked pair is as
            if that reference were absent: not ranked, not counted (padding, other views of the anchor).
            An anchor left with fewer than 2 references has loss 0 and does not count in the mean.
        dissimilarity: "euclidean", "sqeuclidean", "cosine", "cityblock", or a function of anchors
            [C, Ds] and references [M, Ds] to [C, M]. Gradients reach the features that a function
            is given, not parameters inside it.
        teacher_dissimilarity: the teacher's, if another.
        relaxation: the CDF Φ in the soft rank: a row of `pc_kernels.formulas.RELAXATIONS`, "logistic"
            by default; or one of `pc_kernels.formulas.PROJECTIONS`, see `soft_rank`.
        temperature: τ, in units of σ_i or of the dissimilarity itself: see scale. > 0. At 0.1, the
            default, a student that reaches a rank correlation of less than ½ loses least by tying all
            references, and may learn just that; at 1, of less than a third. See docs/options.md.
        scale: "std": τ_i = temperature · σ_i, the standard deviation of the anchor's dissimilarities;
            the loss then does not change when the student's features are scaled. None: τ = temperature.
        penalty: ℓ of a residual of ranks: a row of `pc_kernels.formulas.PENALTIES`, "squared" by
            default.
        reduction: "mean" or "sum" over anchors, or "none": one value an anchor.
        chunk_bytes: working memory of the pass over anchors; default 256 MiB, on a GPU 2 GiB or an
            eighth of what it has.
        process_group: a torch.distributed group whose ranks hold parts of one joint batch, or "world",
            all of them; see `pc_kernels.training.distributed`.
        backend: "auto", or what computes, "cuda", "cpu", "triton", "torch" or "reference"; see
            `python -m pc_kernels.info`.
        products: how inner products of features are taken: "ieee", in full float32; or in sums of
            bfloat16 products, which a GPU's tensor cores multiply, "bf16x6" as exact and "bf16x3" with 16
            bits. Features in half precision go there under "ieee" as well, on CUDA: that is exact.

    Returns:
        A scalar, or [A] for reduction "none". Fewer than two references rank nothing: 0. A NaN or an
        infinity in the features of a row, or of a reference of it, makes its loss NaN.

    Raises:
        TypeError, ValueError: an argument is not what is said here, or the backend is not usable.
    """
    inputs = Inputs(student, teacher, student_refs, teacher_refs, weights, pair_mask)
    recipe_of = partial(make_recipe, "perception_coherence_loss", options)
    return ranking_loss(inputs, recipe_of, process_group)


class PerceptionCoherenceLoss(RankingLoss):
    """`perception_coherence_loss` as a module.

    Each option is an attribute, which may be set between calls, and is then checked. The defaults are the
    paper's form; the example's options are where to start with a pretrained teacher, and what the
    reference trainer takes (docs/options.md, "Measured on real features").

    Example:
        >>> loss_fn = pc_kernels.PerceptionCoherenceLoss(dissimilarity="cosine", temperature=1.0)
        >>> loss = loss_fn(student, teacher)    # [B, Ds], [B, Dt] -> scalar
        >>> loss.backward()

    Args, result and errors: see `perception_coherence_loss`.
    """
