"""What a step asks of the host: the kernels it launches, and the time until they are all launched.

A launch costs some 5 µs of the host, which is what a batch of a few hundred is bound by. On a GPU both
are measured; on a CPU the operators are counted that PyTorch's dispatcher sees, and a GPU's step is
counted by sending tensors without data its way.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from pc_kernels import sweep
from pc_kernels.backends.compiled import CudaBackend
from pc_kernels.dissimilarities.rows import Chunk
from pc_kernels.losses import function
from pc_kernels.losses.function import PerceptionCoherenceFunction, Task
from pc_kernels.recipe import Recipe

FREE = {"view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "detach", "alias"}
FREE |= {"unsqueeze", "squeeze", "permute", "as_strided", "split", "unbind", "diagonal", "reshape"}
FREE |= {"empty", "empty_like", "new_empty"}
"""Operators that launch nothing."""

HOST_RUNS = 21


class Asked(NamedTuple):
    """What a call asks of the host."""

    launches: int
    """Kernels on a GPU, operators on a CPU."""
    host_seconds: float | None
    """Until the call returns, the GPU still at work; None on a CPU, where that is its time."""


class Launches(TorchDispatchMode):
    """Counts what operators launch, one kernel each."""

    def __init__(self) -> None:
        """Starts at 0."""
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Sees every operator below autograd."""
        result = op(*args, **(kwargs or {}))
        empty = isinstance(result, Tensor) and result.numel() == 0
        if op.overloadpacket.__name__ not in FREE and not empty:
            self.count += 1
        return result


def asked_by(call: Callable[[], object], device: torch.device) -> Asked:
    """Of one call that has been warmed up."""
    if device.type != "cuda":
        with Launches() as counted:
            call()
        return Asked(counted.count, None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize(device)
    kernels = sum(event.device_type == DeviceType.CUDA for event in seen.events())
    times = []
    for _ in range(HOST_RUNS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return Asked(kernels, statistics.median(times))


OF_OPERATORS = {"near_origin": 2, "quarantine": 1, "scaled": 1, "scaled_backward": 1}
OF_OPERATORS |= {"pull_": 1, "coherence_rows": 1}
"""Launches of the `cuda` backend's operators, to which tests/test_points_cuda.py holds them."""


class CudaStub(CudaBackend):
    """The launches of the `cuda` backend, whose operators are counted instead of run."""

    def __init__(self, launches: Launches) -> None:
        """Adds to these."""
        self.launches = launches

    def operator(self, stage: str) -> Callable[..., Any]:
        """What returns results without data."""

        def counted(*arguments: Any) -> Any:
            self.launches.count += OF_OPERATORS[stage]
            first = arguments[0]
            if stage == "near_origin":
                squares = [x.new_empty(len(x)) for x in first]
                twins = first[-1].new_empty(len(first[-1]) + 1, dtype=torch.int32)
                return (
                    [torch.empty_like(x) for x in first],
                    squares,
                    squares[0],
                    twins,
                    squares[0][:1],
                )
            if stage == "coherence_rows":
                return torch.empty_like(arguments[6])
            return (
                None if stage == "pull_" else (torch.empty_like(first), first.new_empty(len(first)))
            )

        return counted


class TritonStub(CudaStub):
    """The launches of the `triton` backend: the same kernels on points, and two of rows."""

    def fused_rows(self, chunk: Chunk, recipe: Recipe, with_grad: bool) -> Tensor:
        """The ranks, and the rest."""
        self.launches.count += 2
        return torch.empty_like(chunk.weights)


STUBS = {"triton": TritonStub, "cuda": CudaStub}


def of_a_gpu_step(
    backend: str, dtype: torch.dtype = torch.float32, masked: bool = False, **options: Any
) -> int:
    """Kernels of forward and backward at B = 256, in one chunk, with options of the loss."""
    student, teacher = (torch.empty(256, n, dtype=dtype, device="meta") for n in (128, 512))
    keep = torch.empty(256, 256, dtype=torch.bool, device="meta") if masked else None
    context: Any = SimpleNamespace(needs_input_grad=(True,) + (False,) * 6)
    context.save_for_backward = lambda *saved: setattr(context, "saved_tensors", saved)
    inputs = student, teacher, None, None, None, keep, Task(Recipe(**options))
    counted = Launches()
    with (
        mock.patch.object(sweep, "select", lambda *arguments: STUBS[backend](counted)),
        mock.patch.object(sweep, "exact_arithmetic", lambda device: contextlib.nullcontext()),
        mock.patch.object(function, "run", sweep.sweep),
        torch.no_grad(),
        counted,
    ):
        loss = PerceptionCoherenceFunction.forward(context, *inputs)
        PerceptionCoherenceFunction.backward(context, loss)
    return counted.count


GPU_STEPS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    'reduction="none"': {"reduction": "none"},
    "masked": {"masked": True},
    "cosine": {"dissimilarity": "cosine"},
}
