"""Which GPUs run what nvcc compiled: the CUDA programming guide, "Application Compatibility"."""

from __future__ import annotations

import re
from functools import cache

TEGRA = {(8, 7)}
"""Minor versions of their own that do not run what is compiled for those below."""


def runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs "sm_90", machine code, or "compute_90", PTX that its driver compiles.

    Machine code runs where the major version is the same and the minor one is not older, PTX on
    anything that is not older. Of an architecture with an "a" either runs there alone, with an "f" in
    its family: the same major version.
    """
    kind, digits, suffix = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", code).groups()  # type: ignore[union-attr]
    built = divmod(int(digits), 10)
    if built == capability:
        return True
    if suffix == "a" or built > capability:
        return False
    if kind == "compute" and not suffix:
        return True
    return built[0] == capability[0] and capability not in TEGRA


@cache
def architecture_obstacle(codes: str, capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability runs none of the codes ("sm_80;compute_90"), or None."""
    if any(runs_on(code, capability) for code in codes.split(";")):
        return None
    own = "{}.{}".format(*capability)
    return (
        f"it has no code for this GPU, of compute capability {own}: it was built for "
        f"{codes.replace(';', ', ')}; build it with TORCH_CUDA_ARCH_LIST={own}"
    )
