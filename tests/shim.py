"""csrc/cuda on the CPU: the CUDA kernels, compiled as C++ against tests/cuda_shim, as a backend."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from ctypes import c_bool, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pc_kernels import formulas
from pc_kernels.backends import CudaBackend

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SHIM = ROOT / "tests" / "cuda_shim"
FLAGS = ["-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-pthread"]
ALL_SHARED = 232448
CTYPES = (torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)
DISSIMILARITIES = ("given", "ranked", "euclidean", "sqeuclidean", "cosine")
CONTRAST_FORMS = ("softmax", "sigmoid", "distillation")


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


class Present(ctypes.Structure):
    """See csrc/stages.h, as for the structs below."""

    _fields_ = (("keep", c_void_p), ("self_start", c_int64))


class Points(ctypes.Structure):
    _fields_ = (("x", c_void_p), ("count", c_int64), ("present", Present))


class Rows(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("values", "anchors", "references", "anchor_sq")),
        *((name, c_void_p) for name in ("reference_sq", "offsets", "twins", "unit")),
        ("count", c_int64),
        ("width", c_int64),
        ("dissimilarity", c_int),
    )


class RankOptions(ctypes.Structure):
    _fields_ = (
        ("relaxation", c_int),
        ("penalty", c_int),
        ("temperature", c_double),
        ("scale_std", c_bool),
    )


class HardRank(ctypes.Structure):
    _fields_ = (("points", Points), ("rank", c_void_p))


class SoftRank(ctypes.Structure):
    _fields_ = (
        ("points", Points),
        ("options", RankOptions),
        ("rank", c_void_p),
        ("density", c_void_p),
    )


class SoftRankBackward(ctypes.Structure):
    _fields_ = (
        ("points", Points),
        ("grad_rank", c_void_p),
        ("density", c_void_p),
        ("options", RankOptions),
        ("grad_x", c_void_p),
    )


class Lists(ctypes.Structure):
    _fields_ = (("x", c_void_p), ("offsets", c_void_p), ("count", c_int64), ("keep", c_void_p))


class KernelSums(ctypes.Structure):
    _fields_ = (
        ("sources", Lists),
        ("queries", Lists),
        ("upper", c_bool),
        ("weights", c_void_p),
        *((name, c_int64) for name in ("channels", "all_sources", "all_queries")),
        ("options", RankOptions),
        *((name, c_void_p) for name in formulas.KERNELS),
    )


class DissimilarityRows(ctypes.Structure):
    _fields_ = (("rows", Rows),)


class HardRankRows(ctypes.Structure):
    _fields_ = (("teacher", Rows), ("present", Present))


class CoherenceRows(ctypes.Structure):
    _fields_ = (
        ("student", Rows),
        ("teacher", Rows),
        ("present", Present),
        ("weights", c_void_p),
        ("options", RankOptions),
        ("with_grad", c_bool),
        ("losses", c_void_p),
    )


class Logits(ctypes.Structure):
    _fields_ = (
        ("values", c_void_p),
        ("keep", c_void_p),
        ("count", c_int64),
        ("start", c_int64),
    )


class ContrastColumns(ctypes.Structure):
    _fields_ = (
        ("logits", Logits),
        ("anchors", c_int64),
        ("columns", c_int64),
        *((name, c_void_p) for name in ("top", "total", "positive")),
    )


class ContrastRows(ctypes.Structure):
    _fields_ = (
        ("logits", Logits),
        ("target", c_void_p),
        ("columns", c_int64),
        *((name, c_void_p) for name in ("shift", "factor", "own", "weights")),
        ("form", c_int),
        ("with_grad", c_bool),
        ("losses", c_void_p),
    )


class PointSet(ctypes.Structure):
    """See csrc/cuda/points.h, as for the structs below."""

    _fields_ = (
        ("x", c_void_p),
        ("count", c_int64),
        *((name, c_void_p) for name in ("moved", "squares", "poison", "inverse")),
    )


class NearOrigin(ctypes.Structure):
    _fields_ = (
        ("references", PointSet),
        ("anchors", PointSet),
        ("width", c_int64),
        ("parts", c_int),
        ("far", c_float),
        *((name, c_void_p) for name in ("shift", "largest", "unit", "offsets", "twins", "table")),
        ("room", c_int64),
        ("progress", c_void_p),
    )


class Scaled(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("count", c_int64),
        ("width", c_int64),
        ("scale", c_double),
        ("y", c_void_p),
        ("inverse", c_void_p),
    )


class ScaledBackward(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("grad", "y", "inverse")),
        ("count", c_int64),
        ("width", c_int64),
        ("scale", c_double),
        ("to_x", c_void_p),
        ("along", c_void_p),
    )


class Quarantine(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("count", c_int64),
        ("width", c_int64),
        ("finite", c_void_p),
        ("poison", c_void_p),
    )


class Pull(ctypes.Structure):
    _fields_ = (
        ("v", c_void_p),
        ("turned", c_bool),
        ("x", c_void_p),
        ("y", c_void_p),
        *((name, c_int64) for name in ("n", "m", "width")),
        ("has_product", c_bool),
        ("cancelled", c_float),
        ("unit", c_void_p),
        ("pulled", c_void_p),
    )


@cache
def library(warp: int) -> ctypes.CDLL:
    """The kernels with warps of so many lanes."""
    return ctypes.CDLL(str(build("harness.cpp", "-O1", "-fPIC", "-shared", warp=warp)))


def address(x: Tensor | None) -> c_void_p:
    """Of a tensor's memory."""
    if x is None or x.numel() == 0:
        return c_void_p(None)
    assert x.is_contiguous() and x.dtype in CTYPES
    return c_void_p(x.data_ptr())


def points_of(x: Tensor, keep: Tensor | None) -> Points:
    """Rows that are ranked as they are."""
    return Points(address(x), x.shape[1], Present(address(keep), -1))


def rows_of(values: Tensor, dissimilarity: str, gram: list[Tensor]) -> Rows:
    """A chunk of anchors; `gram`: the tensors of a `Gram`, or nothing."""
    pointers = [address(x) for x in (values, *(gram or [None] * 7))]
    width = gram[0].shape[1] if gram else 0
    return Rows(*pointers, values.shape[1], width, DISSIMILARITIES.index(dissimilarity))


def rank_options(
    temperature: float, relaxation: str, scale_std: bool, penalty: str = "squared"
) -> RankOptions:
    """Options by their codes."""
    codes = formulas.RELAXATIONS[relaxation].code, formulas.PENALTIES[penalty].code
    return RankOptions(*codes, temperature, scale_std)


class ShimBackend(CudaBackend):
    """The CUDA kernels on the CPU, in blocks of so many threads and with so much shared memory.

    The methods below `run` are the operators, see csrc/operators.h.
    """

    name = "cuda_shim"

    def __init__(
        self,
        threads: int = 16,
        warp: int = 8,
        shared_bytes: int = ALL_SHARED,
        side_by_side: int = 1,
    ) -> None:
        self.library = library(warp)
        self.device = (threads, shared_bytes, side_by_side)

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype == torch.float32 else "it computes in float32"

    def operator(self, stage: str) -> Callable[..., Any]:
        return getattr(self, f"run_{stage}")

    def run(self, function: str, rows: int, stage: ctypes.Structure) -> None:
        """Runs a stage over all rows."""
        self.library.configure(*self.device)
        error = getattr(self.library, function)(c_int64(rows), ctypes.byref(stage))
        assert error == 0, f"{function} failed"

    def run_hard_rank(self, x: Tensor, keep: Tensor | None) -> Tensor:
        rank = torch.empty_like(x)
        self.run("hard_rank", len(x), HardRank(points_of(x, keep), address(rank)))
        return rank

    def run_soft_rank(self, x: Tensor, keep: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        *options, with_grad = options
        rank = torch.empty_like(x)
        density = torch.empty_like(x) if with_grad else None
        places = address(rank), address(density)
        stage = SoftRank(points_of(x, keep), rank_options(*options), *places)
        self.run("soft_rank", len(x), stage)
        return rank, x.new_empty(0) if density is None else density

    def run_soft_rank_backward(
        self, grad_rank: Tensor, x: Tensor, density: Tensor, keep: Tensor | None, *options: Any
    ) -> Tensor:
        grad = torch.empty_like(x)
        given = points_of(x, keep), address(grad_rank), address(density)
        stage = SoftRankBackward(*given, rank_options(*options), address(grad))
        self.run("soft_rank_backward", len(x), stage)
        return grad

    def run_kernel_sums(
        self, x: Tensor, y: Tensor, weights: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        x_offsets, y_offsets, x_mask, y_mask, upper, temperature, relaxation, wanted = rest
        assert x_offsets is None and y_offsets is None
        channels = 1 if weights is None else len(weights)
        sums = [
            torch.full((channels, *y.shape) if is_wanted else (0,), torch.nan)
            for is_wanted in wanted
        ]
        stage = KernelSums(
            Lists(address(x), None, x.shape[1], address(x_mask)),
            Lists(address(y), None, y.shape[1], address(y_mask)),
            upper,
            address(weights),
            *(channels, x.numel(), y.numel()),
            rank_options(temperature, relaxation, False),
            *(address(s if is_wanted else None) for s, is_wanted in zip(sums, wanted, strict=True)),
        )
        self.run("kernel_sums", len(x), stage)
        return tuple(sums)

    def run_dissimilarity_(self, *rows: Any) -> None:
        self.run("dissimilarity", len(rows[0]), DissimilarityRows(rows_of(*rows)))

    def run_hard_rank_rows_(self, *arguments: Any) -> None:
        *rows, keep, self_start = arguments
        stage = HardRankRows(rows_of(*rows), Present(address(keep), self_start))
        self.run("hard_rank_rows", len(rows[0]), stage)

    def run_coherence_rows(self, *arguments: Any) -> Tensor:
        student, teacher = arguments[:3], arguments[3:6]
        weights, keep, self_start, *options, with_grad = arguments[6:]
        losses = torch.empty_like(weights)
        stage = CoherenceRows(
            rows_of(*student),
            rows_of(*teacher),
            Present(address(keep), self_start),
            address(weights),
            rank_options(*options),
            with_grad,
            address(losses),
        )
        self.run("coherence_rows", len(weights), stage)
        return losses

    def run_contrast_columns_(
        self, values: Tensor, keep: Tensor | None, start: int, *sums: Tensor
    ) -> None:
        logits = Logits(address(values), address(keep), values.shape[1], start)
        stage = ContrastColumns(logits, len(values), len(sums[0]), *map(address, sums))
        self.run("contrast_columns", len(values), stage)

    def run_contrast_rows(self, *arguments: Any) -> Tensor:
        values, keep, start, target, columns, weights, form, with_grad = arguments
        losses = torch.empty_like(weights)
        stage = ContrastRows(
            Logits(address(values), address(keep), values.shape[1], start),
            address(target),
            len(columns[0]) if columns else 0,
            *map(address, columns or [None] * 3),
            address(weights),
            CONTRAST_FORMS.index(form),
            with_grad,
            address(losses),
        )
        self.run("contrast_rows", len(values), stage)
        return losses

    def run_near_origin(
        self,
        points: list[Tensor],
        poison: list[Tensor],
        inverse: list[Tensor],
        parts: int,
        far: float,
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
        moved = [torch.full_like(x, torch.nan) for x in points]
        squares = [x.new_full((len(x),), torch.nan) for x in points]
        marks = [values or [None] * len(points) for values in (poison, inverse)]
        sets = [
            PointSet(address(p), len(p), *map(address, rest))
            for p, *rest in zip(points, moved, squares, *marks, strict=True)
        ]
        references, width = points[-1].shape
        room = 2 << max(references - 1, 0).bit_length()
        shift, largest = (points[0].new_full((n,), torch.nan) for n in (width, width // 8 + 1))
        offsets, unit = torch.full_like(squares[0], torch.nan), torch.full((1,), torch.nan)
        twins = torch.full((references + 1,), -1, dtype=torch.int32)
        table = torch.zeros(room, dtype=torch.int64)
        progress = torch.full((2,), -1, dtype=torch.int32)
        stage = NearOrigin(
            sets[-1],
            sets[0] if len(sets) == 2 else PointSet(),
            width,
            parts,
            far,
            *map(address, (shift, largest, unit, offsets, twins, table)),
            room,
            address(progress),
        )
        self.run("shift", width, stage)
        self.run("move", sum(map(len, points)), stage)
        return moved, squares, offsets, twins, unit

    def run_scaled(self, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        y, inverse = torch.full_like(x, torch.nan), x.new_full((len(x), 1), torch.nan).double()
        stage = Scaled(address(x), *x.shape, scale, address(y), address(inverse))
        self.run("scaled", len(x), stage)
        return y, inverse

    def run_scaled_backward(
        self, grad: Tensor, y: Tensor, inverse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        to_x, along = torch.full_like(grad, torch.nan), torch.full_like(inverse, torch.nan)
        given = map(address, (grad, y, inverse))
        stage = ScaledBackward(*given, *grad.shape, scale, address(to_x), address(along))
        self.run("scaled_backward", len(grad), stage)
        return to_x, along

    def run_quarantine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        finite, poison = torch.full_like(x, torch.inf), x.new_full((len(x),), torch.inf)
        stage = Quarantine(address(x), *x.shape, address(finite), address(poison))
        self.run("quarantine", len(x), stage)
        return finite, poison

    def run_pull_(
        self,
        pulled: Tensor,
        values: Tensor,
        x: Tensor,
        y: Tensor,
        unit: Tensor,
        has_product: bool,
        cancelled: float,
    ) -> None:
        turned = not values.is_contiguous()
        own = address(values.T if turned else values)
        sizes = (len(x), len(y), x.shape[1])
        given = own, turned, address(x), address(y), *sizes, has_product, cancelled
        stage = Pull(*given, address(unit), address(pulled))
        self.run("pull", len(x), stage)
