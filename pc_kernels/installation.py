"""What came of building the extensions, which copy of the package this is, and the warning about both.

setup.py leaves a record of each build beside the modules, `_build.json`; a plain copy of the sources has
none. Nothing here loads an extension.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

PACKAGE = Path(__file__).parent
BUILD = "`pip install --no-build-isolation .`"
EXTENSIONS = {"cpu": "C++", "cuda": "CUDA"}
"""The compiled extensions by the device that they serve, and what they are called."""
COSTS = {"cpu": "about 10 times slower", "cuda": "many times slower"}
NEEDS = {
    "cpu": f"{BUILD} in the source folder, with setuptools>=64, ninja and a C++20 compiler",
    "cuda": f"`pip install triton`, or {BUILD} in the source folder, with nvcc and ninja",
}


class FallbackWarning(UserWarning):
    """`backend="auto"` computes in plain PyTorch because the compiled kernels are not there."""


def read_record() -> dict[str, Any]:
    """What setup.py wrote when it built this copy of the package; empty if it did not.

    `torch` is the oldest version that its kernels run with, None if nothing was compiled; `missing` has
    the reason for each kind of kernels, "cpu" or "cuda", that was not built.
    """
    try:
        record = json.loads((PACKAGE / "_build.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def torch_is_too_old(record: dict[str, Any]) -> dict[str, str]:
    """For the kinds of kernels that were built for newer versions of torch than this: what is to be said.

    They use PyTorch's stable ABI, which later versions keep, but which an older one has less of.
    """
    oldest, here = record.get("torch"), str(torch.__version__)
    if not oldest or _minor_version(here) >= _minor_version(oldest):
        return {}
    return {
        kind: f"the {name} extension needs torch {oldest} or later, this is torch {here}"
        for kind, name in EXTENSIONS.items()
        if kind not in record.get("missing", {})
    }


def _minor_version(version: str) -> tuple[int, ...]:
    """(2, 10) of "2.10.1+cpu"."""
    return tuple(map(int, version.split(".")[:2]))


RECORD = read_record()
OLD_TORCH = torch_is_too_old(RECORD)
"""Found at import, so that torch.compile can trace whoever asks."""


def why_not_loaded(kind: str, error: ImportError) -> str:
    """Why the extension for a kind of device, "cpu" or "cuda", raised `error` when it was imported."""
    extension = f"the {EXTENSIONS[kind]} extension"
    if not _absent(error):
        return f"{extension} does not load with torch {torch.__version__}: {error}"
    hidden = hidden_installation()
    if hidden is None:
        return f"{extension} {_why_absent(kind)}"
    why = _why_absent(kind) if RECORD else "was not built here"
    return (
        f"{extension} {why}: this is the source folder {PACKAGE}, which hides the installed {hidden}: "
        "start elsewhere, or build in place with `pip install --no-build-isolation -e .`"
    )


def _absent(error: ImportError) -> bool:
    """Whether there is no extension; else there is one, and something in it failed."""
    return "cannot import name '_C" in str(error)


def _why_absent(kind: str) -> str:
    """What setup.py said when it did not build the extension, or what else can be said."""
    generic = f"install with a C++ compiler and {BUILD}"
    if kind == "cuda":
        generic = f"install with nvcc and a CUDA build of torch at hand, with {BUILD}"
    if not RECORD:
        return f"was not built: {generic}"
    reason = RECORD.get("missing", {}).get(kind)
    if reason is not None:
        return f"was not built: {reason}"
    return f"was built, but is not there any more: build it again with {BUILD}"


def hidden_installation() -> Path | None:
    """The installed copy, if what is imported is a source folder that comes before it on sys.path."""
    here = PACKAGE.resolve()
    if not (here.parent / "setup.py").exists():
        return None
    for distribution in metadata.distributions(name="pc_kernels"):
        source = _editable_source(distribution)
        folder = Path(str(distribution.locate_file("pc_kernels"))) if source is None else source
        if folder.resolve() != here and (folder / "__init__.py").exists():
            return folder
        if source is not None:  # here, and installed in place
            return None
    return None


def _editable_source(distribution: metadata.Distribution) -> Path | None:
    """The source folder that an editable installation refers to; None if it is not one."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(url2pathname(urlparse(origin["url"]).path)) / "pc_kernels"


_warned: set[str] = set()


def warn_of_fallback(device_type: str, reason: str) -> None:
    """Says once per process and kind of device that `auto` took the slow way, and why.

    Args:
        device_type: "cpu" or "cuda".
        reason: why its compiled kernels are not usable.
    """
    needs = "" if "`pip install" in reason else f"To get them: {NEEDS[device_type]}. "
    message = (
        f"pc_kernels: {device_type} tensors go to backend='torch', {COSTS[device_type]} than the "
        f"{EXTENSIONS[device_type]} kernels would be: {reason}. {needs}"
        "To silence this: pass backend='torch', or "
        "warnings.filterwarnings('ignore', message='pc_kernels')."
    )
    warn_once(device_type, message, FallbackWarning)


def warn_once(about: str, message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line that called this package, if it has not warned about this before."""
    if not torch.compiler.is_compiling() and about not in _warned:
        _warned.add(about)
        warnings.warn(message, category, stacklevel=_level_of_the_caller())


def _level_of_the_caller() -> int:
    """The `stacklevel` that names the line which called this package."""
    inside = tuple(f"{folder}{os.sep}" for folder in (PACKAGE, Path(torch.__file__).parent))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level
