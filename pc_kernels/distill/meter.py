"""The peak of memory over a stretch of work: a GPU's as PyTorch counts it, a CPU's as Linux does."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
MIB = 2**20


class PeakMemory:
    """Measures how far the memory in use rises above where it was.

    Example:
        >>> with PeakMemory("cpu") as memory:
        ...     work()
        >>> memory.mib    # None where the system does not say

    On a CPU it is the resident memory of the process, to a few MiB: what the allocator had already
    taken and freed is not counted.
    """

    def __init__(self, device: str) -> None:
        """`device`: whose memory."""
        self.cuda = device.startswith("cuda")
        self.device = device
        self.mib: float | None = None

    def __enter__(self) -> PeakMemory:
        """Forgets peaks before."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start: float | None = torch.cuda.memory_allocated(self.device) / MIB
            return self
        try:
            RESET.write_text("5")  # Linux: the peak becomes what is resident now
            self.start = _resident("VmHWM")
        except OSError:
            self.start = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Takes the peak since."""
        if self.cuda:
            end: float | None = torch.cuda.max_memory_allocated(self.device) / MIB
        else:
            end = None if self.start is None else _resident("VmHWM")
        self.mib = None if self.start is None or end is None else end - self.start


def _resident(what: str) -> float | None:
    """A line of the process's status, in MiB."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    return None
