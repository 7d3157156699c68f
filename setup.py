"""Builds the optional C++ extension; everything else about the package is in pyproject.toml.

What is built follows from the toolchain and from the torch at hand, never from whether a device is
visible. Without torch or without a compiler the package installs in pure Python and says so;
`python -m pc_kernels.info` repeats the reason later.

    PC_KERNELS_CPU=auto|0|1     auto (default): build if possible; 1: fail loudly if not
"""

import os
import shutil
import sys
from glob import glob

from setuptools import setup

CPU_SOURCES = ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))]


def wanted(variable: str) -> str:
    """The value of a build switch, checked."""
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        sys.exit(f"{variable} must be auto, 0 or 1, got {value!r}")
    return value


def obstacle() -> str | None:
    """Why the extension cannot be built here, or None."""
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


def extension_arguments() -> dict:
    """The setup() arguments that build the extension, or none of them."""
    choice = wanted("PC_KERNELS_CPU")
    reason = "PC_KERNELS_CPU=0" if choice == "0" else obstacle()
    if reason is not None:
        if choice == "1":
            sys.exit(f"PC_KERNELS_CPU=1, but the CPU kernels cannot be built: {reason}")
        print(f"pc_kernels: installing without the CPU kernels: {reason}", file=sys.stderr)
        return {}

    from torch.utils import cpp_extension

    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    extension = cpp_extension.CppExtension(
        "pc_kernels._C",
        CPU_SOURCES,
        depends=glob("csrc/**/*.h", recursive=True),
        extra_compile_args=[*flags, "-Wall", *openmp],
        extra_link_args=openmp,
    )
    extension.optional = choice == "auto"  # a compiler that fails leaves a working package
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
    }


setup(**extension_arguments())
