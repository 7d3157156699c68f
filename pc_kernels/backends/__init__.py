"""The backends: what each needs, and the stages as it computes them.

A backend is its stages: `dissimilarity` of a chunk's rows; `hard_rank`, `soft_rank` and
`soft_rank_backward` of matrices of rows; and `coherence_rows`, the whole chain dissimilarity -> rank ->
loss -> gradient of a chunk. chain.py is that chain for every backend and every loss; the compiled
backends fuse it for the losses that they know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..installation import warn_of_fallback
from .base import Backend
from .compiled import (
    CompiledBackend,
    CpuBackend,
    CudaBackend,
    cuda_extension_obstacle,
    extension_obstacle,
)
from .plain import ReferenceBackend, TorchBackend
from .triton import TritonBackend, triton_obstacle

__all__ = [
    "BACKENDS",
    "Backend",
    "CompiledBackend",
    "CpuBackend",
    "CudaBackend",
    "ReferenceBackend",
    "TorchBackend",
    "TritonBackend",
    "check_usable",
    "cuda_extension_obstacle",
    "extension_obstacle",
    "fastest",
    "select",
    "triton_obstacle",
]

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        CudaBackend(),
        CpuBackend(),
        TritonBackend(),
        TorchBackend(),
        ReferenceBackend(),
    )
}
"""By name, in the order in which `auto` tries them; `reference` is never picked for speed."""


def fastest(device: torch.device, dtype: torch.dtype) -> Backend:
    """What "auto" takes: the first that is usable."""
    candidates = (b for b in BACKENDS.values() if b.serves(device))
    return next(b for b in candidates if b.obstacle(device, dtype) is None)


def select(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called `name`, or for "auto" the first that is usable.

    "auto" warns, once, where it computes in plain PyTorch for want of compiled kernels.

    Raises:
        ValueError: no backend has this name, or the one that has cannot be used, and why.
    """
    if name == "auto":
        chosen = fastest(device, dtype)
        compiled = BACKENDS.get(device.type)  # those have the names of their devices
        slow = chosen.name == "torch" and dtype == torch.float32
        if compiled is not None and slow and not torch.compiler.is_compiling():
            warn_of_fallback(device.type, str(compiled.obstacle(device, dtype)))
        return chosen
    if name not in BACKENDS:
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend must be one of {names}; got {name!r}")
    reason = BACKENDS[name].obstacle(device, dtype)
    if reason is not None:
        raise ValueError(f"backend {name!r} is not usable here: {reason}")
    return BACKENDS[name]


def check_usable(name: str, first: Tensor, *others: Tensor | None) -> None:
    """Raises ValueError if the backend called `name` cannot compute on these tensors, and why."""
    if name != "auto":
        select(name, first.device, compute_dtype(first, *others))
