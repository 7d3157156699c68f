"""Machine instructions and barriers of the Triton kernels, counted without a GPU.

    python tests/kernel_counts.py [--target 90] [--length 8192]

The assembler's code says of each instruction which line it comes from. A loop is what a branch backwards
spans; it belongs to the `for` of its line, whose bound, by its text, tells how often it runs. So an everyday
row is counted, all whose pairs are far enough apart, on the grid, with 300 cells (temperature 0.1).
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ahead_of_time import COHERENCE, TEACHER, compiled, nvidia_tool, settings_of

CELLS, NODES, FULLEST_BUCKET = 300, 307, 7
RARE = ("measure_near", "pair_sums", "pair_slopes", "store_undefined", "store_alike")
RARE += ("squared_distances", "near_dissimilarities", "extent_beside_infinities", "rank_all_pairs")
"""Functions that an everyday row does not reach."""


def bounds(length: int) -> dict[str, int]:
    """How far the loops of the kernels run, by the text of their bound."""
    return {
        "rows": 1,
        "row.count": length,
        "row.count * LANES": length,
        "buckets.number": length,
        "largest": FULLEST_BUCKET,
        "cells * TERMS": 4 * CELLS,
        "cells": CELLS,
        "nodes": NODES,
        "2 * BAND + 1": 137,
        "2 * BAND + TAP_BLOCK": 152,
    }


@dataclass
class Instruction:
    """One of the machine's, and the line it comes from."""

    file: str
    line: int
    text: str


@dataclass
class Counts:
    """Of a row: what each thread executes."""

    instructions: float
    barriers: float
    by_loop: list[tuple[str, float]]


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
def syntax(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"))


def runs(file: str, line: int, step: int, sizes: dict[str, int]) -> int:
    """How often the loop runs whose `for` is at that line and which takes such steps."""
    for function in syntax(file).body:
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.For) and node.lineno == line:
                    if function.name in RARE:
                        return 0
                    assert isinstance(node.iter, ast.Call)
                    arguments = node.iter.args
                    bound = ast.unparse(arguments[min(1, len(arguments) - 1)])
                    return 1 if bound == "rows" else -(-sizes[bound] // step)
    raise LookupError(f"no loop at {file}:{line}")


def counted(cubin: bytes, sizes: dict[str, int]) -> Counts:
    """What a thread executes for one row."""
    code, labels = disassembled(cubin)
    loops = []
    for end, instruction in enumerate(code):
        found = re.search(r"\bBRA.*\((\.L_x_\d+)\)", instruction.text)
        if found and labels[found[1]] < end:
            loops.append((labels[found[1]], end))
    counts = Counts(0, 0, [])
    for start, end in loops:
        inner = [loop for loop in loops if loop != (start, end) and start <= loop[0] and loop[1] <= end]
        own = [k for k in range(start, end + 1) if not any(a <= k <= b for a, b in inner)]
        times = 1
        for first, last in loops:
            if first <= start and end <= last:
                times *= runs(code[last].file, code[last].line, step_of(code, first, last), sizes)
        counts.instructions += times * len(own)
        counts.barriers += times * sum("BAR.SYNC" in code[k].text for k in own)
        where = f"{Path(code[end].file).name}:{code[end].line}"
        counts.by_loop.append((where, times * len(own)))
    return counts


def step_of(code: list[Instruction], start: int, end: int) -> int:
    """By how much a loop's variable grows a round, unrolled or not."""
    steps = [
        int(found[2], 16)
        for instruction in code[start : end + 1]
        if (instruction.file, instruction.line) == (code[end].file, code[end].line)
        and (found := re.search(r"ADD\S* (U?R\d+), (?:.*, )?\1(?:\.reuse)?, (0x[0-9a-f]+)\b", instruction.text))
    ]
    return min(steps, default=1)


def main() -> None:
    from triton.backends.compiler import GPUTarget

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=int, default=90)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--loops", action="store_true", help="show what each loop contributes")
    options = parser.parse_args()
    print(f"rows of {options.length}, sm_{options.target}")
    print("| kernel | block, warps | instructions a pair | barriers a row |\n|---|---|---:|---:|")
    kernels: dict[str, tuple[str, dict[str, Any]]] = {
        "hard_rank": ("hard_rank", TEACHER),
        "coherence_rows": ("coherence_rows", COHERENCE),
    }
    for name, (stage, constants) in kernels.items():
        for setting in settings_of(stage, constants):
            kernel = compiled(stage, constants, setting, GPUTarget("cuda", options.target, 32))
            counts = counted(kernel.asm["cubin"], bounds(options.length))
            share = 32 * setting.warps / options.length
            how = f"{setting.block}, {setting.warps}"
            print(f"| {name} | {how} | {counts.instructions * share:.0f} | {counts.barriers:.0f} |")
            for where, instructions in counts.by_loop if options.loops else ():
                print(f"  {where}: {instructions * share:.1f}")


if __name__ == "__main__":
    main()
