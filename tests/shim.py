"""csrc/cuda on the CPU: the CUDA kernels, compiled as C++ against tests/cuda_shim, as a backend."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from ctypes import c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pc_kernels.backends import Backend
from pc_kernels.dissimilarity import Rows
from pc_kernels.options import PENALTIES, RELAXATIONS, CoherenceOptions, RankOptions

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SHIM = ROOT / "tests" / "cuda_shim"
FLAGS = ["-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-pthread"]
ALL_SHARED = 232448
METRICS = ("given", "euclidean", "sqeuclidean", "cosine")


def compiler() -> str:
    """The C++ compiler, or a skip."""
    found = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def digest(*arguments: str) -> str:
    """Of everything that a build depends on."""
    found = hashlib.sha256(repr(arguments).encode())
    for path in sorted((ROOT / "csrc").glob("*.h")) + sorted((ROOT / "csrc/cuda").iterdir()):
        found.update(path.read_bytes())
    for path in sorted(SHIM.iterdir()):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def build(main: str, *flags: str, warp: int) -> Path:
    """The kernels and tests/cuda_shim/`main` as a program, or a library with -shared; kept in build/."""
    arguments = [*FLAGS, *flags, f"-DPCK_WARP_SIZE={warp}", f"-I{SHIM}", f"-I{ROOT / 'csrc'}"]
    target = ROOT / "build" / "cuda_shim" / digest(compiler(), main, *arguments)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    sources = ["-x", "c++", *map(str, KERNELS), str(SHIM / main)]
    partial = target.with_suffix(f".{os.getpid()}")
    command = [compiler(), *arguments, *sources, "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    partial.replace(target)
    return target


class PlainSide(ctypes.Structure):
    """See harness.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("values", "anchors", "references", "anchor_sq")),
        *((name, c_void_p) for name in ("reference_sq", "offsets")),
        ("count", c_int64),
        ("width", c_int64),
        ("metric", c_int),
    )


class PlainOptions(ctypes.Structure):
    """See harness.cpp."""

    _fields_ = (
        ("relaxation", c_int),
        ("penalty", c_int),
        ("temperature", c_double),
        ("scale_std", c_int),
    )


@cache
def library(warp: int) -> ctypes.CDLL:
    """The kernels with warps of so many lanes."""
    return ctypes.CDLL(str(build("harness.cpp", "-O1", "-g", "-fPIC", "-shared", warp=warp)))


def address(x: Tensor | None) -> c_void_p:
    """Of a tensor's memory."""
    if x is None:
        return c_void_p(None)
    assert x.is_contiguous() and x.dtype in (torch.float32, torch.bool)
    return c_void_p(x.data_ptr())


def plain_side(rows: Rows) -> PlainSide:
    """The side as harness.cpp takes it; the tensors of `rows` must outlive it."""
    parts = (rows.values, rows.anchors, rows.references, rows.anchor_sq, rows.reference_sq)
    pointers = [address(x) for x in (*parts, rows.offsets)]
    width = 0 if rows.anchors is None else rows.anchors.shape[1]
    return PlainSide(*pointers, rows.values.shape[1], width, METRICS.index(rows.metric))


def plain_options(options: RankOptions) -> PlainOptions:
    """The options as harness.cpp takes them."""
    penalty = options.penalty if isinstance(options, CoherenceOptions) else "squared"
    return PlainOptions(
        RELAXATIONS.index(options.relaxation),
        PENALTIES.index(penalty),
        options.temperature,
        options.scale == "std",
    )


class ShimBackend(Backend):
    """The CUDA kernels on the CPU, in blocks of so many threads and with so much shared memory."""

    name = "cuda_shim"
    working_bytes = 0

    def __init__(
        self, threads: int = 16, warp: int = 8, shared_bytes: int = ALL_SHARED
    ) -> None:
        self.library = library(warp)
        self.device = (threads, shared_bytes)

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype == torch.float32 else "it computes in float32"

    def call(self, function: str, *arguments: Any) -> None:
        self.library.configure(*self.device)
        pointers = [address(a) if isinstance(a, Tensor) or a is None else a for a in arguments]
        byref = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in pointers]
        wide = [c_int64(a) if type(a) is int else a for a in byref]
        assert getattr(self.library, function)(*wide) == 0, f"{function} failed"

    def dissimilarity(self, rows: Rows) -> Tensor:
        self.call("dissimilarity", rows.values.shape[0], plain_side(rows))
        return rows.values

    def hard_rank(self, x: Tensor) -> Tensor:
        rank = torch.empty_like(x)
        self.call("hard_rank", *x.shape, x, rank)
        return rank

    def soft_rank(self, x: Tensor, options: RankOptions, with_grad: bool) -> tuple[Tensor, Tensor]:
        rank = torch.empty_like(x)
        density = torch.empty_like(x) if with_grad else None
        self.call("soft_rank", *x.shape, x, plain_options(options), rank, density)
        return rank, x.new_empty(0) if density is None else density

    def soft_rank_backward(
        self, grad_rank: Tensor, x: Tensor, density: Tensor, options: RankOptions
    ) -> Tensor:
        grad = torch.empty_like(x)
        plain = plain_options(options)
        self.call("soft_rank_backward", *x.shape, grad_rank, x, density, plain, grad)
        return grad

    def coherence_rows(
        self,
        student: Rows,
        teacher: Rows,
        weights: Tensor,
        options: CoherenceOptions,
        self_start: int | None,
        with_grad: bool,
        keep: Tensor | None = None,
    ) -> Tensor:
        losses = torch.empty_like(weights)
        self.call(
            "coherence_rows",
            len(weights),
            plain_side(student),
            plain_side(teacher),
            keep,
            weights,
            -1 if self_start is None else self_start,
            plain_options(options),
            c_int(with_grad),
            losses,
        )
        return losses
