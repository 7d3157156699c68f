"""Features near the origin by Triton's kernels: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import Child, names_in, needs_compiler, needs_triton

FILE = "points_interpreted.py"


@pytest.fixture(scope="module")
def child(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Child:
    return Child(FILE, request, tmp_path_factory.mktemp("interpreter"))


@needs_triton
@pytest.mark.parametrize("name", names_in(FILE))
def test_in_the_interpreter(name: str, child: Child) -> None:
    child.check(name)


@needs_triton
@needs_compiler
@pytest.mark.parametrize("name", ["shift", "move", "offsets"])
def test_compiles_ahead_of_time(name: str, tmp_path: Path) -> None:
    """To machine code without a spilled register."""
    import triton
    from ahead_of_time import stack_bytes
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pc_kernels.triton_kernels import near_origin, points

    constants, warps = {
        "shift": ({"SHARED": False, "PARTS": 2, **near_origin.TILE}, 4),
        "move": ({"COLUMNS": 512}, 2),
        "offsets": ({"BLOCK": near_origin.LONGEST}, 8),
    }[name]
    kernel = getattr(points, f"{name}_kernel")
    constants.pop("num_warps", None)
    signature = {
        argument: "constexpr"
        if argument in constants
        else "*fp32"
        if argument.endswith("_ptr")
        else {"far": "fp32"}.get(argument, "i32")
        for argument in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constexprs=constants)
    target = GPUTarget("cuda", 90, 32)
    done = triton.compile(source, target=target, options={"num_warps": warps})
    assert (stack_bytes(done.asm["cubin"], tmp_path) or 0) == 0
