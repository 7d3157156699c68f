"""Losses of retrieval: embeddings that should find those of their own class first.

A query ranks the references by similarity. Smooth-AP and Recall@k are functions of the soft ranks of its
positives alone, R(j) = 1 + Σ_{k≠j} Φ((s_k − s_j)/τ) for a positive j, from the top; so with B queries, M
references and P positives they cost O(B M), where the formulas cost B² M or, positives alone, B M P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends import Backend, select
from ..cdf import smooth_cdf
from ..cdf_rows import CdfRows, pulled
from ..checks import (
    check_cutoffs,
    check_positive,
    check_retrieval,
    compute_dtype,
    first_order_only,
)
from ..positives import Positives
from ..precision import exact_arithmetic
from ..recipe import SCORE_OPTIONS, Recipe
from ..sweep import default_chunk_bytes
from ..training.distributed import (
    Group,
    GroupOrWorld,
    SharesGroup,
    gather_batch,
    joint_loss,
    live_group,
    sum_over_ranks,
)
from .module import RecipeModule

RETRIEVAL_OPTIONS = (*SCORE_OPTIONS, "chunk_bytes")
WORKING_BYTES = 24
"""Working memory for each source and query of a chunk, beside the backend's own."""


@dataclass(frozen=True)
class Queries:
    """Some queries, and where they find their positives."""

    recipe: Recipe
    references: int
    """M."""
    place: Tensor
    """R(j) [C, P], the soft rank of each positive among all references, from 1."""
    positive: Tensor
    """[C, P], the similarities of its positives among the references, padded."""
    present: Tensor
    """bool [C, P]: False for padding."""

    def places_among_positives(self) -> Tensor:
        """R_pos(j) [C, P], its soft rank among the positives."""
        count = smooth_cdf(
            self.positive,
            self.positive,
            temperature=self.recipe.temperature,
            relaxation=self.recipe.relaxation,
            tail="upper",
            source_mask=self.present,
            query_mask=self.present,
            backend=self.recipe.backend,
        )
        return count + ITSELF


ITSELF = 0.5
"""A positive has counted Φ(0) = ½ for itself, and should count 1."""
NEGLIGIBLE = 2.0**-60
"""A slope this small beside another changes no digit, and its terms are subnormal: these are slow."""
PerQuery = Callable[[Queries], Tensor]
"""The losses [C] of a chunk."""


@dataclass(frozen=True)
class Search:
    """What `RetrievalFunction` does, beside the tensors."""

    recipe: Recipe
    positives: Positives
    with_query: bool
    """Whether a query counts among its own references."""
    finds_itself: bool
    """Whether it is a positive of its own."""
    per_query: PerQuery

    def sweep(
        self, embeddings: Tensor, refs: Tensor | None, weights: Tensor, with_grad: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Losses [B], and with_grad the gradients of Σ_i weights_i L_i in embeddings and in refs.

        Queries go through in chunks; only a chunk's similarities are in memory at any time. Queries with
        as many positives go together, so that little is padding, and those without positives not at all.
        """
        references = embeddings if refs is None else refs
        losses = weights.new_zeros(len(embeddings))
        grads = [torch.zeros_like(x) for x in (embeddings, refs) if x is not None and with_grad]
        engine = select(self.recipe.backend, embeddings.device, embeddings.dtype)
        others = self.positives.others()
        ranked = others.argsort(descending=True)[: int((others > 0).sum())]
        if len(ranked) == 0:
            return losses, grads
        seen = len(references) + 2 * int(others.max())
        available = self.recipe.chunk_bytes or default_chunk_bytes(embeddings.device)
        rows = available // (WORKING_BYTES + engine.working_bytes_of(self.recipe)) // seen
        with exact_arithmetic(embeddings.device):
            for queries in ranked.split(max(1, min(rows, engine.chunk_rows))):
                chunk = _Chunk(self, engine, embeddings[queries], references, queries)
                place, density = chunk.places()
                leaves = place.requires_grad_(with_grad), chunk.positive.requires_grad_(with_grad)
                with torch.set_grad_enabled(with_grad):
                    values = self.per_query(
                        Queries(self.recipe, len(references), *leaves, chunk.present)
                    )
                losses[queries] = values.detach()
                if with_grad:
                    to_place, to_positive = torch.autograd.grad(
                        values, leaves, weights[queries], materialize_grads=True
                    )
                    to_anchors = chunk.pull(to_place, to_positive, density, grads[-1])
                    grads[0].index_add_(0, queries, to_anchors)
        return losses, grads


class _Chunk:
    """Some queries [C], their similarities [C, M], and what slopes in their ranks are worth.

    Products and sums go tile by tile of queries: a tile stays in the cache from one to the other.
    """

    def __init__(
        self, search: Search, engine: Backend, anchors: Tensor, references: Tensor, queries: Tensor
    ) -> None:
        """Takes the queries' points [C, D], the references' [M, D] and the places of the queries."""
        self._recipe, self._engine = search.recipe, engine
        self._anchors, self._references = anchors, references
        self._column, self.present = search.positives.columns(queries, search.finds_itself)
        self._counts = None if search.with_query else search.positives.others_than(queries)
        self._similarity = engine.empty_rows(len(anchors), len(references), anchors)
        self.positive = anchors.new_empty(self._column.shape)
        row = max(1, len(references)) * anchors.element_size()
        size = max(1, min(engine.tile_bytes // row, len(anchors)))
        self._tiles = [slice(first, first + size) for first in range(0, len(anchors), size)]

    def _rows(self, tile: slice) -> CdfRows:
        """How many of the references are above a positive."""
        present = self.present[tile]
        padded = not present[-1, -1]  # the last query has the fewest positives
        return CdfRows(
            self._similarity[tile],
            self.positive[tile],
            None,
            source_mask=None if self._counts is None else self._counts[tile],
            query_mask=present if padded else None,
            upper=True,
        )

    def places(self) -> tuple[Tensor, Tensor]:
        """R(j) [C, P] of the positives among all references, and −τ times its derivative in s_j."""
        place, density = torch.empty_like(self.positive), torch.empty_like(self.positive)
        for tile in self._tiles:
            torch.mm(self._anchors[tile], self._references.T, out=self._similarity[tile])
            torch.gather(self._similarity[tile], 1, self._column[tile], out=self.positive[tile])
            count, slope = self._engine.kernel_sums(self._rows(tile), self._recipe, ("cdf", "pdf"))
            torch.add(count[0], ITSELF, out=place[tile])
            density[tile] = slope[0]
        return place, density

    def pull(
        self, to_place: Tensor, to_positive: Tensor, density: Tensor, to_references: Tensor
    ) -> Tensor:
        """The gradient [C, D] in the queries; that in the references is added to `to_references`."""
        least = NEGLIGIBLE * to_place.abs().amax()
        to_place = torch.where(to_place.abs() < least, 0, to_place)
        slopes = pulled(to_place[None], None, None, self._recipe.temperature)
        to_positive = to_positive - slopes * density
        grad = torch.empty_like(self._anchors)
        with torch.no_grad():
            for tile in self._tiles:
                rows = self._rows(tile).turned(slopes[None, tile])
                (pulls,) = self._engine.kernel_sums(rows, self._recipe, ("pdf",))
                v = pulls[0].scatter_add_(1, self._column[tile], to_positive[tile])
                torch.mm(v, self._references, out=grad[tile])
                to_references.addmm_(v.T, self._anchors[tile])
        return grad


class RetrievalFunction(torch.autograd.Function):
    """Σ_i w_i L_i of queries, or for reduction "none" all L_i.

    As in `PerceptionCoherenceFunction` the forward computes the gradients in the same pass, and the
    backward scales them; for "none" the backward runs a second pass with the incoming weights.
    """

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, refs: Tensor | None, weights: Tensor, search: Search
    ) -> Tensor:
        """The loss of embeddings [B, D] and references [M, D] or None, weights [B]."""
        ctx.search, ctx.at_once = search, search.recipe.reduction != "none"
        wanted = any(ctx.needs_input_grad)
        losses, grads = search.sweep(embeddings, refs, weights, wanted and ctx.at_once)
        if wanted:
            ctx.save_for_backward(*(grads if ctx.at_once else (embeddings, refs)))
        return (losses * weights).sum() if ctx.at_once else losses

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the embeddings and of the references."""
        if ctx.at_once:
            grads = [saved * grad_loss for saved in ctx.saved_tensors]
        else:
            _, grads = ctx.search.sweep(*ctx.saved_tensors, grad_loss, True)
        return (grads[0], grads[1] if len(grads) > 1 else None, None, None)


class RetrievalLoss(RecipeModule, SharesGroup):
    """A loss of retrieval, as a module: a subclass says in `per_query` what a query's loss is."""

    allowed = RETRIEVAL_OPTIONS
    defaults: ClassVar = {"temperature": 0.01}
    alike: ClassVar[tuple[str, ...]] = (
        "relaxation",
        "temperature",
        "reduction",
        "normalize",
        "with_query",
    )
    """What the ranks of a group must have alike."""

    def __init__(
        self,
        *,
        normalize: bool = True,
        with_query: bool = True,
        process_group: GroupOrWorld | None = None,
        **options: Any,
    ) -> None:
        """See the subclass."""
        super().__init__(**options)
        self.normalize, self.with_query = normalize, with_query
        self.process_group = process_group

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch, called as the losses of pytorch-metric-learning are.

        Args:
            embeddings: [B, D], the queries; float32, float64, bfloat16 or float16.
            labels: integers [B]. Classes may be of any sizes.
            indices_tuple: None: a miner's tuples mean nothing to a loss of whole rankings.
            ref_emb: references [M, D]; by default the batch itself. They get gradients too.
            ref_labels: [M].

        Returns:
            A scalar, or [B] for reduction "none". A query without a positive, other than itself, has loss
            0 and does not count in the mean. A NaN or an infinity makes the losses that see it NaN.

        Raises:
            TypeError, ValueError: an argument is not what is said here.
        """
        check = partial(check_retrieval, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        group, start = live_group(self.process_group), None
        if group is None:
            check()
            queries = self._points(embeddings, ref_emb)
            refs = None if ref_emb is None else self._points(ref_emb, embeddings)
        else:
            queries, refs, ref_labels, start = self._gathered(
                embeddings, labels, ref_emb, check, group
            )
        positives = Positives.of(labels, ref_labels, start)
        counted = positives.others() > 0
        total = counted.sum()
        if group is not None:
            total = sum_over_ranks(total, group)
        weights = counted.to(queries.dtype)
        if self.recipe.reduction == "mean":
            weights = weights / total.clamp(min=1)
        search = Search(self.recipe, positives, self.with_query, self.finds_itself, self.per_query)
        loss = RetrievalFunction.apply(queries, refs, weights, search)
        if group is None:
            return loss
        return joint_loss(loss, self.recipe.reduction, group)

    def _gathered(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None,
        check: Callable[[], None],
        group: Group,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """This rank's points, those of all ranks and their labels, and where this rank's begin."""

        def agreed() -> dict[str, Any]:
            check()
            if ref_emb is not None:
                raise ValueError("process_group gathers the references itself: leave ref_emb out")
            return {name: getattr(self, name) for name in self.alike}

        column = labels.reshape(-1, 1).long() if isinstance(labels, Tensor) else labels
        names = ("embeddings", "labels")
        joint = gather_batch(embeddings, column, None, agreed, group, names)
        assert joint.teacher is not None
        points = self._points(joint.student)
        mine = points[joint.start : joint.start + len(embeddings)]
        return mine, points, joint.teacher[:, 0], joint.start

    @property
    def finds_itself(self) -> bool:
        """Whether a query that is a reference is a positive of its own."""
        return self.with_query

    def _points(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = x.to(compute_dtype(x, other))
        return torch.nn.functional.normalize(x) if self.normalize else x

    def per_query(self, chunk: Queries) -> Tensor:
        """The losses [C] of a chunk, differentiable in its similarities."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"{super().extra_repr()}, normalize={self.normalize}, with_query={self.with_query}"


class SmoothAPLoss(RetrievalLoss):
    """1 − (1/P) Σ_{j∈pos} R_pos(j)/R(j), the average precision of a query's soft ranking.

    Brown, Xie, Kalogeiton & Zisserman, "Smooth-AP: smoothing the path towards large-scale image
    retrieval" (ECCV 2020). As in their code the query is itself a reference and a positive. Unlike it,
    classes may differ in size, and references may be given.

    Example:
        >>> loss_fn = pc_kernels.SmoothAPLoss(temperature=0.01)
        >>> loss = loss_fn(embeddings, labels)                                    # [B, D], [B]
        >>> loss = loss_fn(embeddings, labels, ref_emb=bank, ref_labels=bank_labels)

    Args:
        normalize: whether embeddings are scaled to length 1 first, so that similarities are cosines.
        with_query: whether a query counts among its own references. Given references it never does.
        relaxation: the CDF Φ: a row of `pc_kernels.formulas.RELAXATIONS`, "logistic" by default.
        temperature: τ, in units of the similarity. > 0.
        reduction: "mean" or "sum" over queries with positives, or "none": one value a query.
        chunk_bytes: working memory of the pass over queries; default 256 MiB, or more on a GPU.
        backend: see `python -m pc_kernels.info`.
        process_group: a torch.distributed group whose ranks hold parts of one joint batch: every rank's
            embeddings are queries, and references of all (`pc_kernels.training.distributed`).
    """

    def per_query(self, chunk: Queries) -> Tensor:
        """See `RetrievalLoss`."""
        precision = chunk.places_among_positives() / chunk.place
        present = chunk.present
        return 1 - torch.where(present, precision, 0).sum(1) / present.sum(1)


class RecallAtKLoss(RetrievalLoss):
    """1 − mean_K min(K, Σ_{j∈pos} σ((K − R(j))/τ_K)) / min(K, P), recall in a query's first K, smoothed.

    Patel, Tolias & Matas, "Recall@k surrogate loss with large batches and similarity mixup" (CVPR
    2022). P positives beside the query. In their code the query is a reference of its own nevertheless,
    and takes the first place; in the paper it is not: `with_query=False`. A K beyond the number of
    references is that number.

    Example:
        >>> loss_fn = pc_kernels.RecallAtKLoss(k=(1, 2, 4, 8, 16))
        >>> loss = loss_fn(embeddings, labels)    # [B, D], [B]

    Args:
        k: the K to average over.
        k_temperature: τ_K, one for all K, or one for each; by default K itself, as in their code.
        normalize: as for `SmoothAPLoss`, and so is the rest.
    """

    alike: ClassVar[tuple[str, ...]] = (*RetrievalLoss.alike, "k", "k_temperature")

    def __init__(
        self,
        k: Sequence[int] = (1, 2, 4, 8, 16),
        *,
        k_temperature: float | Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        """Checks the options, so that a mistake shows where it is made."""
        super().__init__(**options)
        self.k = check_cutoffs(k)
        given = self.k if k_temperature is None else k_temperature
        self.k_temperature = _one_for_each(given, len(self.k))

    @property
    def finds_itself(self) -> bool:
        """Never: a query is none of its positives."""
        return False

    def per_query(self, chunk: Queries) -> Tensor:
        """See `RetrievalLoss`."""
        positives = chunk.present.sum(1)
        recall = chunk.place.new_zeros(len(chunk.place))
        for k, temperature in zip(self.k, self.k_temperature, strict=True):
            k = min(k, chunk.references)
            inside = torch.sigmoid((k - chunk.place) / temperature)
            found = torch.where(chunk.present, inside, 0).sum(1).clamp(max=k)
            recall = recall + found / positives.clamp(max=k)
        return 1 - recall / len(self.k)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"k={self.k}, k_temperature={self.k_temperature}, {super().extra_repr()}"


def _one_for_each(given: object, count: int) -> tuple[float, ...]:
    """One τ_K for each K; raises otherwise."""
    values = tuple(given) if isinstance(given, Sequence) else (given,) * count
    if len(values) != count:
        raise ValueError(f"k_temperature must be one number, or {count} as k is; got {given!r}")
    return tuple(check_positive("k_temperature", value) for value in values)
