"""Features near the origin by Triton's kernels: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import pytest
from interpreter import Child, names_in, needs_compiler, needs_triton

FILE = "points_interpreted.py"


@needs_triton
@pytest.mark.parametrize("name", names_in(FILE))
def test_in_the_interpreter(name: str, child: Child) -> None:
    child.check(name)


@needs_triton
@needs_compiler
@pytest.mark.parametrize("name", ["shift", "move", "offsets", "weigh", "mend"])
def test_compiles_ahead_of_time(name: str) -> None:
    """To machine code without a spilled register."""
    from ahead_of_time import compiled_kernel, nvidia, usage

    from pc_kernels.triton_kernels import near_origin, points, pull, pull_launch

    constants, warps = {
        "shift": ({"SHARED": False, "PARTS": 2, **near_origin.TILE}, 4),
        "move": ({"COLUMNS": 512}, 2),
        "offsets": ({"BLOCK": near_origin.LONGEST}, 8),
        "weigh": ({"TURNED": False, **pull_launch.STRAIGHT_TILE}, 4),
        "mend": ({"TURNED": True, **pull_launch.MENDED_TILE}, 4),
    }[name]
    kernel = getattr(pull if name in ("weigh", "mend") else points, f"{name}_kernel")
    constants.pop("num_warps", None)
    done = compiled_kernel(
        kernel, constants, nvidia(90), {"far": "fp32", "cancelled": "fp32"}, num_warps=warps
    )
    assert usage(done.asm["cubin"]).stack == 0
