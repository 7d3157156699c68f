"""The contrastive loss in passes over chunks of anchors: the logits are never stored as a whole.

A chunk of anchors goes through product -> log-sum-exp -> loss -> slope -> gradient before the next one
starts; beside the inputs and the gradients, only its logits live. Of a loss in both directions a first
pass has the log-sum-exps of the columns. Its products are made again in the second, unless they all fit
into `chunk_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .backends import BACKENDS, Backend, select
from .backends.contrast_rows import FORMS, ColumnSlopes, ColumnSums, LogitRows, softplus
from .checks import check_matrix, check_same_device, check_weighting, one_of
from .precision import exact_arithmetic
from .products import DEPTHS, PARTS, Products
from .sweep import default_chunk_bytes
from .training.distributed import Group, logsumexp_over_ranks, sum_over_ranks

CPU_CHUNK_ROWS = 256
"""Anchors of a chunk on the CPU: their logits are still in cache when the slopes replace them."""


@dataclass(frozen=True)
class Contrast:
    """What to compute, and how, as it reaches the backend."""

    form: str = "softmax"
    """A key of `backends.contrast_rows.FORMS`."""
    reduction: str = "mean"
    """"mean" or "sum" over anchors, or "none": one value an anchor."""
    chunk_bytes: int | None = None
    """Working memory of the passes; None: see `sweep.default_chunk_bytes`."""
    backend: str = "auto"
    """What computes: see `python -m pc_kernels.info`."""
    products: str = "ieee"
    """How products of matrices are taken: a choice of `products.DEPTHS`."""
    parts: int = 0
    """Of how many parts of bfloat16 the features are, that came in half precision; 0: they are float32.

    The last of such features is a factor, what the others, and their products, are multiplied by.
    """

    def taken(self, dtype: torch.dtype) -> Products:
        """How products of features of this dtype are taken."""
        if self.products == "ieee":
            return Products(self.products, self.parts)
        return Products.of(self.products, [], dtype)


@dataclass(frozen=True)
class Candidates:
    """A anchors and the keys among which each has to find its own."""

    queries: Tensor
    """[A, D], times what makes logits of inner products."""
    keys: Tensor
    """[K, D], or [K, D + 1] with the bias: what is added to the logits of a key."""
    target_queries: Tensor | None
    """The teacher's [A, Dt]; None: the positives are the targets."""
    target_keys: Tensor | None
    """The teacher's [K, Dt]."""
    weights: Tensor
    """[A]."""
    pair_mask: Tensor | None
    """bool, broadcast to [A, K]; where it is False the key is absent."""
    start: int = 0
    """The positive of anchor i is key start + i."""
    columns: int = 0
    """N, in both directions: the first N keys are anchors as well. 0: in one."""
    group: Group | None = None
    """The processes that hold the other anchors of the columns."""

    def check(self, recipe: Contrast) -> None:
        """Raises TypeError or ValueError unless the kernels can be given this, from whoever it is."""
        form, q, k = recipe.form, self.queries, self.keys
        one_of("form", form, tuple(FORMS))
        one_of("products", recipe.products, tuple(DEPTHS))
        one_of("parts", recipe.parts, (0, *PARTS.values()))
        biased = q.dim() == k.dim() == 2 and k.shape[1] == q.shape[1] + 1
        check_pair("queries", q, "keys", k[:, :-1] if biased else k)
        if recipe.parts and (recipe.products != "ieee" or q.dtype != torch.float32):
            raise ValueError("parts are of float32 tensors, under products='ieee'")
        targets = self.target_queries, self.target_keys
        if (form == "distillation") != all(x is not None for x in targets):
            raise ValueError(
                "form 'distillation', and no other, needs target_queries and target_keys"
            )
        if form == "distillation":
            check_pair("target_queries", targets[0], "target_keys", targets[1])
        sizes = [len(x) for x in targets if x is not None]
        anchors, keys = len(self.queries), len(self.keys)
        if sizes not in ([], [anchors, keys]):
            raise ValueError(f"targets must be of {anchors} queries and {keys} keys; got {sizes}")
        check_weighting(self.weights, self.pair_mask, anchors, keys, self.queries.device)
        if len({x.dtype for x in (*self.tensors(), self.weights)}) > 1:
            raise TypeError("all tensors of the operator must have one dtype")
        if self.start < 0 or self.start + anchors > keys or self.columns > keys:
            raise ValueError(f"start {self.start}, columns {self.columns}: there are {keys} keys")

    def tensors(self) -> list[Tensor]:
        """The features."""
        given = (self.queries, self.keys, self.target_queries, self.target_keys)
        return [x for x in given if x is not None]


def check_pair(query_name: str, queries: object, key_name: str, keys: object) -> None:
    """Raises TypeError or ValueError unless these are features of one width on one device."""
    q = check_matrix(query_name, queries, "[anchors, width]")
    k = check_matrix(key_name, keys, "[keys, width]")
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{query_name} and {key_name} must have the same width; got {q.shape[1]} and {k.shape[1]}"
        )
    if q.shape[1] == 0:
        raise ValueError(f"{query_name} has no features: its shape is {tuple(q.shape)}")
    check_same_device(**{query_name: q, key_name: k})


@torch.no_grad()
def contrast(batch: Candidates, recipe: Contrast, with_grad: bool) -> tuple[Tensor, list[Tensor]]:
    """Losses [A], and with_grad the gradients of Σ_i weights_i L_i in queries and in keys, else none."""
    device = batch.queries.device
    engine = select(recipe.backend, device, torch.float32)
    if engine.obstacle(device, batch.queries.dtype) is not None:  # float64
        engine = BACKENDS["torch"]
    with exact_arithmetic(device):
        chunks = _Chunks(batch, recipe, engine, with_grad)
        weights = batch.weights.contiguous()
        losses = torch.empty_like(weights)
        if batch.columns:
            weights = weights / 2
            slopes, column_losses = chunks.columns(weights)
        for part in chunks:
            rows = chunks.rows(part)
            if batch.columns:
                rows = rows._replace(columns=slopes._replace(own=slopes.own[part]))
            losses[part] = engine.contrast_rows(rows, weights[part], with_grad)
            if with_grad:
                chunks.student.pull(part, rows.values)
        if batch.columns:
            losses = (losses + column_losses) / 2
        return losses, chunks.student.gradients() if with_grad else []


class _Chunks:
    """The chunks of anchors, slices, and their logits."""

    def __init__(
        self, batch: Candidates, recipe: Contrast, engine: Backend, with_grad: bool
    ) -> None:
        """Takes what to compute."""
        self._batch, self._form, self._engine = batch, recipe.form, engine
        budget = recipe.chunk_bytes
        if budget is None:
            budget = default_chunk_bytes(batch.queries.device)
        dtype, masked = batch.queries.dtype, batch.pair_mask is not None
        taken = recipe.taken(dtype)
        row = max(1, len(batch.keys)) * dtype.itemsize
        working = engine.contrast_bytes(dtype) + (taken.pair_bytes if with_grad else 0)
        spare = max(1, len(batch.keys)) * working
        # Of a loss in both directions all logits are kept from the first pass to the second, if they fit.
        largest = CPU_CHUNK_ROWS if batch.queries.device.type == "cpu" else len(batch.queries)
        all_rows, some = len(batch.queries) * row, min(len(batch.queries), largest)
        whole = batch.columns > 0 and all_rows + some * spare <= budget
        self.student = _Logits(batch.queries, batch.keys, engine, taken, masked, whole)
        self._teacher, sides = None, 1
        if batch.target_queries is not None and batch.target_keys is not None:
            sides = 2
            targets = batch.target_queries, batch.target_keys
            self._teacher = _Logits(*targets, engine, taken, masked)
        fitting = some if whole else budget // (sides * row + spare)
        self._size = max(1, min(fitting, some))

    def __iter__(self) -> Iterator[slice]:
        """Slices of anchors."""
        anchors = len(self._batch.queries)
        for first in range(0, anchors, self._size):
            yield slice(first, min(first + self._size, anchors))

    def rows(self, part: slice) -> LogitRows:
        """The logits of a chunk, in buffers that the next one reuses."""
        batch, keep = self._batch, None
        if batch.pair_mask is not None:
            mask = batch.pair_mask.expand(len(batch.queries), len(batch.keys))
            keep = mask[part].contiguous()
        target = None if self._teacher is None else self._teacher.rows(part)
        values = self.student.rows(part)
        return LogitRows(values, self._form, batch.start + part.start, keep, target)

    def columns(self, weights: Tensor) -> tuple[ColumnSlopes, Tensor]:
        """The columns' slopes and, of those of these anchors, losses [A]."""
        batch = self._batch
        sums = ColumnSums.empty(batch.columns, batch.queries)
        for part in self:
            self._engine.contrast_columns(self.rows(part), sums)
        negatives, wide = sums.top + sums.total.log(), sums.total.dtype
        own = slice(batch.start, batch.start + len(weights))
        of_all = torch.zeros_like(sums.total)
        of_all[own] = weights.to(wide)
        positives = sums.positive
        if batch.group is not None:
            negatives = logsumexp_over_ranks(negatives, batch.group)
            of_all, positives = sum_over_ranks(torch.stack([of_all, positives]), batch.group)
        negatives = torch.where(negatives == torch.inf, torch.nan, negatives)
        margin = negatives - positives
        pull = of_all * margin.sigmoid()
        shift = torch.where(negatives == -torch.inf, 0, negatives).to(weights.dtype)
        factor = pull * torch.where(negatives == -torch.inf, 0, (shift - negatives).exp())
        slopes = ColumnSlopes(shift, factor.to(weights.dtype), -pull[own].to(weights.dtype))
        return slopes, softplus(margin[own]).to(weights.dtype)


class _Logits:
    """The logits of queries and keys, chunk by chunk, and what their slopes are worth in the features.

    Of factors a and b, and a bias c: z_ij = a_i b_j x_i · y_j + c_j.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        engine: Backend,
        taken: Products,
        masked: bool,
        whole: bool = False,
    ) -> None:
        """Takes features, which under a mask must not spread what is not finite in them."""
        self._engine, self._taken, self._whole = engine, taken, whole
        self._queries, self._keys = queries.contiguous(), keys.contiguous()
        self._poison = None
        if masked:
            self._queries, of_queries = engine.quarantine(self._queries)
            self._keys, of_keys = engine.quarantine(self._keys)
            self._poison = of_queries, of_keys
        columns = queries.shape[1]
        self._bias = self._keys[:, columns].contiguous() if keys.shape[1] > columns else None
        self._width = columns - 1 if taken.whole_parts else columns
        self._points = self._queries[:, : self._width], self._keys[:, : self._width]
        self._factors = None
        if taken.whole_parts:
            both = self._queries, self._keys
            self._factors = tuple(x[:, self._width].contiguous() for x in both)
        self._buffer: Tensor | None = None
        self._made = 0

    def rows(self, part: slice) -> Tensor:
        """[C, K], in a buffer that the next chunk reuses, unless it has room for the chunks of all."""
        if self._buffer is None:
            rows = len(self._queries) if self._whole else part.stop - part.start
            self._buffer = self._engine.empty_rows(rows, len(self._keys), self._queries)
        if self._whole:
            values = self._buffer[part]
            if part.stop <= self._made:  # a second pass
                return values
            self._made = part.stop
        else:
            values = self._buffer[: part.stop - part.start]
        points, keys = self._points
        self._taken.of_pairs(points[part], keys, values)
        self._multiply(part, values)
        if self._bias is not None:
            values.add_(self._bias)
        if self._poison is not None:
            of_queries, of_keys = self._poison
            values.addr_(of_queries[part], of_keys)
        return values

    @cached_property
    def _gradients(self) -> list[Tensor]:
        """In queries and in keys, so far."""
        return [torch.zeros_like(x) for x in (self._queries, self._keys)]

    def pull(self, part: slice, slopes: Tensor) -> None:
        """Takes a chunk's ∂L/∂z, which are overwritten."""
        (x, y), (to_queries, to_keys) = self._points, self._gradients
        if self._bias is not None:
            to_keys[:, -1] += slopes.sum(0)
        self._multiply(part, slopes)
        self._taken.add(to_queries[part, : self._width], slopes, y)
        self._taken.add(to_keys[:, : self._width], slopes.T, x[part])

    def gradients(self) -> list[Tensor]:
        """Of all chunks, in queries and in keys."""
        if self._factors is not None:  # a ∂L/∂a = x · ∂L/∂x
            for x, factor, to_x in zip(self._points, self._factors, self._gradients, strict=True):
                along = (x * to_x[:, : self._width]).sum(1)
                to_x[:, self._width] = torch.where(factor == 0, 0, along / factor)
        return self._gradients

    def _multiply(self, part: slice, pairs: Tensor) -> None:
        """Multiplies a chunk's pairs by their factors."""
        if self._factors is not None:
            of_queries, of_keys = self._factors
            pairs.mul_(of_queries[part, None]).mul_(of_keys)
