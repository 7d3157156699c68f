"""Builds the optional extensions; everything else about the package is in pyproject.toml.

What is built follows from the toolchain and from the torch at hand, never from whether a device is
visible. Without torch or without a compiler the package installs in pure Python and says so;
`python -m pc_kernels.info` repeats the reason later.

    PC_KERNELS_CPU=auto|0|1     auto (default): build if possible; 1: fail loudly if not
    PC_KERNELS_CUDA=auto|0|1    the same for the CUDA kernels: they need nvcc and a CUDA build of torch
    TORCH_CUDA_ARCH_LIST        what the CUDA kernels are compiled for, instead of CUDA_ARCHITECTURES
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from glob import glob
from typing import Any

from setuptools import setup

CPU_SOURCES = ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu"))
CUDA_ARCHITECTURES = ["8.0", "9.0", "12.0"]


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
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} is not on PATH (set CXX to name another)"
    try:
        import torch  # noqa: F401 - only whether it is there matters
    except ImportError:
        return (
            "torch is not importable in the build environment; with torch installed, build with "
            "`pip install --no-build-isolation`"
        )
    return None


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
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    return cpp_extension.CppExtension(
        "pc_kernels._C",
        CPU_SOURCES,
        depends=glob("csrc/**/*.h", recursive=True),
        extra_compile_args=[*flags, "-Wall", *openmp],
        extra_link_args=openmp,
    )


def cuda_extension() -> Any:
    """The CUDA kernels, pc_kernels._C_cuda: a module of its own, so that it may fail on its own."""
    from torch.utils import cpp_extension

    # torch may have guessed another toolkit, or a wrapper's folder.
    home = re.search(r"^#\$ TOP=(.+)$", ask_nvcc("--dryrun", "-x", "cu", "-c", os.devnull), re.M)
    if home is not None:
        cpp_extension.CUDA_HOME = os.path.normpath(home.group(1))
    architectures = ";".join(cuda_architectures())
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    return cpp_extension.CUDAExtension(
        "pc_kernels._C_cuda",
        CUDA_SOURCES,
        depends=glob("csrc/*.h") + glob("csrc/cuda/*.*h"),
        define_macros=[("PCK_CUDA_ARCHITECTURES", f'"{architectures}"')],
        extra_compile_args={
            "cxx": ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall"],
            "nvcc": ["-O3", "-std=c++20", "-Xcompiler", "-fvisibility=hidden"],
        },
    )


def planned(switch: str, what: str, reason: str | None, make: Callable[[], Any]) -> list[Any]:
    """The extension that `make` gives, or none: as the switch says, and aloud."""
    choice = wanted(switch)
    if choice == "0":
        reason = f"{switch}=0"
    if reason is not None:
        if choice == "1":
            sys.exit(f"{switch}=1, but the {what} kernels cannot be built: {reason}")
        print(f"pc_kernels: installing without the {what} kernels: {reason}", file=sys.stderr)
        return []
    extension = make()
    extension.optional = choice == "auto"  # a compiler that fails leaves a working package
    return [extension]


def extension_arguments() -> dict[str, Any]:
    """The setup() arguments that build the extensions, or none of them."""
    extensions = planned("PC_KERNELS_CPU", "CPU", obstacle(), cpu_extension)
    extensions += planned("PC_KERNELS_CUDA", "CUDA", cuda_obstacle(), cuda_extension)
    if not extensions:
        return {}
    from torch.utils import cpp_extension

    return {"ext_modules": extensions, "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**extension_arguments())
