"""What a result was measured on: device, versions, commit. No host names, no paths."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import pc_kernels
from pc_kernels.backends import extension_obstacle

ROOT = Path(__file__).resolve().parent.parent


def _processor() -> str:
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The model of the processor or of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def file_stem(device: torch.device, threads: int) -> str:
    """What the result files are called: the device, and on a CPU the threads."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return slug if device.type == "cuda" else f"{slug}-{threads}t"


def threads(about: dict[str, Any]) -> str:
    """Their number, in words."""
    return f"{about['threads']} thread{'' if about['threads'] == 1 else 's'}"


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _kernels() -> str | None:
    if extension_obstacle() is not None:
        return None
    from pc_kernels import _C

    return _C.cpu_isa()


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """Everything that a reader of the numbers may ask."""
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    about: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(pages / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "pc_kernels": pc_kernels.__version__,
        "pc_kernels_simd": _kernels(),
        "torchsort": _version("torchsort"),
        "triton": _version("triton"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(changed) if changed is not None else None,
        "float32_products": torch.backends.cuda.matmul.fp32_precision
        if device.type == "cuda"
        else torch.backends.mkldnn.matmul.fp32_precision,
    }
    if device.type == "cuda":
        about["gpu_memory_gib"] = round(torch.cuda.mem_get_info(device)[1] / 2**30, 1)
        about["cuda"] = torch.version.cuda
        about["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return about
