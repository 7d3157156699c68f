"""Memory for a chunk's rows on the CPU, kept from one call to the next.

Fresh memory costs a page fault every 4 KiB when it is first touched, a tenth of a call at a batch of
1024; and allocators give blocks as large as these back to the system as soon as they are freed.
"""

from __future__ import annotations

from torch import Tensor

KEPT_BYTES = 32 << 20
"""Of all that is kept together: what a batch of 4096 takes."""

_kept: list[Tensor] = []  # pop and append are atomic: threads share it


def take(rows: int, columns: int, like: Tensor) -> Tensor:
    """A matrix [rows, columns] of anything, of the dtype and on the device of `like`."""
    size = rows * columns
    while like.device.type == "cpu" and _kept:
        try:
            memory = _kept.pop()
        except IndexError:  # another thread was faster
            break
        if memory.dtype == like.dtype and memory.numel() >= size:
            return memory[:size].view(rows, columns)
    return like.new_empty(size).view(rows, columns)


def give_back(matrix: Tensor) -> None:
    """Keeps the memory of a matrix from `take`, which nobody may use any more, for another call."""
    if matrix.device.type != "cpu" or matrix.is_inference():
        return
    whole = matrix.new_empty(0).set_(matrix.untyped_storage())
    if sum(memory.nbytes for memory in _kept) + whole.nbytes <= KEPT_BYTES:
        _kept.append(whole)
