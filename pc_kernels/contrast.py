"""The contrastive loss in passes over chunks of anchors: the logits are never stored as a whole.

A chunk of anchors goes through product -> log-sum-exp -> loss -> slope -> gradient before the next one
starts; beside the inputs and the gradients, only its logits live. Of a loss in both directions a first
pass has the log-sum-exps of the columns. Its products are made again in the second, unless they all fit
into `chunk_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import BACKENDS, Backend, select
from .backends.contrast_rows import FORMS, ColumnSlopes, ColumnSums, LogitRows, softplus
from .checks import check_matrix, check_same_device, check_weighting, one_of
from .dissimilarities.others import quarantine
from .precision import exact_arithmetic
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


@dataclass(frozen=True)
class Candidates:
    """A anchors and the keys among which each has to find its own."""

    queries: Tensor
    """[A, D], times what makes logits of inner products."""
    keys: Tensor
    """[K, D]."""
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

    def check(self, form: str) -> None:
        """Raises TypeError or ValueError unless the kernels can be given this, from whoever it is."""
        one_of("form", form, tuple(FORMS))
        check_pair("queries", self.queries, "keys", self.keys)
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
        chunks = _Chunks(batch, recipe, engine)
        weights = batch.weights.contiguous()
        losses = torch.empty_like(weights)
        if batch.columns:
            weights = weights / 2
            slopes, column_losses = chunks.columns(weights)
        queries, keys = chunks.queries, chunks.keys
        to_queries = torch.empty_like(queries) if with_grad else queries
        to_keys = torch.zeros_like(keys) if with_grad else keys
        for part in chunks:
            rows = chunks.rows(part)
            if batch.columns:
                rows = rows._replace(columns=slopes._replace(own=slopes.own[part]))
            losses[part] = engine.contrast_rows(rows, weights[part], with_grad)
            if with_grad:
                torch.mm(rows.values, keys, out=to_queries[part])
                to_keys.addmm_(rows.values.T, queries[part])
        if batch.columns:
            losses = (losses + column_losses) / 2
        return losses, [to_queries, to_keys] if with_grad else []


class _Chunks:
    """The chunks of anchors, slices, and their logits."""

    def __init__(self, batch: Candidates, recipe: Contrast, engine: Backend) -> None:
        """Takes what to compute."""
        self._batch, self._form, self._engine = batch, recipe.form, engine
        budget = recipe.chunk_bytes
        if budget is None:
            budget = default_chunk_bytes(batch.queries.device)
        dtype, masked = batch.queries.dtype, batch.pair_mask is not None
        row = max(1, len(batch.keys)) * dtype.itemsize
        spare = max(1, len(batch.keys)) * engine.contrast_bytes(dtype)
        # Of a loss in both directions all logits are kept from the first pass to the second, if they fit.
        largest = CPU_CHUNK_ROWS if batch.queries.device.type == "cpu" else len(batch.queries)
        all_rows, some = len(batch.queries) * row, min(len(batch.queries), largest)
        whole = batch.columns > 0 and all_rows + some * spare <= budget
        self._student = _Products(batch.queries, batch.keys, engine, masked, whole)
        self._teacher, sides = None, 1
        if batch.target_queries is not None and batch.target_keys is not None:
            sides = 2
            self._teacher = _Products(batch.target_queries, batch.target_keys, engine, masked)
        self.queries, self.keys = self._student.queries, self._student.keys
        fitting = some if whole else budget // (sides * row + spare)
        self._size = max(1, min(fitting, some))

    def __iter__(self) -> Iterator[slice]:
        """Slices of anchors."""
        anchors = len(self.queries)
        for first in range(0, anchors, self._size):
            yield slice(first, min(first + self._size, anchors))

    def rows(self, part: slice) -> LogitRows:
        """The logits of a chunk, in buffers that the next one reuses."""
        batch, keep = self._batch, None
        if batch.pair_mask is not None:
            mask = batch.pair_mask.expand(len(self.queries), len(self.keys))
            keep = mask[part].contiguous()
        target = None if self._teacher is None else self._teacher.rows(part)
        values = self._student.rows(part)
        return LogitRows(values, self._form, batch.start + part.start, keep, target)

    def columns(self, weights: Tensor) -> tuple[ColumnSlopes, Tensor]:
        """The columns' slopes and, of those of these anchors, losses [A]."""
        batch = self._batch
        sums = ColumnSums.empty(batch.columns, self.queries)
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


class _Products:
    """The inner products of queries and keys, chunk by chunk."""

    def __init__(
        self, queries: Tensor, keys: Tensor, engine: Backend, masked: bool, whole: bool = False
    ) -> None:
        """Takes features, which under a mask must not spread what is not finite in them."""
        self._whole = whole
        self.queries, self.keys = queries.contiguous(), keys.contiguous()
        self._poison = None
        if masked:
            self.queries, of_queries = quarantine(self.queries)
            self.keys, of_keys = quarantine(self.keys)
            self._poison = of_queries, of_keys
        self._engine = engine
        self._buffer: Tensor | None = None
        self._made = 0

    def rows(self, part: slice) -> Tensor:
        """[C, K], in a buffer that the next chunk reuses, unless it has room for the chunks of all."""
        if self._buffer is None:
            rows = len(self.queries) if self._whole else part.stop - part.start
            self._buffer = self._engine.empty_rows(rows, len(self.keys), self.queries)
        if self._whole:
            values = self._buffer[part]
            if part.stop <= self._made:  # a second pass
                return values
            self._made = part.stop
        else:
            values = self._buffer[: part.stop - part.start]
        torch.mm(self.queries[part], self.keys.T, out=values)
        if self._poison is not None:
            of_queries, of_keys = self._poison
            values.add_(of_queries[part, None]).add_(of_keys)
        return values
