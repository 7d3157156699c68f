"""The CUDA sources as far as a machine without a GPU can tell: races, compilation, the build's choice."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_counts
import pytest
import torch
from ahead_of_time import nvidia_tool
from shim import FLAGS, KERNELS, ROOT, build, compiler
from torch.utils import cpp_extension

import pc_kernels
from pc_kernels.backends import BACKENDS, cuda_extension_obstacle, triton_obstacle
from pc_kernels.backends.architectures import runs_on

ARCHITECTURES = ["80", "90", "100", "120"]


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
    """For every architecture; no kernel keeps registers in memory. The loss kernel costs what is said."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [nvcc(), "-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v", "--threads", "2"]
    command += [*targets, "-fatbin", str(source), "-o", str(tmp_path / "kernels.fatbin")]
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
    if source == cuda_counts.SOURCE and triton_obstacle() is None:
        extract = [str(nvidia_tool("cuobjdump")), "-xelf", "sm_90", "kernels.fatbin"]
        subprocess.run(extract, cwd=tmp_path, check=True, capture_output=True)
        counts = cuda_counts.counted(next(tmp_path.glob("*.cubin")))
        assert sum(counts.values()) <= 535, counts  # docs/gpu.md


def test_the_operators_compile(tmp_path: Path) -> None:
    """Their sources against this torch's headers: they can only be linked with a CUDA build."""
    command = [nvcc(), "--dryrun", "-x", "cu", "-c", os.devnull]
    listing = subprocess.run(command, capture_output=True, text=True).stderr
    home = re.search(r"^#\$ TOP=(.+)$", listing, re.MULTILINE)
    if home is None or not (Path(home.group(1)) / "include/cuda_runtime_api.h").exists():
        pytest.skip("no CUDA headers beside nvcc")
    toolkit = Path(home.group(1)) / "include"
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-DUSE_CUDA", f"-I{include}", f"-I{toolkit}"]
    command = [compiler(), *flags, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    sources = [str(ROOT / "csrc/cuda" / name) for name in ("ops.cpp", "points_ops.cpp")]
    done = subprocess.run([*command, *sources], capture_output=True, text=True)
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


RUNS = {
    "sm_80": [(8, 0), (8, 6), (8, 9)],
    "sm_86": [(8, 6), (8, 9)],
    "sm_87": [(8, 7), (8, 9)],
    "sm_90": [(9, 0)],
    "sm_90a": [(9, 0)],
    "sm_100": [(10, 0), (10, 3)],
    "sm_100a": [(10, 0)],
    "sm_100f": [(10, 0), (10, 3)],
    "sm_103": [(10, 3)],
    "sm_120": [(12, 0), (12, 1)],
    "compute_90": [(9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)],
    "compute_90a": [(9, 0)],
    "compute_120": [(12, 0), (12, 1)],
}
"""Of GPUS, those that run each code."""
GPUS = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]


@pytest.mark.parametrize("code", RUNS)
def test_which_gpus_run_a_code(code: str) -> None:
    assert [gpu for gpu in GPUS if runs_on(code, gpu)] == RUNS[code]


def test_a_gpu_without_code_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before anything is launched, in words; `auto` goes on to the next backend."""
    module = SimpleNamespace(architectures="sm_80;sm_90;sm_120;compute_120")
    monkeypatch.setattr(pc_kernels, "_C_cuda", module, raising=False)
    monkeypatch.setattr("pc_kernels.backends.compiled.cuda_extension_obstacle", lambda: None)
    device, capability = torch.device("cuda"), [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    assert BACKENDS["cuda"].obstacle(device, torch.float32) is None
    for gpu in [(10, 0), (10, 3), (7, 5)]:
        capability[0] = gpu
        reason = str(BACKENDS["cuda"].obstacle(device, torch.float32))
        assert "no code for this GPU, of compute capability {}.{}".format(*gpu) in reason
        assert "sm_80, sm_90, sm_120, compute_120" in reason
        assert reason.endswith("TORCH_CUDA_ARCH_LIST={}.{}".format(*gpu))


def test_what_is_compiled_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Recorded as nvcc is told, names included; by default every GPU from 8.0 on has code."""
    monkeypatch.setenv("PC_KERNELS_CUDA", "0")
    monkeypatch.setenv("PC_KERNELS_CPU", "0")
    monkeypatch.setattr("setuptools.setup", lambda **given: None)
    monkeypatch.chdir(tmp_path)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    extension = setup["cuda_extension"]
    known = "\n".join(f"compute_{a}" for a in (75, 80, 86, 90, 100, 103, 110, 120, 121))
    monkeypatch.setitem(extension.__globals__, "ask_nvcc", lambda *_: known)
    monkeypatch.setattr(cpp_extension, "CUDAExtension", lambda *_, **given: given["define_macros"])
    wanted = {
        "": ["compute_120", "sm_100", "sm_120", "sm_80", "sm_90"],
        "Hopper": ["compute_90", "sm_90"],
        "8.6, 9.0a": ["sm_86", "sm_90a"],
    }
    for asked, codes in wanted.items():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        recorded = dict(extension())["PCK_CUDA_ARCHITECTURES"].strip('"').split(";")
        assert sorted(recorded) == codes
    assert all(any(runs_on(c, gpu) for c in wanted[""]) for gpu in [(8, 9), (10, 3), (12, 1)])


def setup_py(**environment: str) -> subprocess.CompletedProcess[str]:
    """Asks setup.py for the package's name, which makes it decide what it would build."""
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
