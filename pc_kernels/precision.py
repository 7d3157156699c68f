"""Float32 products in full float32, whatever the process has asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

EXACT = {"ieee", "none"}
"""Values of a switch under which products of float32 are exact to rounding."""

SWITCHES: dict[str, Any] = {
    name: getattr(torch.backends, name).matmul for name in ("mkldnn", "cuda")
}


class FullPrecision:
    """A context in which PyTorch's switches for products of float32 are at full precision.

    `torch.set_float32_matmul_precision`, from before there was a switch for each library, is turned with
    them: PyTorch raises where it reads what it set and finds that a switch contradicts.

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
        self._all_before: str | None = None

    def __enter__(self) -> None:
        """Turns the switches that are not at full precision."""
        with self._lock:
            self._inside += 1
            before, all_before = _settings(), _setting_of_all()
            if EXACT.issuperset(before.values()) and all_before in ("highest", None):
                return
            self._before |= {name: was for name, was in before.items() if was not in EXACT}
            if all_before not in ("highest", None):
                self._all_before = all_before
                torch.set_float32_matmul_precision("highest")
            _turn({name: "ieee" if was not in EXACT else was for name, was in before.items()})

    def __exit__(self, *error: object) -> None:
        """Turns them back, if nobody is inside any more and nobody else has."""
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and (self._before or self._all_before):
                self._restore()

    def _restore(self) -> None:
        now = _settings()
        if self._all_before is not None and _setting_of_all() == "highest":
            torch.set_float32_matmul_precision(self._all_before)
        _turn(
            {
                name: self._before.get(name, is_) if is_ == "ieee" else is_
                for name, is_ in now.items()
            }
        )
        self._before.clear()
        self._all_before = None

    def leave_all(self) -> None:
        """For a forked process: the threads that were inside are not there, nor who held the lock."""
        self._lock = threading.Lock()
        self._inside = 0
        self._restore()


def _settings() -> dict[str, str]:
    return {name: switch.fp32_precision for name, switch in SWITCHES.items()}


def _turn(settings: dict[str, str]) -> None:
    for name, value in settings.items():
        if SWITCHES[name].fp32_precision != value:
            SWITCHES[name].fp32_precision = value


def _setting_of_all() -> str | None:
    """What `torch.set_float32_matmul_precision` set, None where a switch contradicts it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


_full_precision = FullPrecision()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_full_precision.leave_all)


def exact_arithmetic(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off, and float32 products in full float32 whatever the global setting is."""
    return _no_autocast(device) if torch.is_autocast_enabled(device.type) else _full_precision


@contextmanager
def _no_autocast(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, enabled=False), _full_precision:
        yield
