"""csrc/cuda on the CPU: the CUDA kernels, compiled as C++ against tests/cuda_shim, as a backend."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from ctypes import c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pc_kernels.backends import CompiledBackend
from pc_kernels.options import PENALTIES, RELAXATIONS

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SHIM = ROOT / "tests" / "cuda_shim"
FLAGS = ["-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-pthread"]
ALL_SHARED = 232448
METRICS = ("given", "ranked", "euclidean", "sqeuclidean", "cosine")


def compiler() -> str:
    """The C++ compiler, or a skip."""
    found = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def digest(*arguments: str) -> str:
    """Of everything that a build depends on."""
    found = hashlib.sha256(repr(arguments).encode())
    for folder in (ROOT / "csrc", ROOT / "csrc" / "cuda", SHIM):
        for path in sorted(filter(Path.is_file, folder.iterdir())):
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
    return ctypes.CDLL(str(build("harness.cpp", "-O1", "-fPIC", "-shared", warp=warp)))


def address(x: Tensor | None) -> c_void_p:
    """Of a tensor's memory."""
    if x is None:
        return c_void_p(None)
    assert x.is_contiguous() and x.dtype in (torch.float32, torch.bool)
    return c_void_p(x.data_ptr())


def plain_side(values: Tensor, metric: str, *parts: Tensor | None) -> PlainSide:
    """A side as harness.cpp takes it: anchors, references, their squares, offsets."""
    width = 0 if parts[0] is None else parts[0].shape[1]
    pointers = [address(x) for x in (values, *parts)]
    return PlainSide(*pointers, values.shape[1], width, METRICS.index(metric))


def plain_options(
    temperature: float, relaxation: str, scale_std: bool, penalty: str = "squared"
) -> PlainOptions:
    """Options as harness.cpp takes them."""
    kinds = RELAXATIONS.index(relaxation), PENALTIES.index(penalty)
    return PlainOptions(*kinds, temperature, scale_std)


class ShimBackend(CompiledBackend):
    """The CUDA kernels on the CPU, in blocks of so many threads and with so much shared memory.

    The methods below the first are the operators, see csrc/arguments.h.
    """

    name = "cuda_shim"

    def __init__(self, threads: int = 16, warp: int = 8, shared_bytes: int = ALL_SHARED) -> None:
        self.library = library(warp)
        self.device = (threads, shared_bytes)

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype == torch.float32 else "it computes in float32"

    def operator(self, stage: str) -> Callable[..., Any]:
        return getattr(self, f"run_{stage}")

    def call(self, function: str, *arguments: Any) -> None:
        """Calls the harness; integers are 64 bits wide there, but for what ctypes says already."""
        self.library.configure(*self.device)
        plain: list[Any] = []
        for a in arguments:
            if a is None or isinstance(a, Tensor):
                plain.append(address(a))
            elif isinstance(a, ctypes.Structure):
                plain.append(ctypes.byref(a))
            else:
                plain.append(c_int64(a) if type(a) is int else a)
        assert getattr(self.library, function)(*plain) == 0, f"{function} failed"

    def run_dissimilarity_(self, *side: Any) -> None:
        self.call("dissimilarity", len(side[0]), plain_side(*side))

    def run_hard_rank(self, x: Tensor) -> Tensor:
        rank = torch.empty_like(x)
        self.call("hard_rank", *x.shape, x, rank)
        return rank

    def run_soft_rank(
        self, x: Tensor, temperature: float, relaxation: str, scale_std: bool, with_grad: bool
    ) -> tuple[Tensor, Tensor]:
        rank = torch.empty_like(x)
        density = torch.empty_like(x) if with_grad else None
        options = plain_options(temperature, relaxation, scale_std)
        self.call("soft_rank", *x.shape, x, options, rank, density)
        return rank, x.new_empty(0) if density is None else density

    def run_soft_rank_backward(
        self, grad_rank: Tensor, x: Tensor, density: Tensor, *options: Any
    ) -> Tensor:
        grad = torch.empty_like(x)
        plain = plain_options(*options)
        self.call("soft_rank_backward", *x.shape, grad_rank, x, density, plain, grad)
        return grad

    def run_hard_rank_rows_(self, *arguments: Any) -> None:
        *side, keep, self_start = arguments
        self.call("hard_rank_rows", len(side[0]), plain_side(*side), keep, self_start)

    def run_coherence_rows(self, *arguments: Any) -> Tensor:
        student, teacher = arguments[:7], arguments[7:14]
        weights, keep, self_start, *options, with_grad = arguments[14:]
        losses = torch.empty_like(weights)
        self.call(
            "coherence_rows",
            len(weights),
            plain_side(*student),
            plain_side(*teacher),
            keep,
            weights,
            self_start,
            plain_options(*options),
            c_int(with_grad),
            losses,
        )
        return losses
