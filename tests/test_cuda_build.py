"""The CUDA sources as far as a machine without a GPU can tell: races, compilation, the build's choice."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shim import FLAGS, KERNELS, ROOT, SHIM, build, compiler

import pc_kernels
from pc_kernels.backends import BACKENDS, cuda_extension_obstacle

ARCHITECTURES = ["80", "90", "120"]


def test_no_races(tmp_path: Path) -> None:
    """Every kernel under ThreadSanitizer, in both memories."""
    probe = tmp_path / "probe.cpp"
    probe.write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")
    flags = ["-fsanitize=thread", "-O1", "-g"]
    command = [compiler(), *FLAGS, *flags, str(probe), "-o", str(tmp_path / "probe")]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode != 0:
        pytest.skip(f"no ThreadSanitizer: {compiled.stderr.strip().splitlines()[-1]}")
    ran = subprocess.run([str(tmp_path / "probe")], capture_output=True, text=True)
    if ran.returncode != 0:
        pytest.skip(f"ThreadSanitizer does not run here: {ran.stderr.strip()[:200]}")
    program = build("races.cpp", *flags, warp=8)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert "WARNING: ThreadSanitizer" not in done.stderr, done.stderr[:4000]
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[:4000]


def nvcc() -> str:
    """The CUDA compiler, or a skip."""
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("no nvcc on PATH")
    return found


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_compiles_without_spills(source: Path, tmp_path: Path) -> None:
    """For every architecture; no kernel keeps registers in memory."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [nvcc(), "-std=c++20", "-O3", "-Xptxas", "-v", "--threads", "2", *targets]
    command += ["-fatbin", str(source), "-o", str(tmp_path / "kernels.fatbin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    kernels = re.findall(r"Function properties for (\S*kernel\S*)\n(.*)", done.stderr)
    assert kernels or "launch" in source.stem
    assert len(kernels) % len(ARCHITECTURES) == 0
    spilling = [
        k for k in kernels if not k[1].strip().startswith("0 bytes stack frame, 0 bytes spill")
    ]
    assert not spilling, spilling


def test_the_operators_compile(tmp_path: Path) -> None:
    """csrc/cuda/ops.cpp against this torch's headers: it can only be linked with a CUDA build."""
    command = [nvcc(), "--dryrun", "-x", "cu", "-c", os.devnull]
    listing = subprocess.run(command, capture_output=True, text=True).stderr
    home = re.search(r"^#\$ TOP=(.+)$", listing, re.MULTILINE)
    if home is None or not (Path(home.group(1)) / "include/cuda_runtime_api.h").exists():
        pytest.skip("no CUDA headers beside nvcc")
    toolkit = Path(home.group(1)) / "include"
    include = Path(torch.__file__).parent / "include"
    folders = [include, include / "torch/csrc/api/include", toolkit]
    if not (include / "c10/cuda/CUDAGuard.h").exists():
        pytest.skip("this torch has no c10/cuda headers")
    if torch.version.cuda is None:
        folders.insert(0, SHIM / "torch")
    command = [compiler(), "-std=c++20", "-fsyntax-only", "-Wall", *(f"-I{f}" for f in folders)]
    done = subprocess.run(
        [*command, str(ROOT / "csrc/cuda/ops.cpp")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:4000]


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
def test_cuda_wanted_of_a_cpu_torch_fails_loudly() -> None:
    done = setup_py(PC_KERNELS_CUDA="1")
    assert done.returncode != 0
    assert "PC_KERNELS_CUDA=1, but" in done.stderr and "torch" in done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is not built for CUDA")
def test_cuda_wanted_without_nvcc_fails_loudly(tmp_path: Path) -> None:
    for name in ("c++", "g++", "cc", "gcc", "as", "ld"):
        if (tool := shutil.which(name)) is not None:
            (tmp_path / name).symlink_to(tool)
    done = setup_py(PC_KERNELS_CUDA="1", PATH=str(tmp_path), CUDA_HOME="", CUDA_PATH="")
    assert done.returncode != 0
    assert "PC_KERNELS_CUDA=1, but" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
def test_a_cpu_torch_builds_no_cuda() -> None:
    done = setup_py()
    assert done.returncode == 0, done.stderr
    assert "without the CUDA kernels" in done.stderr and "CPU build" in done.stderr


def test_the_switch_is_checked() -> None:
    done = setup_py(PC_KERNELS_CUDA="yes")
    assert done.returncode != 0 and "PC_KERNELS_CUDA must be auto, 0 or 1" in done.stderr


def test_the_backend_says_why_it_is_not_usable() -> None:
    backend = BACKENDS["cuda"]
    assert "got device cpu" in str(backend.obstacle(torch.device("cpu"), torch.float32))
    if cuda_extension_obstacle() is not None:
        reason = str(backend.obstacle(torch.device("cuda"), torch.float32))
        assert "CUDA extension" in reason or "ROCm" in reason
    with pytest.raises(ValueError, match="backend 'cuda' is not usable here"):
        pc_kernels.hard_rank(torch.zeros(3), backend="cuda")
    assert list(BACKENDS).index("cuda") < list(BACKENDS).index("torch")


def setup_py(**environment: str) -> subprocess.CompletedProcess[str]:
    """Asks setup.py for the package's name, which makes it decide what it would build."""
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
