"""One pass over chunks of anchors: the loss and its gradients together, the B×B matrices never stored.

Rows are independent and the loss is a sum over them, so a chunk of anchors goes through all stages
before the next one starts: dissimilarity -> rank -> loss -> gradient. Beside the inputs and the
gradients, only a chunk's rows live at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .backends import Backend
from .dissimilarity import Side
from .options import CoherenceOptions

CPU_CHUNK_BYTES = 256 << 20


def default_chunk_bytes(device: torch.device) -> int:
    """Working memory that a sweep allows itself: 256 MiB, on a GPU a quarter of what is free.

    What is free is not asked for while a CUDA graph is captured: only work for the GPU belongs there.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return CPU_CHUNK_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max((free + reusable) // 4, CPU_CHUNK_BYTES)


def chunk_anchors(
    backend: Backend, references: int, itemsize: int, chunk_bytes: int, students: int = 1
) -> int:
    """Anchors a chunk: as many as `chunk_bytes` holds, at least 1.

    An anchor takes a row of the teacher and of each student, and the backend's working memory. No more
    than `backend.chunk_rows` go into a chunk: past that, larger GEMMs gain nothing and caches lose.
    """
    row = references * ((1 + students) * itemsize + backend.working_bytes)
    return max(1, min(chunk_bytes // max(row, 1), backend.chunk_rows))


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Autocast off, and float32 products in full float32 whatever the global setting is."""
    with torch.autocast(device.type, enabled=False):
        switches: list[Any] = [getattr(torch.backends, name).matmul for name in ("mkldnn", "cuda")]
        before = [switch.fp32_precision for switch in switches]
        changed = [
            s for s, value in zip(switches, before, strict=True) if value not in ("ieee", "none")
        ]
        try:
            for switch in changed:
                switch.fp32_precision = "ieee"
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                if switch in changed:
                    switch.fp32_precision = value


def sweep(
    students: Sequence[Side],
    teacher: Side,
    weights: Tensor,
    options: CoherenceOptions,
    backend: Backend,
    *,
    chunk: int,
    self_start: int | None,
    pair_mask: Tensor | None,
    with_grad: bool,
) -> Tensor:
    """Losses [L, A] of L students of one teacher; with_grad, their sides then hold the gradients.

    `student.gradients()` are those of Σ_i weights[l, i] L_i.

    Args:
        students: the students' sides.
        teacher: the teacher's side; where there are several students, it is ranked once for all.
        weights: w [L, A], one for each student and anchor.
        options: relaxation, temperature, scale, penalty.
        backend: what computes the rows.
        chunk: anchors at a time.
        self_start: anchor i is reference self_start + i and left out; None: it is none of them.
        pair_mask: bool [A, M], expanded or not; where it is False the reference is absent.
        with_grad: whether the gradients are wanted.
    """
    anchors = weights.shape[1]
    losses = torch.empty_like(weights)
    for start in range(0, anchors, chunk):
        stop = min(start + chunk, anchors)
        own = None if self_start is None else self_start + start
        keep = None if pair_mask is None else pair_mask[start:stop].contiguous()
        target = teacher.rows(start, stop)
        if len(students) > 1:
            target = backend.hard_rank_rows(target, own, keep)
        for student, w, loss in zip(students, weights, losses, strict=True):
            rows = student.rows(start, stop)
            loss[start:stop] = backend.coherence_rows(
                rows, target, w[start:stop], _in_units(options, student), own, keep, with_grad
            )
            if with_grad:
                student.accumulate(start, stop, rows.values)
    return losses


def _in_units(options: CoherenceOptions, student: Side) -> CoherenceOptions:
    """The options with a temperature in units of the dissimilarities that the side's rows hold."""
    if options.scale is not None or student.unit == 1.0:
        return options
    return replace(options, temperature=options.temperature / student.unit)
