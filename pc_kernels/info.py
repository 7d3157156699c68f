"""`python -m pc_kernels.info`: which backends are usable here, or why not, and what `auto` picks.

It speaks of the copy that is imported, says where that is, and whether it hides another.
"""

from __future__ import annotations

import platform
import sys

import torch

from . import __version__
from .backends import BACKENDS, cuda_extension_obstacle, extension_obstacle, fastest
from .installation import PACKAGE, hidden_installation


def describe_devices() -> list[torch.device]:
    """The CPU, and the first accelerator if PyTorch sees one."""
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            devices.append(accelerator)
    return devices


def describe_extension() -> str:
    """The compiled extension in a line."""
    reason = extension_obstacle()
    if reason is not None:
        return f"not loaded: {reason}"
    from . import _C

    threads, compiler = torch.get_num_threads(), _C.compiler()
    return f"{_C.cpu_isa()} kernels, {threads} threads, built with GCC/Clang {compiler}"


def describe_cuda_extension() -> str:
    """The CUDA extension in a line."""
    reason = cuda_extension_obstacle()
    if reason is not None:
        return f"not loaded: {reason}"
    from . import _C_cuda

    version = divmod(_C_cuda.cuda_version, 1000)
    return f"kernels for {_C_cuda.architectures}, built with CUDA {version[0]}.{version[1] // 10}"


def describe_copies() -> list[str]:
    """Where the imported package is, and which one it hides."""
    lines = [f"imported    {PACKAGE}"]
    hidden = hidden_installation()
    if hidden is not None:
        lines += [
            f"hidden      {hidden}",
            "            is what is installed; Python found the source folder first, being started in",
            "            it or by PYTHONPATH. What follows is about the source folder: start elsewhere.",
        ]
    return lines


def report() -> str:
    """The whole report, as text."""
    lines = [
        f"pc_kernels  {__version__}",
        *describe_copies(),
        f"torch       {torch.__version__}",
        f"python      {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"extension   {describe_extension()}",
        f"cuda        {describe_cuda_extension()}",
    ]
    for device in describe_devices():
        lines += ["", f"backends for float32 tensors on {device.type}:"]
        default = fastest(device, torch.float32).name
        for name, backend in BACKENDS.items():
            reason = backend.obstacle(device, torch.float32)
            state = "usable" if reason is None else f"not usable: {reason}"
            mark = " (auto)" if name == default else ""
            lines.append(f"  {name:<10}  {state}{mark}")
        wide = fastest(device, torch.float64).name
        lines.append(f"  float64 tensors: auto takes {wide}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
