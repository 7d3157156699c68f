"""Builds the optional extensions; everything else about the package is in pyproject.toml.

What is built follows from the toolchain and from the torch at hand, never from whether a device is
visible. Without torch, or where the compiler is missing or fails, the package installs in pure Python
and says so. What became of each extension is recorded in pc_kernels/_build.json, in the wheel or beside
the sources: `python -m pc_kernels.info` and the backends' errors repeat it (pc_kernels/installation.py).

    PC_KERNELS_CPU=auto|0|1     auto (default): build if possible; 1: fail loudly if not
    PC_KERNELS_CUDA=auto|0|1    the same for the CUDA kernels: they need nvcc and a CUDA build of torch
    TORCH_CUDA_ARCH_LIST        what the CUDA kernels are compiled for, instead of CUDA_ARCHITECTURES
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

OLDEST_SETUPTOOLS = 64  # the first that installs a package in place from pyproject.toml
OLDEST_TORCH = "2.10"
RECORD = "pc_kernels/_build.json"
CPU_SOURCES = ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu"))
CUDA_ARCHITECTURES = ["8.0", "9.0", "10.0", "12.0"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
PROBE = """
#ifdef _OPENMP
#include <omp.h>
#endif
template <typename T> concept Any = true;
int main() {}
"""
"""What a compiler that is good for the kernels accepts."""

outcome: dict[str, str | None] = {}
"""Why each kind of kernels, "cpu" and "cuda", is not built; None where it is."""


def wanted(variable: str) -> str:
    """The value of a build switch, checked."""
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        sys.exit(f"{variable} must be auto, 0 or 1, got {value!r}")
    return value


def obstacle() -> str | None:
    """Why no extension can be built here, or None."""
    if sys.platform == "win32":
        return "the kernels use GCC/Clang vector extensions, which MSVC lacks"
    try:
        import torch  # noqa: F401 - only whether it is there matters
    except ImportError:
        return (
            "torch is not importable in the build environment; with torch installed, build with "
            "`pip install --no-build-isolation .`"
        )
    return compiler_obstacle()


def compiler_obstacle() -> str | None:
    """Why the C++ compiler will not do, or None."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler: {compiler[0]!r} is not on PATH (set CXX to name another)"
    command = [*compiler, "-std=c++20", *OPENMP, "-x", "c++", "-fsyntax-only", "-"]
    done = subprocess.run(command, input=PROBE, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
    said = next((line for line in lines if "error" in line), lines[0])
    need = "C++20 with OpenMP" if OPENMP else "C++20"
    return f"the compiler {compiler[0]!r} does not take {need} (set CXX to name another): {said}"


def ask_nvcc(*arguments: str) -> str:
    """What nvcc says; empty if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None:
        return ""
    done = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be built here, or None."""
    reason = obstacle()
    if reason is not None:
        return reason
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build (a CPU build or ROCm)"
    release = re.search(r"release (\d+)\.", ask_nvcc("--version"))
    if release is None:
        return "no nvcc: it has to be on PATH, or in bin under CUDA_HOME if that is set"
    if release.group(1) != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release.group(1)}, torch is built for CUDA {torch.version.cuda}"
    return None


def cuda_architectures() -> list[str]:
    """What the user asks for, or those of CUDA_ARCHITECTURES that nvcc knows, the last with PTX."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", " ").replace(";", " ").split()
    known = ask_nvcc("--list-gpu-arch").split()
    usable = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    return asked or [*usable[:-1], f"{usable[-1]}+PTX"]


def cpu_extension() -> Any:
    """The C++ kernels, pc_kernels._C."""
    from torch.utils import cpp_extension

    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    return cpp_extension.CppExtension(
        "pc_kernels._C",
        CPU_SOURCES,
        depends=glob("csrc/**/*.h", recursive=True),
        define_macros=[for_torch()],
        extra_compile_args=[*flags, "-Wall", *OPENMP],
        extra_link_args=OPENMP,
    )


def for_torch() -> tuple[str, str]:
    """A macro that nothing reads: with another torch the commands differ, and ninja compiles anew."""
    return "PCK_TORCH", torch_version().replace("+", "_")


def torch_version() -> str:
    """Of the torch that is compiled against."""
    import torch

    return str(torch.__version__)


def cuda_extension() -> Any:
    """The CUDA kernels, pc_kernels._C_cuda: a module of its own, so that it may fail on its own."""
    from torch.utils import cpp_extension

    # torch may have guessed another toolkit, or a wrapper's folder.
    home = re.search(r"^#\$ TOP=(.+)$", ask_nvcc("--dryrun", "-x", "cu", "-c", os.devnull), re.M)
    if home is not None:
        cpp_extension.CUDA_HOME = os.path.normpath(home.group(1))
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(cuda_architectures())
    codes = ";".join(re.findall(r",code=(\w+)", " ".join(cpp_extension._get_cuda_arch_flags())))
    return cpp_extension.CUDAExtension(
        "pc_kernels._C_cuda",
        CUDA_SOURCES,
        depends=glob("csrc/*.h") + glob("csrc/cuda/*.*h"),
        define_macros=[("PCK_CUDA_ARCHITECTURES", f'"{codes}"'), for_torch()],
        extra_compile_args={
            "cxx": ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall"],
            "nvcc": ["-O3", "-std=c++20", "-Xcompiler", "-fvisibility=hidden"],
        },
    )


class Recorded(build_ext):
    """Builds what can be built, and records what came of it.

    Mixed into torch's BuildExtension: `optional` covers the errors of distutils, but neither ninja's nor
    those of torch's own checks of the compilers.
    """

    def initialize_options(self) -> None:
        """Nothing given up yet."""
        super().initialize_options()
        self.given_up: list[str] = []

    def finalize_options(self) -> None:
        """Builds anew what was built for another torch, or for who knows which."""
        super().finalize_options()
        try:
            before = json.loads(Path(self.build_lib, RECORD).read_text("utf-8"))["torch"]
        except (OSError, ValueError, KeyError):
            before = None
        self.force = self.force or (bool(self.extensions) and before != torch_version())

    def run(self) -> None:
        """Builds, then writes the record: beside the kernels, and where those are copied to."""
        super().run()
        for root in [self.build_lib, *(["."] if self.inplace else [])]:
            for library in self.given_up:
                Path(root, library).unlink(missing_ok=True)
            write_record(root)

    def build_extensions(self) -> None:
        """All of them; torch's checks fail for all, and the CUDA kernels have more of them."""
        while self.extensions:
            try:
                super().build_extensions()
                return
            except Exception as error:
                self.give_up(self.extensions[-1], error)

    def build_extension(self, extension: Any) -> None:
        """One of them, or the reason why not."""
        try:
            super().build_extension(extension)
        except Exception as error:
            self.give_up(extension, error)

    def give_up(self, extension: Any, error: Exception) -> None:
        """Leaves an extension out; `run` removes what an earlier build made of it.

        Raises:
            SystemExit: its switch is 1.
        """
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"the build failed ({said}); `pip install -v --no-build-isolation .` shows more"
        kind = "cuda" if extension.name.endswith("_cuda") else "cpu"
        leave_out(kind, reason, aloud=not extension.optional)
        self.extensions = [e for e in self.extensions if e is not extension]
        self.given_up.append(self.get_ext_filename(extension.name))


class RecordedPython(build_py):
    """Records what came of building no extension: build_ext does not run then."""

    def run(self) -> None:
        """Copies the package, then writes the record."""
        super().run()
        if not self.distribution.has_ext_modules():
            write_record("." if self.editable_mode else self.build_lib)


def write_record(root: str) -> None:
    """Writes `outcome`, and what was built with, to RECORD below `root`."""
    built = None in outcome.values()
    record = {
        "python": platform.python_version(),
        "torch": torch_version() if built else None,
        "missing": {kind: reason for kind, reason in outcome.items() if reason is not None},
    }
    path = Path(root, RECORD)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def leave_out(kind: str, reason: str, aloud: bool) -> None:
    """Notes why the kernels of a kind are not built, or stops there.

    Raises:
        SystemExit: they are asked for, `aloud`.
    """
    if aloud:
        switch = f"PC_KERNELS_{kind.upper()}"
        sys.exit(f"{switch}=1, but the {kind.upper()} kernels cannot be built: {reason}")
    outcome[kind] = reason
    print(f"pc_kernels: without the {kind.upper()} kernels: {reason}", file=sys.stderr)


def planned(
    kind: str, obstacle_of_kind: Callable[[], str | None], make: Callable[[], Any]
) -> list[Any]:
    """The extension that `make` gives, or none: as its switch says, and aloud."""
    switch = f"PC_KERNELS_{kind.upper()}"
    choice = wanted(switch)
    reason = f"{switch}=0 when it was built" if choice == "0" else obstacle_of_kind()
    if reason is not None:
        leave_out(kind, reason, aloud=choice == "1")
        return []
    extension = make()
    extension.optional = choice == "auto"  # a compiler that fails leaves a working package
    outcome[kind] = None
    return [extension]


def requirements(extensions: list[Any]) -> list[str]:
    """What the package needs: with kernels, the minor version of torch that they are compiled for.

    PyTorch promises no binary compatibility of its C++ library between minor versions.
    """
    torch = f"torch>={OLDEST_TORCH}"
    if extensions:
        torch = "torch=={}.{}.*".format(*torch_version().split(".")[:2])
    return [torch, "numpy"]


def extension_arguments() -> dict[str, Any]:
    """The setup() arguments that build the extensions, or none of them."""
    extensions = planned("cpu", obstacle, cpu_extension)
    extensions += planned("cuda", cuda_obstacle, cuda_extension)
    build: type[build_ext] = Recorded
    if extensions:
        from torch.utils import cpp_extension

        build = type("RecordedBuildExtension", (Recorded, cpp_extension.BuildExtension), {})
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": build, "build_py": RecordedPython},
        "install_requires": requirements(extensions),
        "license": "MIT",  # pyproject.toml has no way to write it that all versions of setuptools take
    }


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"pc_kernels is built with setuptools {OLDEST_SETUPTOOLS} or later, here is "
        f"{setuptools.__version__}: `pip install 'setuptools>={OLDEST_SETUPTOOLS}'`"
    )
setuptools.setup(**extension_arguments())
