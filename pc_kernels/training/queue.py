"""A memory bank: the features of the last batches, as references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..checks import FLOATS, check_features
from ..installation import warn_once
from .distributed import GroupOrWorld, SharesGroup, gather_batch, live_group

NEVER_FILLED = (
    "pc_kernels: the FeatureQueue is read again and still empty, so the loss is 0 and teaches nothing: "
    "call queue.enqueue(student, teacher) after each backward"
)


class FeatureQueue(SharesGroup):
    """The last `size` rows of student and teacher features, first in, first out.

    It unpacks into the references of a loss. They get no gradient: they are what the networks said
    some steps ago.

    Example:
        >>> queue = pc_kernels.FeatureQueue(65536, student_width=128, teacher_width=512)
        >>> loss = loss_fn(student, teacher, *queue)    # nothing in it yet: 0
        >>> loss.backward()
        >>> queue.enqueue(student, teacher)

    The rows are buffers: they follow `.to(device)` and are part of the `state_dict`. Enqueue after the
    backward: it overwrites what the graph of a loss may still refer to.
    """

    student: Tensor
    teacher: Tensor

    def __init__(
        self,
        size: int,
        student_width: int,
        teacher_width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        process_group: GroupOrWorld | None = None,
    ) -> None:
        """Makes an empty queue.

        Args:
            size: rows it holds.
            student_width: Ds.
            teacher_width: Dt.
            dtype: of the rows, whatever that of the features; float32 holds those of autocast exactly.
            device: where the rows live.
            process_group: ranks that fill one queue together: `enqueue` takes the rows of all of them, in
                the order of ranks, so that every rank holds the same queue.

        Raises:
            TypeError, ValueError: an argument is not what is said here.
        """
        super().__init__()
        given = {"size": size, "student_width": student_width, "teacher_width": teacher_width}
        for argument, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{argument} must be an int; got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{argument} must be at least 1; got {value}")
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be a floating-point one; got {dtype}")
        self.size = size
        self.process_group = process_group
        self.register_buffer(
            "student", torch.zeros(size, student_width, dtype=dtype, device=device)
        )
        self.register_buffer(
            "teacher", torch.zeros(size, teacher_width, dtype=dtype, device=device)
        )
        self._filled = 0
        self._next = 0
        self._asked = False  # for rows, while there were none

    def __len__(self) -> int:
        """Rows that are in it."""
        return self._filled

    def __iter__(self) -> Iterator[Tensor]:
        """The rows of the student [M, Ds] and of the teacher [M, Dt], M = len(self).

        Warns, once a process, where it is asked for rows again and has never got any.
        """
        if self._filled == 0:
            if self._asked:
                warn_once("queue", NEVER_FILLED)
            self._asked = True
        return iter((self.student[: self._filled], self.teacher[: self._filled]))

    @torch.no_grad()
    def enqueue(self, student: Tensor, teacher: Tensor) -> None:
        """Adds features [B, Ds] and [B, Dt]; the oldest rows leave. Of more than `size`, the last stay.

        Call it outside of what is compiled by torch.compile: its place in the queue is a Python number.

        Raises:
            TypeError, ValueError: the features do not fit the queue (with a group: on every rank).
        """

        def check() -> dict[str, int]:
            check_features(student, teacher, None, None)
            for name, x in (("student", student), ("teacher", teacher)):
                rows = getattr(self, name)
                if x.shape[1] != rows.shape[1]:
                    raise ValueError(
                        f"{name} has width {x.shape[1]}; the queue holds width {rows.shape[1]}"
                    )
                if x.device != rows.device:
                    raise ValueError(f"{name} is on {x.device}; the queue is on {rows.device}")
            return {"size": self.size}

        group = live_group(self.process_group)
        if group is None:
            check()
        else:
            joint = gather_batch(student, teacher, None, check, group)
            assert joint.teacher is not None
            student, teacher = joint.student, joint.teacher
        student, teacher = student[-self.size :], teacher[-self.size :]
        count = student.shape[0]
        until_end = min(count, self.size - self._next)
        for rows, x in ((self.student, student), (self.teacher, teacher)):
            if x.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr():
                x = x.clone()  # rows of the queue itself would be overwritten as they are read
            rows[self._next : self._next + until_end] = x[:until_end]
            rows[: count - until_end] = x[until_end:]
        self._next = (self._next + count) % self.size
        self._filled = min(self._filled + count, self.size)

    def get_extra_state(self) -> dict[str, int]:
        """How full the queue is, for the `state_dict`."""
        return {"filled": self._filled, "next": self._next}

    def set_extra_state(self, state: Any) -> None:
        """Takes it back."""
        self._filled, self._next = state["filled"], state["next"]

    def extra_repr(self) -> str:
        """Size and widths, for printing."""
        widths = f"student_width={self.student.shape[1]}, teacher_width={self.teacher.shape[1]}"
        return f"size={self.size}, {widths}, filled={self._filled}"
