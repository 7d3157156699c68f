"""How many kernels a step launches on a GPU, counted without one: tensors without data go its way.

A launch costs some 5 µs of the host, which is what a batch of a few hundred is bound by.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pc_kernels import sweep
from pc_kernels.backends.base import FusedBackend
from pc_kernels.dissimilarities.row_maker import NearOrigin
from pc_kernels.dissimilarities.rows import Chunk
from pc_kernels.losses import function
from pc_kernels.losses.function import PerceptionCoherenceFunction, Task
from pc_kernels.products import IN_FLOAT32, Products
from pc_kernels.recipe import Recipe

FREE = {"view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "detach", "alias"}
FREE |= {
    "unsqueeze",
    "permute",
    "as_strided",
    "split",
    "unbind",
    "empty",
    "empty_like",
    "new_empty",
}
FREE |= {"diagonal", "reshape", "squeeze"}
"""Operators that launch nothing."""


class Launches(TorchDispatchMode):
    """Counts what operators launch, one kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        empty = isinstance(result, Tensor) and result.numel() == 0
        if op.overloadpacket.__name__ not in FREE and not empty:
            self.count += 1
        return result


class Stub(FusedBackend):
    """The launches of the `triton` backend, which has kernels for rows and for what precedes products."""

    name = "stub"

    def __init__(self, launches: Launches) -> None:
        self.launches = launches

    def near_origin(self, points: list[Tensor], products: Products = IN_FLOAT32) -> NearOrigin:
        self.launches.count += 2 + len(points)
        moved, squares = [x.clone() for x in points], [x.new_empty(len(x)) for x in points]
        self.launches.count -= len(points)  # the copies
        return NearOrigin(moved, squares, squares[0], torch.empty(2, 0), 1.0)

    def fused_rows(self, chunk: Chunk, recipe: Recipe, with_grad: bool) -> Tensor:
        self.launches.count += 2
        return torch.empty_like(chunk.weights)


def launches_of(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masked: bool, **options: Any
) -> int:
    counted = Launches()
    monkeypatch.setattr(sweep, "select", lambda *arguments: Stub(counted))
    monkeypatch.setattr(sweep, "exact_arithmetic", lambda device: contextlib.nullcontext())
    monkeypatch.setattr("pc_kernels.losses.function.run", sweep.sweep)
    student, teacher = (torch.empty(256, n, dtype=dtype, device="meta") for n in (128, 512))
    keep = torch.empty(256, 256, dtype=torch.bool, device="meta") if masked else None
    context = SimpleNamespace(needs_input_grad=(True,) + (False,) * 6)
    context.save_for_backward = lambda *saved: setattr(context, "saved_tensors", saved)
    task = Task(Recipe(**options))
    with counted, torch.no_grad():
        loss = PerceptionCoherenceFunction.forward(
            context, student, teacher, None, None, None, keep, task
        )
        PerceptionCoherenceFunction.backward(context, loss)
    return counted.count


@pytest.mark.parametrize(
    ("most", "dtype", "masked", "options"),
    [
        (19, torch.float32, False, {}),
        (22, torch.bfloat16, False, {}),  # and both sides' features in float32, the gradient back
        (29, torch.float32, False, {"reduction": "none"}),
        (61, torch.float32, True, {}),
        (80, torch.float32, False, {"dissimilarity": "cosine"}),
    ],
)
def test_launches_of_a_step(
    most: int,
    dtype: torch.dtype,
    masked: bool,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and backward in one chunk, at B = 256."""
    assert launches_of(monkeypatch, dtype, masked, **options) <= most
    assert function.run is sweep.sweep  # the one that was counted
