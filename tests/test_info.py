"""`python -m pc_kernels.info` says what is usable, what is not and why, and what auto takes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

import pc_kernels
from pc_kernels.backends import BACKENDS, extension_obstacle, select

Run = Callable[..., Any]


def line_of(report: str, name: str) -> str:
    lines = [line for line in report.splitlines() if line.strip().startswith(name)]
    assert lines, f"no line on {name!r} in:\n{report}"
    return lines[0]


def test_report(python: Run) -> None:
    done = python("-m", "pc_kernels.info")
    assert done.returncode == 0, done.stderr
    report = done.stdout
    assert pc_kernels.__version__ in line_of(report, "pc_kernels")
    assert torch.__version__ in line_of(report, "torch")
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in line_of(report, "python")
    cpu = torch.device("cpu")
    default = select("auto", cpu, torch.float32).name
    for name, backend in BACKENDS.items():
        reason = backend.obstacle(cpu, torch.float32)
        # The backends' lines are indented; "torch" has one in the head as well.
        line = line_of(report.split("backends for float32 tensors on cpu")[1], name)
        assert ("not usable" in line) == (reason is not None)
        assert reason is None or reason in line
        assert ("(auto)" in line) == (name == default)
    assert "Traceback" not in done.stderr


@pytest.fixture
def without_extension(tmp_path: Path) -> Path:
    """A copy of the package as `pip install` leaves it where there is no compiler."""
    shutil.copytree(
        ROOT / "pc_kernels",
        tmp_path / "pc_kernels",
        ignore=shutil.ignore_patterns("_C*", "*.so", "*.pyd", "__pycache__", "distill"),
    )
    return tmp_path


# An editable install answers for submodules that the copy has not; not here.
NO_EDITABLE = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]"
)


def run_copy(python: Run, copy: Path, code: str) -> Any:
    """Code with the copy first on Python's path, and not in the checkout's folder."""
    path = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])
    return python("-P", "-c", f"{NO_EDITABLE}\n{code}", PYTHONPATH=path)


WITHOUT = """
import torch, pc_kernels
from pc_kernels import backends
assert pc_kernels.__file__.startswith({copy!r}), pc_kernels.__file__
reason = backends.extension_obstacle()
assert "not built" in reason and "compiler" in reason, reason
x = torch.randn(20, 4, requires_grad=True)
loss = pc_kernels.perception_coherence_loss(x, torch.randn(20, 3))
loss.backward()
assert loss.isfinite() and x.grad.norm() > 0
assert backends.select("auto", torch.device("cpu"), torch.float32).name == "torch"
assert pc_kernels.pairwise_dissimilarity(x).isfinite().all()
assert pc_kernels.coherence(x, x).agreement == 1
try:
    pc_kernels.perception_coherence_loss(x, x, backend="cpu")
except ValueError as error:
    assert reason in str(error), error
else:
    raise AssertionError("no error")
print("fine")
"""


def test_without_the_extension(python: Run, without_extension: Path) -> None:
    done = run_copy(python, without_extension, WITHOUT.format(copy=str(without_extension)))
    assert done.stdout.strip() == "fine", done.stderr
    as_module = "import runpy; runpy.run_module('pc_kernels.info', run_name='__main__')"
    done = run_copy(python, without_extension, as_module)
    assert done.returncode == 0, done.stderr
    assert "not built" in line_of(done.stdout, "cpu")
    assert "(auto)" in line_of(done.stdout.split("backends for")[1], "torch")


def test_an_extension_that_does_not_load(python: Run, without_extension: Path) -> None:
    """Built for another torch, say: the package works without it and tells the loader's reason."""
    broken = without_extension / "pc_kernels" / "_C.py"
    broken.write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    code = (
        "import torch, pc_kernels\n"
        "from pc_kernels import backends\n"
        "print(backends.extension_obstacle())\n"
        "print(pc_kernels.soft_rank(torch.tensor([1.0, 2.0])).tolist())\n"
    )
    done = run_copy(python, without_extension, code)
    assert done.returncode == 0, done.stderr
    reason, rank = done.stdout.strip().splitlines()
    assert "undefined symbol: _ZN3c10" in reason and "does not load" in reason
    assert rank.startswith("[")


IMPORT = """
import sys, time
import torch
started = time.perf_counter()
import pc_kernels
print(time.perf_counter() - started)
loaded = {"torch._dynamo", "torch._inductor", "triton", "pc_kernels._C"} & set(sys.modules)
assert not loaded, loaded
assert not torch.cuda.is_initialized()
"""


def test_import_is_light(python: Run) -> None:
    """At most 0.2 s over `import torch`; no compiler stack, no GPU, not even the extension."""
    times = []
    for _ in range(5):
        done = python("-c", IMPORT)
        assert done.returncode == 0, done.stderr
        times.append(float(done.stdout))
        if len(times) >= 3 and sorted(times)[len(times) // 2] <= 0.2:
            break
    assert sorted(times)[len(times) // 2] <= 0.2, times


def test_public_names() -> None:
    assert set(pc_kernels.__all__) >= {
        "PerceptionCoherenceFunction",
        "PerceptionCoherenceLoss",
        "coherence",
        "coherence_loss_from_dissimilarities",
        "hard_rank",
        "pairwise_dissimilarity",
        "perception_coherence_loss",
        "reference",
        "soft_rank",
    }
    for name in pc_kernels.__all__:
        assert getattr(pc_kernels, name).__doc__, name


def test_auto_takes_the_first_that_is_usable() -> None:
    cpu = torch.device("cpu")
    assert select("auto", cpu, torch.float64).name == "torch"
    expected = "cpu" if extension_obstacle() is None else "torch"
    assert select("auto", cpu, torch.float32).name == expected
    assert select("auto", torch.device("meta"), torch.float32).name == "torch"
