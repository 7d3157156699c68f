"""Float32 products in full float32, whatever the process has asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

EXACT = ("ieee", "none")
"""Values of a switch under which products of float32 are exact to rounding."""


class FullPrecision:
    """A context in which PyTorch's switches for products of float32 are at full precision.

    The switches are global to the process. So contexts of several threads count as one: the first to
    enter turns the switches, the last to leave turns them back. In between, other threads have full
    precision as well. A thread that turns a switch meanwhile, outside of the contexts, may spoil what
    is computed inside, but its choice stays.
    """

    def __init__(self) -> None:
        """Nobody is inside."""
        self._lock = threading.Lock()
        self._inside = 0
        self._before: dict[str, str] = {}

    def __enter__(self) -> None:
        """Turns the switches that are not at full precision."""
        with self._lock:
            self._inside += 1
            for name in ("mkldnn", "cuda"):
                switch = _switch(name)
                if switch.fp32_precision not in EXACT:
                    self._before[name] = switch.fp32_precision
                    switch.fp32_precision = "ieee"

    def __exit__(self, *error: object) -> None:
        """Turns them back, if nobody is inside any more and nobody else has."""
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore()

    def _restore(self) -> None:
        for name, value in self._before.items():
            if _switch(name).fp32_precision == "ieee":
                _switch(name).fp32_precision = value
        self._before.clear()

    def leave_all(self) -> None:
        """For a forked process: the threads that were inside are not there, nor who held the lock."""
        self._lock = threading.Lock()
        self._inside = 0
        self._restore()


def _switch(name: str) -> Any:
    return getattr(torch.backends, name).matmul


_full_precision = FullPrecision()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_full_precision.leave_all)


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Autocast off, and float32 products in full float32 whatever the global setting is."""
    with torch.autocast(device.type, enabled=False), _full_precision:
        yield
