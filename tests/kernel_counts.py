"""Machine instructions and barriers of the Triton kernels, counted without a GPU.

    python tests/kernel_counts.py [--targets 80 90] [--length 8192] [--loops]

The assembler's code says of each instruction which line it comes from. A loop is what a branch backwards
spans; it belongs to the `for` of its line, whose bound, by its text, tells how often it runs. What is
counted is a row at temperature 0.1 on the grid: an everyday one, no two points near each other, and those
of long_rows.py.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ahead_of_time import (
    ARCHITECTURES,
    COHERENCE,
    TEACHER,
    VARIANTS,
    compiled,
    nvidia,
    nvidia_tool,
    settings_of,
    usage,
)
from long_rows import LENGTH, LONG_ROWS, MOST_SPLITS, Work

KERNELS = (("hard_rank", TEACHER), ("coherence_rows", COHERENCE))
EVERYDAY = Work(fullest=7)
STENCIL, TAPS = 8, 137
WORKS = {name: row.work for name, row in LONG_ROWS.items()}
WORKS["as many splits as there can be"] = Work(MOST_SPLITS, 16)

RARE = ("measure_near", "squared_distances", "pair_sums", "pair_slopes", "rank_all_pairs")
RARE += ("store_undefined", "extent_beside_infinities")
"""Functions whose loops none of these rows runs."""

BUCKETS = ("fill", "count_in_buckets", "starts_of", "put_in_order", "rank_in_buckets")
"""Functions whose loops a row of equal values does not run."""

TWICE = ("measured", "row_loss", "pushes", "store_gradient")
"""Functions that a kernel has twice; the faster is the everyday one: not far, no sums over pairs."""


def settings_for(length: int) -> tuple[Any, ...]:
    """What rows of a length may be launched with."""
    from pc_kernels.triton_kernels.settings import long_rows

    return long_rows(length)


def bounds(length: int, work: Work) -> dict[str, int]:
    """How far the loops of the kernels run, by the text of their bound."""
    return {
        "row.count": length,
        "row.count * LANES": length,
        "number": length,
        "number + 2": length,
        "largest": work.fullest,
        "largest > CROWD": max(work.splits, 0),
        "cells * TERMS": 4 * work.cells,
        "cells": work.cells,
        "nodes": work.cells + STENCIL - 1,
        "2 * BAND + 1": TAPS,
        "2 * BAND + TAP_BLOCK": TAPS + 15,
    }


@dataclass
class Instruction:
    """One of the machine's, and the line it comes from."""

    file: str
    line: int
    text: str


@dataclass(frozen=True)
class Loop:
    """A span of instructions and the `for` it comes from."""

    first: int
    last: int
    function: str
    bound: str
    step: int

    def holds(self, other: Loop) -> bool:
        return self.first <= other.first and other.last <= self.last


@cache
def disassembled(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """A kernel's instructions, and where its labels stand among them."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    file, line = "", 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as image:
        image.write(cubin)
        image.flush()
        command = [str(nvidia_tool("nvdisasm")), "-g", "-c", image.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for row in text.splitlines():
        if found := re.search(r'//## File "([^"]+)", line (\d+)', row):
            file, line = found[1], int(found[2])
        elif found := re.match(r"(\.L_x_\d+):", row):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", row):
            instructions.append(Instruction(file, line, found[1]))
    return instructions, labels


@cache
def source_loops(file: str) -> dict[int, tuple[str, str]]:
    """The function and the bound of each `for`, by its line."""
    found = {}
    for function in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        for node in ast.walk(function):
            if isinstance(node, ast.While):
                bound = node.test
            elif isinstance(node, ast.For) and isinstance(node.iter, ast.Call):
                arguments = node.iter.args
                bound = arguments[min(1, len(arguments) - 1)]
            else:
                continue
            assert isinstance(function, ast.FunctionDef)
            found[node.lineno] = (function.name, ast.unparse(bound))
    return found


def step_of(code: list[Instruction], line: int) -> int:
    """By how much a loop's variable grows a round, unrolled or not."""
    pattern = r"ADD\S* (U?R\d+), (?:.*, )?\1(?:\.reuse)?, (0x[0-9a-f]+)\b"
    added = [re.search(pattern, i.text) for i in code if i.line == line]
    return min((int(found[2], 16) for found in added if found), default=1)


def source_of(code: list[Instruction], first: int, last: int) -> tuple[int, str, str]:
    """The line of the loop that a branch closes, its function and its bound.

    That is the line of the branch, if it says so, or of what was last compared or counted before it.
    """
    for instruction in reversed(code[first : last + 1]):
        known = source_loops(instruction.file)
        if instruction.line in known:
            return instruction.line, *known[instruction.line]
    raise ValueError(f"no loop's line between the instructions {first} and {last}")


def loops_of(code: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    found = []
    for last, instruction in enumerate(code):
        target = re.search(r"\bBRA.*\((\.L_x_\d+)\)", instruction.text)
        if target and (first := labels[target[1]]) < last:
            line, function, bound = source_of(code, first, last)
            step = step_of(code[first : last + 1], line)
            found.append(Loop(first, last, function, bound, step))
    return found


def skipped(work: Work) -> tuple[str, ...]:
    """Functions whose loops a row does not run."""
    return RARE + (BUCKETS if work.splits < 0 else ("store_alike",))


def runs_of(loops: list[Loop], length: int, work: Work) -> dict[Loop, int]:
    """How often each loop runs for one row, as far as the loops around it go."""
    sizes, idle = bounds(length, work), skipped(work)
    copies = defaultdict(list)
    for loop in loops:
        copies[loop.function].append(loop)
    runs = {}
    for loop in loops:
        everyday = min(copies[loop.function], key=lambda copy: (copy.last - copy.first) / copy.step)
        if loop.function in idle or (loop.function in TWICE and loop != everyday):
            runs[loop] = 0
        else:
            runs[loop] = 1 if loop.bound == "rows" else -(-sizes[loop.bound] // loop.step)
    return runs


def counted(cubin: bytes, length: int, work: Work) -> dict[Loop, tuple[int, int]]:
    """What a thread executes in each loop for one row: instructions and barriers."""
    code, labels = disassembled(cubin)
    loops = loops_of(code, labels)
    runs = runs_of(loops, length, work)
    counts = {}
    for loop in loops:
        inner = [other for other in loops if other != loop and loop.holds(other)]
        own = [
            code[k].text
            for k in range(loop.first, loop.last + 1)
            if not any(other.first <= k <= other.last for other in inner)
            and code[k].text != "NOP"  # waits for float64, where there are few units for it
        ]
        times = 1
        for outer in loops:
            times *= runs[outer] if outer.holds(loop) else 1
        counts[loop] = times * len(own), times * sum("BAR.SYNC" in text for text in own)
    return counts


def per_pair(kernel: Any, setting: Any, length: int, work: Work) -> tuple[float, int]:
    """Of a row the instructions a pair, by thread, and the barriers."""
    counts = counted(kernel.asm["cubin"], length, work)
    instructions, barriers = (sum(column) for column in zip(*counts.values(), strict=True))
    return instructions * 32 * setting.warps / length, barriers


def main() -> None:
    # Another checkout's build would name that one's lines.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--targets", type=int, nargs="+", default=ARCHITECTURES)
        parser.add_argument("--length", type=int, default=8192)
        parser.add_argument("--loops", action="store_true", help="show what each loop contributes")
        options = parser.parse_args()
        for target in options.targets:
            show_everyday(target, options.length, options.loops)
        show_long_rows(options.targets[0])
        show_registers(options.targets)


def show_everyday(target: int, length: int, loops: bool) -> None:
    """Prints the table of an everyday row on an architecture."""
    print(f"\nrows of {length}, sm_{target}\n")
    print("| kernel | block, warps | instructions a pair | barriers a row |\n|---|---|---:|---:|")
    for stage, constants in KERNELS:
        for setting in settings_for(length):
            kernel = compiled(stage, constants, setting, nvidia(target))
            instructions, barriers = per_pair(kernel, setting, length, EVERYDAY)
            how = f"{setting.block}, {setting.warps}"
            print(f"| {stage} | {how} | {instructions:.0f} | {barriers} |")
            counts = counted(kernel.asm["cubin"], length, EVERYDAY)
            share = 32 * setting.warps / length
            for loop, (own, _) in counts.items() if loops else ():
                print(f"  {loop.function}, to {loop.bound}: {own * share:.1f}")


def long_row_costs(target: int) -> dict[str, list[float]]:
    """Instructions a pair of each of the `LONG_ROWS`, of the kernels in turn."""
    setting = settings_for(LENGTH)[0]
    kernels = [compiled(*kernel, setting, nvidia(target)) for kernel in KERNELS]
    return {
        name: [per_pair(kernel, setting, LENGTH, work)[0] for kernel in kernels]
        for name, work in WORKS.items()
    }


def show_long_rows(target: int) -> None:
    """Prints the table of rows that bring most values into one bucket."""
    print(f"\nrows of {LENGTH}, sm_{target}: instructions a pair, and as a multiple of the first\n")
    print("| row | splits, fullest bucket | hard_rank | | cells | coherence_rows | |")
    print("|---|---|---:|---:|---:|---:|---:|")
    costs = long_row_costs(target)
    plain = next(iter(costs.values()))
    for name, (hard, soft) in costs.items():
        work = WORKS[name]
        buckets = "none" if work.splits < 0 else f"{work.splits}, {work.fullest}"
        multiples = f"{hard:.0f} | {hard / plain[0]:.1f} | {work.cells} | {soft:.0f}"
        print(f"| {name} | {buckets} | {multiples} | {soft / plain[1]:.1f} |")


def show_registers(targets: list[int]) -> None:
    """Prints the table of all variants in all settings on each architecture."""
    print("\n| architecture | builds | most registers | bytes spilled |\n|---|---:|---:|---:|")
    for target in targets:
        found = [
            usage(compiled(stage, constants, setting, nvidia(target)).asm["cubin"])
            for stage, constants in VARIANTS.values()
            for setting in settings_of(stage, constants)
        ]
        registers, spilled = max(u.registers for u in found), sum(u.stack for u in found)
        print(f"| sm_{target} | {len(found)} | {registers} | {spilled} |", flush=True)


if __name__ == "__main__":
    main()
