"""One pass over chunks of anchors: the loss and its gradients together, the B×B matrices never stored.

Rows are independent and the loss is a sum over them, so a chunk of anchors goes through all stages
before the next one starts: dissimilarity -> rank -> loss -> gradient. Beside the inputs and the
gradients, only a chunk's rows live at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .backends import Backend, select
from .checks import compute_dtype
from .dissimilarities import Chunk, GivenSide, Pairs, Points, Side, make_side
from .dissimilarities.rows import block_rows
from .precision import exact_arithmetic
from .recipe import Recipe

CPU_CHUNK_BYTES = 256 << 20
CUDA_CHUNK_BYTES = 2 << 30


def default_chunk_bytes(device: torch.device) -> int:
    """Working memory that a sweep allows itself: 256 MiB, on a GPU 2 GiB or an eighth of what it has.

    That is the same from call to call, captured in a CUDA graph or not: chunks of another size sum in
    another order, and what is free must not decide a result's bits.
    """
    if device.type != "cuda":
        return CPU_CHUNK_BYTES
    return min(torch.cuda.get_device_properties(device).total_memory // 8, CUDA_CHUNK_BYTES)


@dataclass(frozen=True)
class Batch:
    """What the networks say of A anchors, and which pairs count."""

    students: Sequence[Tensor]
    """L students' features [A, Ds], their widths may differ; or `given`, dissimilarities [A, M]."""
    teacher: Tensor
    """[A, Dt]; or dissimilarities [A, M]."""
    student_refs: Tensor | None
    """[M, Ds], of a single student; None: the anchors themselves."""
    teacher_refs: Tensor | None
    """[M, Dt]."""
    weights: Tensor
    """[L, A], one for each student and anchor."""
    pair_mask: Tensor | None
    """bool, broadcast to [A, M]; where it is False the reference is absent."""
    self_start: int | None
    """Anchor i is reference self_start + i, and left out; None: it is none of them."""
    given: bool
    """Whether students and teacher are dissimilarities already."""

    @property
    def references(self) -> int:
        """M."""
        if self.given:
            return self.teacher.shape[1]
        return len(self.teacher if self.teacher_refs is None else self.teacher_refs)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return compute_dtype(*self.students, self.teacher, self.student_refs, self.teacher_refs)

    def sides(self, recipe: Recipe, engine: Backend, with_grad: bool) -> tuple[list[Side], Side]:
        """The students' sides and the teacher's."""
        if self.given:
            students = [GivenSide(d.to(self.dtype), with_grad) for d in self.students]
            return list(students), GivenSide(self.teacher.to(self.dtype), False)
        masked = self.pair_mask is not None
        way = recipe.products
        points = [Points.of(s, self.student_refs, self.dtype, way) for s in self.students]
        of_teacher = Points.of(self.teacher, self.teacher_refs, self.dtype, way)
        return (
            [
                make_side(recipe.dissimilarity, p, with_grad=with_grad, masked=masked, maker=engine)
                for p in points
            ],
            make_side(recipe.ranked_by, of_teacher, with_grad=False, masked=masked, maker=engine),
        )

    def pairs(self, start: int, stop: int) -> Pairs:
        """Those of anchors start … stop−1."""
        own = None if self.self_start is None else self.self_start + start
        if self.pair_mask is None:
            return Pairs(own)
        mask = self.pair_mask.expand(len(self.teacher), self.references)
        return Pairs(own, mask[start:stop].contiguous())


def chunk_anchors(
    batch: Batch, recipe: Recipe, engine: Backend, sides: Sequence[Side], with_grad: bool
) -> int:
    """Anchors a chunk: as many as the recipe's `chunk_bytes` holds, at least 1.

    An anchor takes a row of each side, and the working memory of the backend and of a side; that of the
    backend for a block of rows only, where it goes by blocks. No more than `engine.chunk_rows` go into a
    chunk: past that, larger products gain nothing and caches lose. But a batch that is its own reference
    goes in one chunk if all of `chunk_bytes` suffices, or, where that is not given, `engine.whole_bytes`:
    its products are then symmetric, and half of some suffices. Else chunks are whole multiples of 16
    anchors, if so many fit: each is aligned in memory as the first is, and no kernel is compiled again
    for a later one.
    """
    device, references = batch.teacher.device, batch.references
    if recipe.chunk_bytes is not None:
        budget = whole_bytes = recipe.chunk_bytes
    else:
        budget = default_chunk_bytes(device)
        whole_bytes = engine.whole_bytes or budget
    of_sides = max(side.pair_bytes(with_grad) for side in sides)
    row = references * (len(sides) * batch.dtype.itemsize + of_sides)
    working = references * engine.working_bytes_of(recipe)
    mirror = min(working, references * batch.dtype.itemsize)  # V + Vᵀ
    block = block_rows(references, device)
    most = min(side.most_pairs for side in sides) // max(references, 1)

    def fitting(budget: int) -> int:
        """Rows, all with working memory, or only a block of them at a time."""
        at_once = budget // max(row + working, 1)
        by_blocks = (budget - min(block, budget) * working) // max(row + mirror, 1)
        return min(max(at_once, by_blocks), most)

    whole = references <= fitting(whole_bytes)
    if whole and batch.teacher_refs is None and not batch.given:
        return max(1, references)
    chunk = max(1, min(fitting(budget), engine.chunk_rows))
    return chunk - chunk % 16 if chunk > 16 else chunk


def sweep(batch: Batch, recipe: Recipe, with_grad: bool) -> tuple[Tensor, list[Tensor]]:
    """Losses [L, A], and with_grad the gradients of Σ_l Σ_i weights[l, i] L_i.

    These come in the compute dtype: casting them is the last thing a backward does. One for each
    student, and after them that of student_refs if there are any; without with_grad, none.
    """
    device = batch.teacher.device
    engine = select(recipe.backend, device, batch.dtype)
    with torch.no_grad(), exact_arithmetic(device):
        at_once = engine.sweep_at_once(batch, recipe, with_grad)
        if at_once is not None:
            return at_once
        students, teacher = batch.sides(recipe, engine, with_grad)
        weights = batch.weights.to(batch.dtype).contiguous()
        losses = torch.empty_like(weights)
        recipes = [_in_units(recipe, student) for student in students]
        anchors = len(batch.teacher)
        chunk = chunk_anchors(batch, recipe, engine, [*students, teacher], with_grad)
        for start in range(0, anchors, chunk):
            stop = min(start + chunk, anchors)
            pairs = batch.pairs(start, stop)
            target = teacher.rows(start, stop)
            if len(students) > 1:  # ranked once for all
                target = engine.hard_rank_rows(target, pairs)
            for k, (side, own) in enumerate(zip(students, recipes, strict=True)):
                rows = Chunk(side.rows(start, stop), target, weights[k, start:stop], pairs)
                found = engine.coherence_rows(rows, own, with_grad)
                if found.shape == weights.shape[1:] and len(students) == 1:  # all there is: no copy
                    losses = found[None]
                else:
                    losses[k, start:stop] = found
                if with_grad:
                    side.accumulate(start, stop, rows.student.values)
        return losses, _gradients(students) if with_grad else []


def _gradients(students: list[Side]) -> list[Tensor]:
    found = [side.gradients() for side in students]
    of_references = [refs for _, refs in found if refs is not None]
    return [grad for grad, _ in found] + of_references


def _in_units(recipe: Recipe, student: Side) -> Recipe:
    """The recipe with a temperature in units of the dissimilarities that the side's rows hold.

    What only the device knows, its kernels do.
    """
    if recipe.scale is not None or isinstance(student.unit, Tensor) or student.unit == 1.0:
        return recipe
    return replace(recipe, temperature=recipe.temperature / student.unit**student.power)
