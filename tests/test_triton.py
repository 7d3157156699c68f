"""The `triton` backend without a GPU: its kernels in the interpreter, compiled ahead of time, and chosen.

The interpreter's tests are in triton_interpreted.py; each shows here as an item of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ahead_of_time import (
    COHERENCE,
    SUMS,
    TEACHER,
    VARIANTS,
    compiled,
    nvidia,
    nvidia_tool,
    settings_of,
    usage,
)
from interpreter import Child, names_in, needs_compiler, needs_triton, skip_without_interpreter
from kernel_counts import EVERYDAY, KERNELS, per_pair
from long_rows import LENGTH, LONG_ROWS

import pc_kernels
from pc_kernels.backends import BACKENDS, select, triton_obstacle

CPU = torch.device("cpu")
FILE = "triton_interpreted.py"


@needs_triton
@pytest.mark.parametrize("name", names_in(FILE))
def test_in_the_interpreter(name: str, child: Child) -> None:
    child.check(name)


@needs_triton
def test_crossovers(python: Callable[..., Any]) -> None:
    """The benchmark of the thresholds works, as far as the interpreter can tell."""
    arguments = ("benchmarks/crossovers.py", "--device", "cpu", "--quick")
    skip_without_interpreter()
    done = python(*arguments, timeout=300, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    for constant in ("ALL_PAIRS", "ALL_COMPARED", "NARROW"):
        assert constant in done.stdout


@needs_triton
@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_ahead_of_time(variant: str) -> None:
    """To machine code that fits: shared memory without asking for more, no register spilled.

    The whole of it, all settings on all architectures, is a part of `make counts`.
    """
    stage, constants = VARIANTS[variant]
    setting, *_ = settings_of(stage, constants)
    kernel = compiled(stage, constants, setting, nvidia(90))
    assert kernel.metadata.shared <= 48 << 10
    assert usage(kernel.asm["cubin"]).stack == 0


@needs_triton
@needs_compiler
@pytest.mark.parametrize("architecture", [80, 100, 120])
@pytest.mark.parametrize("stage", ["hard_rank", "coherence_rows"])
def test_compiles_for_other_architectures(stage: str, architecture: int) -> None:
    """No register is spilled there either."""
    from pc_kernels.triton_kernels import settings

    (setting,) = settings.LONG_ROWS
    kernel = compiled(stage, dict(KERNELS)[stage], setting, nvidia(architecture))
    assert usage(kernel.asm["cubin"]).stack == 0


@needs_triton
@needs_compiler
@pytest.mark.parametrize(("stage", "constants"), KERNELS)
def test_costs_of_rows(
    stage: str, constants: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instructions and barriers of everyday rows; and long rows with crowded buckets are no cliff."""
    from pc_kernels.triton_kernels import settings

    if nvidia_tool("nvdisasm") is None:
        pytest.skip("this Triton has no nvdisasm")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (setting,) = settings.LONG_ROWS
    kernel = compiled(stage, constants, setting, nvidia(90))
    instructions, barriers = per_pair(kernel, setting, settings.LONG, EVERYDAY)
    assert instructions <= 400 and barriers <= 100
    costs = {
        name: per_pair(kernel, setting, LENGTH, row.work)[0] for name, row in LONG_ROWS.items()
    }
    assert max(costs.values()) <= 3 * costs["everyday"], costs


@needs_triton
@needs_compiler
def test_sizes_of_one_compile() -> None:
    """Triton makes a constant of an integer that is 1."""
    from pc_kernels.triton_kernels import settings

    target = nvidia(90)
    kernels = (("coherence_rows", COHERENCE), ("hard_rank", TEACHER), ("kernel_sums", SUMS))
    for stage, constants in kernels:
        ones = dict.fromkeys(("count", "rows", "width", "source_count", "query_count"), 1)
        compiled(stage, {**constants, **ones, "GRID": False}, settings.SHORT_ROWS[0], target)


@needs_triton
@needs_compiler
def test_compiles_for_amd() -> None:
    """The same source for another maker's GPU."""
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    from pc_kernels.triton_kernels import settings

    if "amd" not in backends:
        pytest.skip("this Triton has no AMD backend")
    target = GPUTarget("hip", "gfx942", 64)
    compiled("coherence_rows", COHERENCE, settings.LONG_ROWS[0], target)
    compiled("hard_rank", TEACHER, settings.LONG_ROWS[0], target)


@needs_triton
def test_tuning_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a key, with tensors as they were; not where timings are unwelcome."""
    from pc_kernels.triton_kernels import settings
    from pc_kernels.triton_kernels.settings import Setting

    candidates = (Setting(64, 4, 4), Setting(128, 4, 4), Setting(256, 4, 8))
    launched: list[int] = []
    x = torch.ones(3)

    def launch(setting: Setting) -> None:
        assert (x == 1).all()
        x.add_(1)
        launched.append(setting.block)

    def bench(once: Callable[[], None], **_: Any) -> float:
        once()
        once()
        return abs(launched[-1] - 128)

    monkeypatch.setattr(settings.triton.testing, "do_bench", bench)
    monkeypatch.setattr(settings, "INTERPRETED", False)
    monkeypatch.setattr(settings, "_chosen", {})
    # Deterministic algorithms, as tests have it.
    assert settings.tuned("a size", candidates, launch, x) == candidates[0] and not launched
    torch.use_deterministic_algorithms(False)
    for _ in range(2):
        assert settings.tuned("a size", candidates, launch, x) == candidates[1]
        assert len(launched) == 6 and (x == 1).all()


@needs_triton
def test_tuning_takes_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And restores what the kernel writes: the ranks, not the caller's values."""
    from pc_kernels.triton_kernels import launch, settings

    restored: list[torch.Tensor] = []
    launched: list[int] = []

    def tuned(key: Any, candidates: Any, trial: Any, overwritten: torch.Tensor) -> Any:
        restored.append(overwritten)
        trial(candidates[0])
        return candidates[0]

    class Kernel:
        fn = tuned

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *_, rows, **__: launched.append(rows)

    monkeypatch.setattr(launch, "tuned", tuned)
    monkeypatch.setattr(launch, "hard_rank_kernel", Kernel())
    x = torch.ones(100, launch.ALL_COMPARED + 1)
    rank = launch.hard_rank(x)
    few = 2 * settings.RESIDENT_WARPS // min(s.warps for s in settings.LONG_ROWS)
    assert launched == [few, len(x)]
    assert [part.data_ptr() for part in restored] == [rank.data_ptr()] and len(restored[0]) == few


@needs_triton
def test_no_thread_is_anothers_copy() -> None:
    """Kernels that overwrite what they read: each element is loaded by the thread that stores it."""
    from pc_kernels.triton_kernels import settings

    for count in [*range(1, 70), 100, 200, 300, 513, 5000]:
        short = (settings.trimmed(c, count) for c in (settings.SHORT_ROWS, settings.COMPARED_ROWS))
        for setting in sum(short, settings.long_rows(count)):
            assert 32 * setting.warps <= setting.block
    assert [settings.warps_of(block, 4) for block in (32, 64, 128, 256)] == [1, 2, 4, 4]


@needs_triton
def test_constants_belong_to_no_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that torch.compile warms up owns what its thread allocates."""
    from pc_kernels.triton_kernels import tables

    threads: list[int] = []
    tensor = torch.tensor

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        threads.append(threading.get_ident())
        return tensor(*arguments, **options)

    monkeypatch.setattr(torch, "tensor", recorded)
    tables.tables.cache_clear()
    tables.tables("logistic", CPU)
    assert len(threads) == 1 and threads[0] != threading.get_ident()


@needs_triton
def test_kernels_do_not_depend_on_the_number_of_rows() -> None:
    """So the last chunk of a batch compiles none, which the capture of a CUDA graph would not allow."""
    from pc_kernels.triton_kernels import kernel_sums, launch

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    names = ("hard_rank", "soft_rank", "soft_rank_backward", "coherence_rows")
    for kernel in [getattr(launch, f"{n}_kernel") for n in names] + [
        kernel_sums.kernel_sums_kernel
    ]:
        fixed = {p.name for p in kernel.params if p.do_not_specialize}
        assert "rows" in fixed and fixed >= {"self_start", "all_rows"} & set(kernel.arg_names)


@needs_triton
def test_grid_capacity() -> None:
    """Room for the widest row that a temperature allows, and never for more than 8 cells a point."""
    from pc_kernels.recipe import Recipe
    from pc_kernels.triton_kernels.launch import grid_capacity

    for count in (2, 300, 5000):
        x = torch.zeros(1, count)
        x[0, 0], x[0, 1] = -1, 1
        sigma = x.std(correction=0).item()
        for temperature in (1.0, 10.0):
            cells = 2 / (temperature * sigma) * 4 + 2
            room = grid_capacity(count, Recipe(temperature=temperature))
            assert min(cells, 8 * count) <= room <= 8 * count + 16
    assert grid_capacity(100, Recipe(relaxation="normal", temperature=1e-300)) == 800
    assert grid_capacity(100, Recipe(relaxation="normal", temperature=1e300, scale=None)) == 800


def test_never_chosen_on_the_cpu() -> None:
    """Nor usable there without the interpreter; the reason says what to set."""
    assert select("auto", CPU, torch.float32).name != "triton"
    backend = BACKENDS["triton"]
    assert not backend.serves(CPU)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            pc_kernels.soft_rank(torch.ones(3), backend="triton")


def test_order_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend = BACKENDS["triton"]
    monkeypatch.setattr(pc_kernels.backends.triton, "_capability_obstacle", lambda device: None)
    for device in ("cuda", "xpu"):
        names = [n for n, b in BACKENDS.items() if b.serves(torch.device(device))]
        assert names.index("triton") < names.index("torch")
        reason = backend.obstacle(torch.device(device), torch.float32)
        assert reason == triton_obstacle()
        assert "float32" in (backend.obstacle(torch.device(device), torch.float64) or "")
    assert "got device mps" in (backend.obstacle(torch.device("mps"), torch.float32) or "")


NO_TRITON = """
import sys
sys.modules["triton"] = None  # what an import of it fails on
import torch, pc_kernels
from pc_kernels.backends import BACKENDS
backend = BACKENDS["triton"]
print(backend.obstacle(torch.device("cpu"), torch.float32))
try:
    pc_kernels.soft_rank(torch.ones(3), backend="triton")
except ValueError as error:
    print(error)
"""


def test_without_triton(python: Callable[..., Any]) -> None:
    done = python("-c", NO_TRITON, TRITON_INTERPRET="1")
    reason, error = done.stdout.strip().splitlines()
    assert "triton is not importable" in reason and "pip install triton" in reason
    assert reason in error
