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
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
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
TARGET_TORCH = "0x{:02x}{:02x}000000000000".format(*map(int, OLDEST_TORCH.split(".")))
OLDEST_PYTHON = "cp310"  # whose limited API torch's `py_limited_api` stands for
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # there is none without the GIL
PROBE = """
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
    command = [*compiler, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    done = subprocess.run(command, input=PROBE, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
    said = next((line for line in lines if "error" in line), lines[0])
    return f"the compiler {compiler[0]!r} does not take C++20 (set CXX to name another): {said}"


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
    # Where a function happens to start makes a fifth of the time of short rows.
    flags += ["-falign-functions=64", "-Wall"]
    return cpp_extension.CppExtension(
        "pc_kernels._C",
        CPU_SOURCES,
        depends=glob("csrc/**/*.h", recursive=True),
        define_macros=[("TORCH_TARGET_VERSION", TARGET_TORCH)],
        extra_compile_args=flags,
        py_limited_api=LIMITED_API,
    )


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
        define_macros=[
            ("TORCH_TARGET_VERSION", TARGET_TORCH),
            ("USE_CUDA", None),
            ("PCK_CUDA_ARCHITECTURES", f'"{codes}"'),
        ],
        extra_compile_args={
            "cxx": ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall"],
            "nvcc": ["-O3", "-std=c++20", "-Xcompiler", "-fvisibility=hidden"],
        },
        py_limited_api=LIMITED_API,
    )


class Recorded(build_ext):
    """Builds what can be built, and records what came of it.

    Mixed into torch's BuildExtension: `optional` covers the errors of distutils, but neither ninja's nor
    those of torch's own checks of the compilers.
    """

    def run(self) -> None:
        """Builds, then writes the record: beside the kernels, and where those are copied to.

        What an earlier build left there goes: Python would load it, first if its name is more specific.
        """
        super().run()
        built = {Path(self.get_ext_filename(e.name)).name for e in self.extensions}
        for root in [self.build_lib, *(["."] if self.inplace else [])]:
            for library in Path(root, "pc_kernels").glob("_C*.so"):
                if library.name not in built:
                    library.unlink()
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
        """Leaves an extension out.

        Raises:
            SystemExit: its switch is 1.
        """
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"the build failed ({said}); `pip install -v --no-build-isolation .` shows more"
        kind = "cuda" if extension.name.endswith("_cuda") else "cpu"
        leave_out(kind, reason, aloud=not extension.optional)
        self.extensions = [e for e in self.extensions if e is not extension]


class RecordedPython(build_py):
    """Records what came of building no extension: build_ext does not run then."""

    def run(self) -> None:
        """Copies the package, then writes the record."""
        super().run()
        if not self.distribution.has_ext_modules():
            write_record("." if self.editable_mode else self.build_lib)


def write_record(root: str) -> None:
    """Writes `outcome`, and the oldest torch that what was built runs with, to RECORD below `root`."""
    record = {
        "torch": OLDEST_TORCH if None in outcome.values() else None,
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


def extension_arguments() -> dict[str, Any]:
    """The setup() arguments that build the extensions, or none of them."""
    extensions = planned("cpu", obstacle, cpu_extension)
    extensions += planned("cuda", cuda_obstacle, cuda_extension)
    limited = bool(extensions) and LIMITED_API
    build: type[build_ext] = Recorded
    if extensions:
        from torch.utils import cpp_extension

        build = type("RecordedBuildExtension", (Recorded, cpp_extension.BuildExtension), {})
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": build, "build_py": RecordedPython},
        "install_requires": [f"torch>={OLDEST_TORCH}", "numpy"],
        "options": {"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}} if limited else {},
        "license": "MIT",  # pyproject.toml has no way to write it that all versions of setuptools take
    }


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"pc_kernels is built with setuptools {OLDEST_SETUPTOOLS} or later, here is "
        f"{setuptools.__version__}: `pip install 'setuptools>={OLDEST_SETUPTOOLS}'`"
    )
setuptools.setup(**extension_arguments())
