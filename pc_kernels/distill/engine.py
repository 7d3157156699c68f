"""Where a training loop runs: Hugging Face Accelerate, or without it this process alone.

`Alone` has those names of `accelerate.Accelerator` that the trainer uses, so that nothing else differs:
an engine is either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pc_kernels.training.distributed import gather_batch, live_group

# float16 needs a scaled loss, whose scale no checkpoint here would hold.
PRECISIONS = ("no", "bf16")


class Alone:
    """One process on one device, in float32."""

    is_main_process, num_processes, process_index = True, 1, 0

    def __init__(self, device: str) -> None:
        """`device`: of everything."""
        self.device = torch.device(device)

    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        """Modules and optimizers as they are."""
        return objects

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss."""
        loss.backward()

    def wait_for_everyone(self) -> None:
        """There is nobody else."""

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """This one is it."""
        yield

    def free_memory(self) -> None:
        """Nothing is kept."""


def make_engine(device: str, mixed_precision: str = "no") -> Any:
    """An `accelerate.Accelerator` where that package is installed, else `Alone`.

    Args:
        device: `cpu`, `cuda` or one by number; launched as several processes, each takes its own GPU.
        mixed_precision: `no`, or `bf16`: autocast of the networks, not of the losses.

    Raises:
        ValueError: bf16 without Accelerate.
    """
    if find_spec("accelerate") is None:
        if mixed_precision != "no":
            raise ValueError(
                f"mixed_precision: got {mixed_precision!r}; allowed without the package accelerate "
                "(pip install pc_kernels[train]): no"
            )
        return Alone(device)
    from accelerate import Accelerator

    if ":" in device:
        torch.cuda.set_device(device)  # "the current one" is what an Accelerator takes, alone
    return Accelerator(mixed_precision=mixed_precision, cpu=device == "cpu")


def share(rows: Tensor, engine: Any) -> Tensor:
    """This process's part of a joint batch [B, ...], of equally many rows each."""
    return rows.chunk(engine.num_processes)[engine.process_index]


def joined(rows: Tensor, engine: Any) -> Tensor:
    """The joint batch [B, ...] of all processes' parts; gradients go back to where rows came from."""
    group = live_group("world" if engine.num_processes > 1 else None)
    if group is None:
        return rows
    whole = gather_batch(rows.flatten(1), None, None, dict, group).student
    return whole.unflatten(1, rows.shape[1:])
