"""Features near the origin by Triton's kernels: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import Child, names_in, needs_compiler, needs_triton

FILE = "points_interpreted.py"


@needs_triton
@pytest.mark.parametrize("name", names_in(FILE))
def test_in_the_interpreter(name: str, child: Child) -> None:
    child.check(name)


@needs_triton
@needs_compiler
@pytest.mark.parametrize("name", ["shift", "move", "offsets"])
def test_compiles_ahead_of_time(name: str, tmp_path: Path) -> None:
    """To machine code without a spilled register."""
    from ahead_of_time import compiled_kernel, stack_bytes
    from triton.backends.compiler import GPUTarget

    from pc_kernels.triton_kernels import near_origin, points

    constants, warps = {
        "shift": ({"SHARED": False, "PARTS": 2, **near_origin.TILE}, 4),
        "move": ({"COLUMNS": 512}, 2),
        "offsets": ({"BLOCK": near_origin.LONGEST}, 8),
    }[name]
    kernel = getattr(points, f"{name}_kernel")
    constants.pop("num_warps", None)
    target, kinds = GPUTarget("cuda", 90, 32), {"far": "fp32"}
    done = compiled_kernel(kernel, constants, target, kinds, num_warps=warps)
    assert (stack_bytes(done.asm["cubin"], tmp_path) or 0) == 0
