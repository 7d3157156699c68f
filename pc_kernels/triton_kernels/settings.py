"""Launch settings: block sizes, numbers of programs, and tuning over a short list.

A kernel's first launch at a size times the candidates and keeps the fastest. The first candidate serves
untimed where timing is impossible (during the capture of a CUDA graph, in the interpreter) and under
deterministic algorithms: sums in blocks of another size round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)

SCRATCH_BYTES = 256 << 20
"""The most scratch memory that all programs together may take."""

REGISTERS = 128
"""What NVIDIA's assembler may take for a thread. Told nothing, it spills some for more resident warps."""

RESIDENT_WARPS = 16
"""What a multiprocessor has registers for then."""

LONG = 8192
"""References of a row that is not one of the longest."""

THREADS = 32
"""Of a warp. (AMD's has 64; copies inside a warp do no harm, for it loads and stores as one.)"""


@dataclass(frozen=True)
class Setting:
    """The sizes of a kernel's blocks, and its warps."""

    block: int
    """References in a block."""
    pairs: int
    """References compared with a block at a time, where all pairs are compared."""
    warps: int


LONG_ROWS = (Setting(128, 4, 4),)
"""Wider blocks are half wasted on a row's grid; narrower ones take more programs, and scratch memory."""

LONGEST_ROWS = (Setting(256, 4, 8), Setting(128, 4, 4))
"""Of more than `LONG` references: there scratch memory leaves room for few programs."""

COMPARED_ROWS = (Setting(512, 8, 8),)
SHORT_ROWS = (Setting(128, 16, 4), Setting(64, 16, 2))


@dataclass(frozen=True)
class Tile:
    """The sizes of a tile of pairs, and the warps that compute it."""

    anchors: int
    references: int
    warps: int


STRAIGHT_TILE = Tile(32, 64, 4)

_chosen: dict[Hashable, Setting] = {}


def power_of_two_above(count: int, least: int, most: int) -> int:
    """The smallest power of two ≥ count, within bounds."""
    return min(max(1 << (count - 1).bit_length(), least), most)


def warps_of(block: int, most: int) -> int:
    """Warps for a block: none has only copies of another's elements.

    Where threads share an element, all of them load it and one stores it. In place that is a race: who
    comes late loads what has been stored.
    """
    return max(1, min(most, block // THREADS))


def long_rows(count: int) -> tuple[Setting, ...]:
    """Settings for rows of `count` that go by grid or buckets."""
    return trimmed(LONG_ROWS if count <= LONG else LONGEST_ROWS, count)


def trimmed(settings: tuple[Setting, ...], count: int) -> tuple[Setting, ...]:
    """Blocks no longer than rows of `count`, with no more warps than they need, without repetition."""
    longest = power_of_two_above(count, THREADS, 1 << 20)
    blocks = [(min(s.block, longest), s) for s in settings]
    return tuple(dict.fromkeys(Setting(b, s.pairs, warps_of(b, s.warps)) for b, s in blocks))


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 1


def resident(device: torch.device, warps: int) -> int:
    """How many programs of so many warps the device runs at a time."""
    return max(1, RESIDENT_WARPS * _processors(device) // warps)


def compiler_options(device: torch.device) -> dict[str, Any]:
    """How kernels of rows are compiled there."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return {"enable_fp_fusion": True} | ({"maxnreg": REGISTERS} if nvidia else {})


def programs(
    device: torch.device, rows: int, settings: tuple[Setting, ...], scratch_bytes: int
) -> int:
    """How many programs may share the rows: few enough for the scratch memory, whatever the setting.

    Args:
        device: where they run.
        rows: how many rows there are.
        settings: what they are launched with.
        scratch_bytes: what one of them needs.
    """
    room = max(1, SCRATCH_BYTES // max(scratch_bytes, 1))
    return max(1, min(rows, room, max(resident(device, s.warps) for s in settings)))


def tuned(
    key: Hashable,
    candidates: tuple[Setting, ...],
    launch: Callable[[Setting], None],
    overwritten: Tensor,
) -> Setting:
    """The best setting known for `key`; finds it first if this is the first time.

    Args:
        key: what the best setting depends on.
        candidates: settings to choose from, the safest first.
        launch: runs the kernel, to be timed.
        overwritten: what the kernel then reads and overwrites; it is left as it was.
    """
    if key not in _chosen and _may_time(overwritten.device, candidates):
        _chosen[key] = _fastest(candidates, launch, overwritten)
    return _chosen.get(key, candidates[0])


def _may_time(device: torch.device, candidates: tuple[Setting, ...]) -> bool:
    if len(candidates) == 1 or INTERPRETED or torch.are_deterministic_algorithms_enabled():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _fastest(
    candidates: tuple[Setting, ...], launch: Callable[[Setting], None], overwritten: Tensor
) -> Setting:
    before = overwritten.clone()

    def time_of(setting: Setting) -> float:
        def once() -> None:
            overwritten.copy_(before)
            launch(setting)

        return float(triton.testing.do_bench(once, warmup=5, rep=20, return_mode="median"))

    best = min(candidates, key=time_of)
    overwritten.copy_(before)
    return best
