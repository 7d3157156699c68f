"""Machine instructions and barriers of the Triton kernels, counted without a GPU.

    python tests/kernel_counts.py [--target 90] [--length 8192] [--loops]

The assembler's code says of each instruction which line it comes from. A loop is what a branch backwards
spans; it belongs to the `for` of its line, whose bound, by its text, tells how often it runs. What is
counted is an everyday row at temperature 0.1: on the grid, with 300 cells, no two points near each other.
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

from ahead_of_time import COHERENCE, TEACHER, compiled, nvidia_tool, settings_of

CELLS, NODES, TAPS, FULLEST_BUCKET, LEVELS = 300, 307, 137, 7, 0

RARE = ("measure_near", "squared_distances", "pair_sums", "pair_slopes", "rank_all_pairs")
RARE += ("store_undefined", "store_alike", "extent_beside_infinities")
"""Functions whose loops an everyday row does not run."""

TWICE = ("measured", "row_loss", "pushes")
"""Functions that a kernel has twice; the faster is the everyday one: not far, no sums over pairs."""


def bounds(length: int) -> dict[str, int]:
    """How far the loops of the kernels run, by the text of their bound."""
    return {
        "row.count": length,
        "row.count * LANES": length,
        "number": length,
        "largest": FULLEST_BUCKET,
        "largest > CROWD": LEVELS,
        "cells * TERMS": 4 * CELLS,
        "cells": CELLS,
        "nodes": NODES,
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


def loops_of(code: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    found = []
    for last, instruction in enumerate(code):
        target = re.search(r"\bBRA.*\((\.L_x_\d+)\)", instruction.text)
        if target and (first := labels[target[1]]) < last:
            function, bound = source_loops(instruction.file)[instruction.line]
            step = step_of(code[first : last + 1], instruction.line)
            found.append(Loop(first, last, function, bound, step))
    return found


def runs_of(loops: list[Loop], sizes: dict[str, int]) -> dict[Loop, int]:
    """How often each loop runs for one row, as far as the loops around it go."""
    copies = defaultdict(list)
    for loop in loops:
        copies[loop.function].append(loop)
    runs = {}
    for loop in loops:
        everyday = min(copies[loop.function], key=lambda copy: (copy.last - copy.first) / copy.step)
        if loop.function in RARE or (loop.function in TWICE and loop != everyday):
            runs[loop] = 0
        else:
            once = loop.bound in ("rows",)
            runs[loop] = 1 if once else -(-sizes[loop.bound] // loop.step)
    return runs


def counted(cubin: bytes, length: int) -> dict[Loop, tuple[int, int]]:
    """What a thread executes in each loop for one row: instructions and barriers."""
    code, labels = disassembled(cubin)
    loops = loops_of(code, labels)
    runs = runs_of(loops, bounds(length))
    counts = {}
    for loop in loops:
        inner = [other for other in loops if other != loop and loop.holds(other)]
        own = [
            code[k].text
            for k in range(loop.first, loop.last + 1)
            if not any(other.first <= k <= other.last for other in inner)
        ]
        times = 1
        for outer in loops:
            times *= runs[outer] if outer.holds(loop) else 1
        counts[loop] = times * len(own), times * sum("BAR.SYNC" in text for text in own)
    return counts


def main() -> None:
    # Another checkout's build would name that one's lines.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        show()


def show() -> None:
    """Prints the table."""
    from triton.backends.compiler import GPUTarget

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=int, default=90)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--loops", action="store_true", help="show what each loop contributes")
    options = parser.parse_args()
    print(f"rows of {options.length}, sm_{options.target}")
    print("| kernel | block, warps | instructions a pair | barriers a row |\n|---|---|---:|---:|")
    for stage, constants in (("hard_rank", TEACHER), ("coherence_rows", COHERENCE)):
        for setting in settings_of(stage, constants):
            kernel = compiled(stage, constants, setting, GPUTarget("cuda", options.target, 32))
            counts = counted(kernel.asm["cubin"], options.length)
            share = 32 * setting.warps / options.length
            instructions, barriers = (sum(column) for column in zip(*counts.values(), strict=True))
            how = f"{setting.block}, {setting.warps}"
            print(f"| {stage} | {how} | {instructions * share:.0f} | {barriers} |")
            for loop, (own, _) in counts.items() if options.loops else ():
                print(f"  {loop.function}, to {loop.bound}: {own * share:.1f}")


if __name__ == "__main__":
    main()
