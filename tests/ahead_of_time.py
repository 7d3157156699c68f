"""The Triton kernels compiled ahead of time, for GPUs that need not be here."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pc_kernels.formulas import PENALTIES, RELAXATIONS
from pc_kernels.triton_kernels.tables import FAR

KINDS = {"moments_ptr": "*i64", "ints_ptr": "*i32", "temperature": "fp64"}
KINDS |= dict.fromkeys(("keep_ptr", "source_keep_ptr", "query_keep_ptr"), "*u8")
KINDS |= {"twins_ptr": "*i32"}
ALIGNED = ("capacity", "floats_stride", "room")
"""Integers that the backend makes multiples of 16."""

ARCHITECTURES = (80, 90, 100, 120)
"""NVIDIA's, by their compute capability: A100, H100, B200, RTX 50."""

LOGISTIC, NORMAL = (RELAXATIONS[name].code for name in ("logistic", "normal"))
SQUARED, ABSOLUTE, HUBER = (PENALTIES[name].code for name in ("squared", "absolute", "huber"))
GIVEN, EUCLIDEAN, SQEUCLIDEAN = 0, 1, 2

RANKS: dict[str, Any] = {"RELAXATION": LOGISTIC, "SCALE_STD": True, "WITH_GRAD": True}
RANKS |= {"HAS_KEEP": False, "GRID": True}
COHERENCE = {**RANKS, "DISSIMILARITY": EUCLIDEAN, "READY": False, "PENALTY": SQUARED}
GIVEN_ROWS = {**COHERENCE, "DISSIMILARITY": GIVEN}
SQUARED_ROWS = {**COHERENCE, "DISSIMILARITY": SQEUCLIDEAN}
TEACHER: dict[str, Any] = {"DISSIMILARITY": EUCLIDEAN, "FINITE": True, "HAS_KEEP": False}
TEACHER |= {"SHORT": False}
MATRIX = {**TEACHER, "DISSIMILARITY": GIVEN, "FINITE": False}
SUMS: dict[str, Any] = {"RELAXATION": FAR + LOGISTIC, "GRID": True, "HAS_WEIGHTS": True}
SUMS |= dict.fromkeys(("DENSITY", "CDF"), True) | dict.fromkeys(
    ("INTEGRAL", "HAS_QUERY_KEEP"), False
)
SUMS |= {"HAS_SOURCE_KEEP": True}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dissimilarity": ("dissimilarity", {"DISSIMILARITY": EUCLIDEAN}),
    "straight": ("straight_dissimilarity", {"DISSIMILARITY": EUCLIDEAN, "WIDTH": 64}),
    "straight, narrow": ("straight_dissimilarity", {"DISSIMILARITY": SQEUCLIDEAN, "WIDTH": 16}),
    "hard_rank": ("hard_rank", MATRIX),
    "hard_rank, short": ("hard_rank", {**MATRIX, "SHORT": True}),
    "teacher": ("hard_rank", TEACHER),
    "teacher, masked and short": ("hard_rank", {**TEACHER, "HAS_KEEP": True, "SHORT": True}),
    "soft_rank": ("soft_rank", RANKS),
    "soft_rank, short": ("soft_rank", {**RANKS, "GRID": False, "SCALE_STD": False}),
    "soft_rank, normal, no gradient": (
        "soft_rank",
        {**RANKS, "RELAXATION": NORMAL, "WITH_GRAD": False},
    ),
    "soft_rank, masked": ("soft_rank", {**RANKS, "HAS_KEEP": True}),
    "backward": ("soft_rank_backward", RANKS),
    "backward, masked": ("soft_rank_backward", {**RANKS, "HAS_KEEP": True}),
    "backward, normal": ("soft_rank_backward", {**RANKS, "RELAXATION": NORMAL, "SCALE_STD": False}),
    "backward, short": ("soft_rank_backward", {**RANKS, "GRID": False}),
    "coherence_rows": ("coherence_rows", COHERENCE),
    "coherence_rows, short": ("coherence_rows", {**COHERENCE, "GRID": False}),
    "coherence_rows, masked, normal, given": (
        "coherence_rows",
        {**GIVEN_ROWS, "HAS_KEEP": True, "RELAXATION": NORMAL, "PENALTY": HUBER},
    ),
    "kernel_sums": ("kernel_sums", {**SUMS, "RELAXATION": FAR + NORMAL, "INTEGRAL": True}),
    "kernel_sums, pairs": ("kernel_sums", {**SUMS, "GRID": False, "HAS_WEIGHTS": False}),
    "coherence_rows, straight": ("coherence_rows", {**COHERENCE, "READY": True}),
    "coherence_rows, no gradient": (
        "coherence_rows",
        {**SQUARED_ROWS, "WITH_GRAD": False, "PENALTY": ABSOLUTE, "SCALE_STD": False},
    ),
}


def compiled(stage: str, constants: dict[str, Any], setting: Any, target: Any) -> Any:
    """The kernel of a stage, compiled for a target that need not be here."""
    from importlib import import_module

    from pc_kernels.triton_kernels.settings import compiler_options

    file = {"soft_rank_backward": "soft_rank", "straight_dissimilarity": "dissimilarity"}
    module = import_module(f"pc_kernels.triton_kernels.{file.get(stage, stage)}")
    kernel = getattr(module, f"{stage}_kernel")
    blocks = {name.upper(): size for name, size in vars(setting).items()}
    constants = {k: v for k, v in {**constants, **blocks}.items() if k in kernel.arg_names}
    options = {"num_warps": setting.warps}
    if stage not in ("dissimilarity", "straight_dissimilarity"):
        options |= compiler_options(torch.device(target.backend))
    return compiled_kernel(kernel, constants, target, KINDS, **options)


def compiled_kernel(
    kernel: Any, constants: dict[str, Any], target: Any, kinds: dict[str, str], **options: Any
) -> Any:
    """A kernel for a target; `kinds`: of the arguments that are not as their names say."""
    import triton
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = kinds.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        signature[name] = "constexpr" if name in constants else kind
        if name in ALIGNED or kind.startswith("*"):
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def settings_of(stage: str, constants: dict[str, Any]) -> tuple[Any, ...]:
    """The settings that a variant is launched with."""
    from pc_kernels.triton_kernels import settings

    if stage == "straight_dissimilarity":
        return (settings.STRAIGHT_TILE,)
    if stage == "kernel_sums" and not constants["GRID"]:
        from pc_kernels.triton_kernels.kernel_sums_launch import pair_setting

        return pair_setting(8192, 4), pair_setting(4, 8192)
    if constants.get("SHORT"):
        return settings.COMPARED_ROWS
    if not constants.get("GRID", True):
        return settings.SHORT_ROWS
    return tuple(dict.fromkeys(settings.LONG_ROWS + settings.LONGEST_ROWS))


def nvidia(architecture: int) -> Any:
    """An NVIDIA GPU to compile for."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", architecture, 32)


def nvidia_tool(name: str) -> Path | None:
    """A program that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return tool if tool.exists() else None


@dataclass(frozen=True)
class Usage:
    """Of each thread of a kernel: its registers, and the bytes of memory it keeps, spills above all."""

    registers: int
    stack: int


def usage(cubin: bytes) -> Usage:
    """What the assembler says of a kernel; of nothing without Triton's cuobjdump."""
    tool = nvidia_tool("cuobjdump")
    if tool is None:
        return Usage(0, 0)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as image:
        image.write(cubin)
        image.flush()
        command = [str(tool), "-res-usage", image.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"\b(?:REG|STACK):(\d+)", text)
    return Usage(int(registers), int(stack))
