"""Features near the origin by Triton's kernels: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import pytest
import torch
from interpreter import Child, names_in, needs_compiler, needs_triton

FILE = "points_interpreted.py"


@needs_triton
@pytest.mark.parametrize("name", names_in(FILE))
def test_in_the_interpreter(name: str, child: Child) -> None:
    child.check(name)


@needs_triton
@needs_compiler
@pytest.mark.parametrize(
    "name", ["shift", "move", "pull", "normalized", "normalized_backward", "quarantine"]
)
def test_compiles_ahead_of_time(name: str) -> None:
    """To machine code without a spilled register."""
    from ahead_of_time import compiled_kernel, nvidia, usage

    from pc_kernels.triton_kernels import near_origin, normalized, points, pull, pull_launch
    from pc_kernels.triton_kernels.settings import compiler_options

    rows = near_origin.MOVED_TILE
    module, constants = {
        "shift": (points, {"SHARED": False, "UNIT": True, "PARTS": 2, **near_origin.TILE}),
        "move": (points, {"SHARED": False, "POISONED": True, "BLOCK": near_origin.LONGEST, **rows}),
        "pull": (pull, {"TURNED": True, **pull_launch.TURNED_TILE}),
    }.get(name, (normalized, dict(rows)))
    constants = dict(constants)
    warps = constants.pop("num_warps")
    options = compiler_options(torch.device("cuda")) if name in ("move", "pull") else {}
    kinds = {"far": "fp32", "cancelled": "fp32", "table_ptr": "*i64"}
    kinds |= dict.fromkeys(("twins_ptr", "progress_ptr"), "*i32")
    kinds |= dict.fromkeys(("inverse_ptr", "anchor_inverse_ptr", "reference_inverse_ptr"), "*fp64")
    kernel = getattr(module, f"{name}_kernel")
    for architecture in (80, 90, 100, 120):
        done = compiled_kernel(
            kernel, constants, nvidia(architecture), kinds, num_warps=warps, **options
        )
        assert usage(done.asm["cubin"]).stack == 0
