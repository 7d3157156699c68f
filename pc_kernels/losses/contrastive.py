"""The contrastive loss: InfoNCE, CLIP's and SigLIP's losses, and distillation by similarities.

The path of a call: `contrastive_loss` here puts normalisation, temperature and bias into the features
(scaling.py), such that logits are plain inner products, and leaves their gradients to PyTorch ->
`LossFunction` (function.py) is the custom backward -> `contrast` (contrast.py) goes through chunks of
anchors -> a backend's `contrast_rows` makes losses and slopes of their logits; the formulas are in
backends/contrast_rows.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..backends import check_usable
from ..checks import (
    check_matrix,
    check_positive,
    check_same_device,
    check_weighting,
    compute_dtype,
    wide_dtype,
)
from ..contrast import Candidates, Contrast, check_pair
from ..ops import run_contrast
from ..products import Products
from ..recipe import named_options, shows_options, signature_with
from ..training.distributed import (
    Group,
    GroupOrWorld,
    SharesGroup,
    gather_batch,
    joint_loss,
    live_group,
    sum_over_ranks,
)
from .contrastive_recipe import OPTIONS, ContrastiveOptions, ContrastiveRecipe
from .function import Given, LossFunction
from .scaling import factored, scaled
from .weighting import given_weights, shares

LARGEST_LOGIT = 128.0
"""Above it float32 products round logits by more than 1e-5, and all is computed in float64."""


class SoftTargets(NamedTuple):
    """The teacher's similarities, softmax_j(t_i · t_j / τ_t), as targets in place of the positives."""

    queries: Tensor
    """[A, Dt], what the teacher says of the anchors."""
    keys: Tensor | None = None
    """[A, Dt]; None: the keys of the loss, and its key_refs, serve both."""
    key_refs: Tensor | None = None
    """[M, Dt], where there are keys and the loss has key_refs."""
    temperature: float | None = None
    """τ_t > 0; None: as the student's."""


@dataclass(frozen=True)
class ContrastTask:
    """What a `LossFunction` of queries, target queries, keys and target keys does."""

    recipe: Contrast
    start: int = 0
    columns: int = 0
    group: Group | None = None
    layer_weights: ClassVar[tuple[float, ...]] = (1.0,)

    def weigh(self, given: Given, weights: Tensor | None) -> Tensor:
        """What each anchor weighs [A]: 0 without its positive, or where there are no keys at all."""
        (queries,), keys, mask = given.students, given.student_refs, given.pair_mask
        w = given_weights(queries, weights)
        if mask is None:
            return w
        assert keys is not None
        mask = mask.expand(len(queries), len(keys))
        softmax = self.recipe.form == "softmax"
        present = mask.diagonal(self.start)[: len(queries)] if softmax else mask.any(1)
        return torch.where(present, w, 0)

    def run(self, given: Given, weights: Tensor, with_grad: bool) -> tuple[Tensor, list[Tensor]]:
        """Losses [1, A], and with_grad the gradients in queries and keys; see `contrast`."""
        (queries,), target_queries, keys, target_keys, mask = given
        assert keys is not None
        of_anchors = weights[0].contiguous()
        batch = Candidates(
            queries,
            keys,
            target_queries,
            target_keys,
            of_anchors,
            mask,
            self.start,
            self.columns,
            self.group,
        )
        losses, gradients = run_contrast(batch, self.recipe, with_grad)
        return losses[None], gradients


@dataclass(frozen=True)
class _Inputs:
    """The tensors that a user passes; of a joint batch, with the keys of all ranks."""

    queries: Tensor
    keys: Tensor
    key_refs: Tensor | None
    targets: SoftTargets | None
    weights: Tensor | None
    pair_mask: Tensor | None
    start: int = 0
    """The place of the anchors among the keys."""

    def check(self, recipe: ContrastiveRecipe, width: int | None = None) -> None:
        """Raises TypeError or ValueError unless all is in order; `width` is a mask's if not as here."""
        check_pair("queries", self.queries, "keys", self.keys)
        anchors, count = len(self.queries), len(self.keys)
        if anchors != count:
            raise ValueError(
                f"queries and keys must hold the same inputs: got {anchors} and {count} rows"
            )
        if self.key_refs is not None:
            check_pair("queries", self.queries, "key_refs", self.key_refs)
            count += len(self.key_refs)
        check_weighting(
            self.weights,
            self.pair_mask,
            anchors,
            count if width is None else width,
            self.queries.device,
        )
        if self.targets is not None:
            self._check_targets(self.targets, recipe)
        check_usable(recipe.backend, *self.features())

    def _check_targets(self, targets: SoftTargets, recipe: ContrastiveRecipe) -> None:
        if not isinstance(targets, SoftTargets):
            raise TypeError(f"targets must be SoftTargets; got {type(targets).__name__}")
        if recipe.form != "softmax" or recipe.symmetric:
            raise ValueError(
                "targets are of form='softmax' in one direction: for both, add two losses with the "
                "sides exchanged"
            )
        if targets.temperature is not None:
            check_positive("targets.temperature", targets.temperature)
        rows = len(check_matrix("targets.queries", targets.queries, "[anchors, width]"))
        keys, key_refs = targets.keys, targets.key_refs
        if keys is None and key_refs is not None:
            raise ValueError("targets.key_refs go with targets.keys, which are missing")
        if keys is not None and (key_refs is None) != (self.key_refs is None):
            raise ValueError("targets.key_refs and key_refs go together where targets has keys")
        own = (keys, key_refs) if keys is not None else (self.keys, self.key_refs)
        for name, x, like in zip(
            ("keys", "key_refs"), own, (self.keys, self.key_refs), strict=True
        ):
            if x is None or like is None:
                continue
            check_pair("targets.queries", targets.queries, f"targets.{name}", x)
            if len(x) != len(like):
                raise ValueError(f"targets.{name} must have {len(like)} rows; got {len(x)}")
        if rows != len(self.queries):
            raise ValueError(f"targets.queries must have {len(self.queries)} rows; got {rows}")
        check_same_device(queries=self.queries, **{"targets.queries": targets.queries})

    def features(self) -> list[Tensor]:
        """All that are given."""
        soft = [] if self.targets is None else self.targets[:3]
        return [x for x in (self.queries, self.keys, self.key_refs, *soft) if x is not None]


@shows_options(OPTIONS, ContrastiveRecipe)
def contrastive_loss(
    queries: Tensor,
    keys: Tensor,
    key_refs: Tensor | None = None,
    *,
    targets: SoftTargets | None = None,
    weights: Tensor | None = None,
    pair_mask: Tensor | None = None,
    process_group: GroupOrWorld | None = None,
    **options: Unpack[ContrastiveOptions],
) -> Tensor:
    """How well each query finds its own key among all keys.

    Every row of `queries` is an anchor i, and key i its positive; all other keys, and all of `key_refs`,
    are its negatives. With logits z_ij = q_i · k_j/τ + b, L_i = −log softmax_j(z_ij)[i]: InfoNCE (van den
    Oord et al. 2018, arXiv 1807.03748). `symmetric=True` is CLIP's loss (arXiv 2103.00020),
    `form="sigmoid"` is SigLIP's, L_i = −Σ_j log σ(±z_ij), + for the positive (arXiv 2303.15343). With
    `targets`, L_i = KL(softmax_j(teacher) ‖ softmax_j(z_ij)), as in CompRess (arXiv 2010.14713) and SEED
    (arXiv 2101.04731). docs/contrastive.md has an example of each.

    Args:
        queries: features [A, D]; float32, float64, bfloat16 or float16. All is computed in float32, or in
            float64 if any input is, or if logits may exceed 128 (see docs/contrastive.md).
        keys: features [A, D] of the same inputs; like the queries, they may require gradients.
        key_refs: [M, D], more negatives for every anchor: `_, key_refs = queue` of a `FeatureQueue`.
        targets: what the teacher says of the same inputs; it gets no gradient.
        weights: [A], how much each anchor counts: "mean" is Σ w_i L_i / Σ w_i (0 if all weights are 0),
            "sum" Σ w_i L_i, "none" w_i L_i. They get no gradient.
        pair_mask: bool [A, A + M], or 1 in place of either; True where the pair counts. A masked pair is
            as if that key were absent for that anchor, in either direction. An anchor without its
            positive (under targets and in the sigmoid form: without any key) has loss 0 and does not
            count in the mean.
        temperature: τ > 0, 0.07 by default; a tensor of one number gets a gradient.
        logit_scale: 1/τ instead, as CLIP's models have it.
        bias: b, of the sigmoid form; a tensor of one number gets a gradient.
        normalize: whether the features, and those of targets, are divided by their norms. A vector of
            zeros stays one, without a gradient.
        symmetric: the mean of both directions, L_i = ½ (L_i of rows + L_i of columns); key_refs are
            negatives of rows alone.
        form: "softmax" or "sigmoid".
        reduction: "mean" or "sum" over anchors, or "none": one value an anchor.
        chunk_bytes: working memory of the passes over anchors; default 256 MiB, on a GPU 2 GiB or an
            eighth of its memory, if that is less.
        process_group: a torch.distributed group whose ranks hold parts of one joint batch, see
            `pc_kernels.training.distributed`; key_refs and the options are to be the same on all ranks.
        backend: "auto", or what computes, "cuda", "cpu", "triton", "torch" or "reference"; see
            `python -m pc_kernels.info`.
        products: how inner products of features are taken: "ieee", in full float32; or in sums of
            bfloat16 products, which a GPU's tensor cores multiply, "bf16x6" as exact and "bf16x3" with 16
            bits of each number. Features in half precision have all their digits in few of them, and go
            that way under "ieee" as well, on CUDA. See docs/method.md.

    Returns:
        A scalar, or [A] for reduction "none". A NaN or an infinity in the features of an anchor, or of a
        key that it sees, makes its loss NaN.

    Raises:
        TypeError, ValueError: an argument is not what is said here, or the backend is not usable.
    """
    inputs = _Inputs(queries, keys, key_refs, targets, weights, pair_mask)

    def recipe_of() -> ContrastiveRecipe:
        return ContrastiveRecipe(**named_options("contrastive_loss", options, OPTIONS))

    return _loss_of(inputs, recipe_of, process_group)


class ContrastiveLoss(SharesGroup):
    """`contrastive_loss` as a module.

    A temperature, logit_scale or bias that is an `nn.Parameter` becomes a parameter of the module.

    Example:
        >>> loss_fn = pc_kernels.ContrastiveLoss(temperature=0.07, symmetric=True)
        >>> loss = loss_fn(student, teacher)    # [B, D], [B, D] -> scalar
        >>> loss.backward()

    Args, result and errors: see `contrastive_loss`.
    """

    def __init__(
        self, *, process_group: GroupOrWorld | None = None, **options: Unpack[ContrastiveOptions]
    ) -> None:
        """Checks the options, so that a mistake shows where it is made."""
        super().__init__()
        recipe = ContrastiveRecipe(**named_options("ContrastiveLoss", options, OPTIONS))
        for name in OPTIONS:
            setattr(self, name, getattr(recipe, name))
        self.process_group = process_group

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        key_refs: Tensor | None = None,
        *,
        targets: SoftTargets | None = None,
        weights: Tensor | None = None,
        pair_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of features [A, D] and [A, D], with more negatives [M, D] if given."""
        inputs = _Inputs(queries, keys, key_refs, targets, weights, pair_mask)

        def recipe_of() -> ContrastiveRecipe:
            return ContrastiveRecipe(**{name: getattr(self, name) for name in OPTIONS})

        return _loss_of(inputs, recipe_of, self.process_group)

    def extra_repr(self) -> str:
        """The options, for printing."""
        given = ((name, getattr(self, name)) for name in OPTIONS if name != "chunk_bytes")
        return ", ".join(f"{name}={x!r}" for name, x in given if not isinstance(x, nn.Parameter))


ContrastiveLoss.__signature__ = signature_with(  # type: ignore[attr-defined]
    ContrastiveLoss, OPTIONS, ContrastiveRecipe
)


def _loss_of(
    inputs: _Inputs, recipe_of: Callable[[], ContrastiveRecipe], process_group: GroupOrWorld | None
) -> Tensor:
    """The loss that a recipe describes, of one process or of a group."""
    group = live_group(process_group)
    if group is not None:
        return _joint_loss(inputs, recipe_of, group)
    recipe = recipe_of()
    inputs.check(recipe)
    return _apply(*_assemble(inputs, recipe), inputs.weights)


def _joint_loss(
    inputs: _Inputs, recipe_of: Callable[[], ContrastiveRecipe], group: Group
) -> Tensor:
    """The loss of a batch that several ranks hold: this rank's queries against all ranks' keys."""
    mask, refs, targets = inputs.pair_mask, inputs.key_refs, inputs.targets
    masked = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > 1

    def check() -> dict[str, Any]:
        recipe = recipe_of()
        # The mask's width is checked where all ranks' rows have been counted.
        inputs.check(recipe, width=mask.shape[1] if mask is not None and masked else 1)
        return recipe.shared()

    of_batch = mask  # the part of it that is of the keys
    if mask is not None and masked and isinstance(refs, Tensor):
        of_batch = mask[:, : max(0, mask.shape[1] - len(refs))]
    target_keys = targets.keys if isinstance(targets, SoftTargets) else None
    joint = gather_batch(inputs.keys, target_keys, of_batch, check, group)
    recipe = recipe_of()
    if targets is not None:
        targets = targets._replace(keys=joint.teacher)
    inputs = replace(inputs, keys=joint.student, targets=targets, start=joint.start)
    given, task = _assemble(inputs, recipe)
    weights = task.weigh(given, inputs.weights)
    if recipe.reduction == "mean":
        weights = shares(weights, sum_over_ranks(weights.sum(), group))
        task = replace(task, recipe=replace(task.recipe, reduction="sum"))
    losses = _apply(given, replace(task, group=group), weights)
    return joint_loss(losses, task.recipe.reduction, group)


def _apply(given: Given, task: ContrastTask, weights: Tensor | None) -> Tensor:
    (queries,), target_queries, keys, target_keys, mask = given
    return LossFunction.apply(queries, target_queries, keys, target_keys, weights, mask, task)


def _assemble(inputs: _Inputs, recipe: ContrastiveRecipe) -> tuple[Given, ContrastTask]:
    """Features whose inner products are the logits, and what to do with them."""
    dtype = _compute_dtype(inputs, recipe)

    parts = Products.of(recipe.products, inputs.features(), dtype).whole_parts
    prepared = factored if parts else scaled

    def features(scale: float | Tensor, *given: Tensor | None) -> Tensor:
        x = [x.to(dtype) for x in given if x is not None]
        return prepared(torch.cat(x) if len(x) > 1 else x[0], scale, recipe.normalize)

    scale = recipe.scale()
    queries, keys = features(scale, inputs.queries), features(1.0, inputs.keys, inputs.key_refs)
    if recipe.bias is not None:  # one more feature of the keys: see `Candidates`
        bias = torch.as_tensor(recipe.bias, dtype=dtype, device=keys.device).reshape(1, 1)
        keys = torch.cat([keys, bias.expand(len(keys), 1)], 1)
    targets, form = inputs.targets, recipe.form
    of_queries, of_keys = None, None
    if targets is not None:
        form = "distillation"
        own = (inputs.keys, inputs.key_refs) if targets.keys is None else targets[1:3]
        with torch.no_grad():
            if targets.temperature is not None:
                scale = 1 / targets.temperature
            of_queries, of_keys = features(scale, targets.queries), features(1.0, *own)
    given = Given([queries], of_queries, keys, of_keys, inputs.pair_mask)
    contrast = Contrast(
        form, recipe.reduction, recipe.chunk_bytes, recipe.backend, recipe.products, parts
    )
    columns = len(inputs.keys) if recipe.symmetric else 0
    return given, ContrastTask(contrast, inputs.start, columns)


def _compute_dtype(inputs: _Inputs, recipe: ContrastiveRecipe) -> torch.dtype:
    """float64 if an input is, or if a logit may be too large for float32; else float32."""
    dtype = compute_dtype(*inputs.features())
    if dtype == torch.float32 and _largest_logit(inputs, recipe) > LARGEST_LOGIT:
        return wide_dtype(inputs.queries.device)
    return dtype


@torch.no_grad()
def _largest_logit(inputs: _Inputs, recipe: ContrastiveRecipe) -> float:
    """A bound on |q·k/τ|, as far as looking is free: at the options, and on the CPU at tensors."""
    free = inputs.queries.device.type == "cpu" and not torch.compiler.is_compiling()
    given, targets = recipe.scale(), inputs.targets
    scale = abs(float(given)) if free or not isinstance(given, Tensor) else 0.0
    of_teacher = scale
    if targets is not None and targets.temperature is not None:
        of_teacher = 1 / targets.temperature
    if recipe.normalize:
        return scale if targets is None else max(scale, of_teacher)
    if not free:
        return 0.0
    largest = _norm(inputs.queries) * max(_norm(inputs.keys), _norm(inputs.key_refs)) * scale
    if targets is None:
        return largest
    own = targets[1:3] if targets.keys is not None else (inputs.keys, inputs.key_refs)
    return max(largest, _norm(targets.queries) * max(map(_norm, own)) * of_teacher)


def _norm(x: Tensor | None) -> float:
    """The largest norm of a row."""
    if x is None or x.numel() == 0:
        return 0.0
    return float(torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).max())
