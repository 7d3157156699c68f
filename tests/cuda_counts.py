"""Machine instructions of the CUDA backend's loss kernel, a pair, counted without a GPU.

    python tests/cuda_counts.py [--targets 80 90]

Each loop over a row's references is known by an instruction that every pair passes, which the
source line says it comes from. What a pair costs is the shortest way through the loop that passes
it: so no slow paths, no near pairs, no masks. Of loops that the compiler has several copies of, the
cheapest counts. What is counted is an everyday row of 8192 references on the grid, with a gradient:
Euclidean distances, the teacher's squared ones, places in the room of the values.
"""

from __future__ import annotations

import argparse
import heapq
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ahead_of_time import ARCHITECTURES, nvidia_tool

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "coherence_rows.cu"
KERNEL = "CoherenceRowsENS_4TapsINS_8LogisticEEELb1"
"""In a kernel's name: logistic, the references' arrays in shared memory."""


@dataclass(frozen=True)
class Part:
    """A loop over the references, or over what is as many."""

    name: str
    passes: str
    """The opcode of what every pair passes."""
    lines: tuple[str, ...]
    """Each is in one of the lines that it comes from. (Of calls from several places the compiler may name
    another: only the innermost lines are to be relied on.)"""
    times: int = 1
    """How often a pair passes it."""
    runs: int = 1
    """How often the loop runs, a pair."""
    unrolled: bool = False
    """Whether a round takes as many pairs as such instructions are in it."""
    has: str = ""
    """What else is in the loop."""


DISTANCE, FORM = "target[there.place(j)] =", "MUFU.RSQ"
SCAN = "block.scan<int>(buckets"
PARTS = (
    Part("teacher: distances", "STS", (DISTANCE,), unrolled=True),
    Part("teacher: range", "FMNMX", ("range.low = std::fmin",)),
    Part("hard rank: buckets", "STS", ("start[b] = 0",)),
    Part("hard rank: count", "ATOMS", ("{ atomicAdd(&start[bucket.of(x[i])], 1); }",)),
    Part("hard rank: the fullest", "LDS", ("fullest = Largest{}(fullest, start[b])",)),
    Part("hard rank: sums", "LDS", (SCAN, "own += get(i)")),
    Part("hard rank: starts", "LDS", (SCAN, "const T here = get(i)")),
    Part("hard rank: place", "ATOMS", ("keys[atomicAdd(&start",)),
    Part("hard rank: compare", "LDS", ("twice += (keys[s] < own)",), runs=2),
    Part("hard rank: rank", "STS", ("x[i] = static_cast<float>(twice) / whole",)),
    Part(
        "student: distances",
        "STS",
        (DISTANCE,),
        unrolled=True,
        has=FORM,
    ),
    Part("range", "FMNMX", ("range.low = std::fmin",)),
    Part("mean", "DADD", ("sum += x[i] - low",)),
    Part("deviation", "DFMA", ("squares += (x[i] - mean)",)),
    Part("places", "STS", ("places[j] = static_cast<unsigned>(t * unit)",)),
    Part(
        "spread", "ATOMS", ("before = atomicAdd(low, bits)", "count, SameUnit{kUnitShift}"), times=4
    ),
    Part("gather, penalty", "STS", ("scratch.product[j] = slope", "take(j, grid.level()")),
    Part("largest slope", "FMNMX", ("largest = std::fmax(largest, std::fabs(weight(j)))",)),
    Part(
        "spread slopes",
        "ATOMS",
        ("before = atomicAdd(low, bits)", "places, count, unit, weight)"),
        times=4,
    ),
    Part("gather", "STS", ("grad[j] -= density",)),
    Part(
        "student: distances again",
        "STS",
        (DISTANCE,),
        unrolled=True,
        has=FORM,
    ),
    Part("through the scale", "DADD", ("sum += grad[j] * pull.standard(j)",), times=2),
    Part("through the distance", "MUFU.RCP", ("return dissimilarity_backward(own",)),
)


@dataclass(frozen=True)
class Instruction:
    """One of the machine's, and the source lines that it comes from, the innermost first."""

    text: str
    lines: tuple[str, ...]

    def is_in(self, part: Part) -> bool:
        found = re.search(rf"(^|\s){re.escape(part.passes)}\b", self.text) is not None
        return found and all(any(text in line for line in self.lines) for text in part.lines)


@cache
def source(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()


def disassembled(cubin: Path) -> tuple[list[Instruction], dict[str, int]]:
    """The kernel's instructions, and where its labels stand among them."""
    command = [str(nvidia_tool("nvdisasm")), "-gi", "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    inside = inlined = False
    lines: list[str] = []
    for row in text.splitlines():
        if found := re.match(r"\s*\.section\s+(\S+),", row):
            inside = found[1].startswith(".text.") and KERNEL in found[1]
        elif not inside:
            continue
        elif found := re.search(r'//## File "([^"]+)", line (\d+)(.*)', row):
            own = source(found[1])[int(found[2]) - 1]
            lines = [*lines, own] if inlined else [own]
            inlined = "inlined at" in found[3]
        elif found := re.match(r"(\.L_x_\d+):", row):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", row):
            code.append(Instruction(found[1], tuple(lines)))
            inlined = False
    return code, labels


def target_of(instruction: Instruction, labels: dict[str, int]) -> int | None:
    found = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", instruction.text)
    return labels[found[1]] if found else None


def successors(code: list[Instruction], labels: dict[str, int], place: int) -> Iterator[int]:
    """What may follow an instruction: slow paths and exits are left out."""
    text, target = code[place].text, target_of(code[place], labels)
    conditional = text.startswith("@") or re.search(r"\bBRA\S* !?U?P\d", text)
    leaves = re.search(r"\b(CALL|EXIT|RET)\b", text)
    if target is not None and target > place:
        yield target
    if conditional or not (leaves or target is not None):
        yield place + 1


def shortest(
    code: list[Instruction], labels: dict[str, int], loop: tuple[int, int], part: Part, times: int
) -> int | None:
    """Instructions of the shortest way through a loop that passes the part's so often."""
    queue, best = [(0, loop[0], 0)], {(loop[0], 0): 0}
    while queue:
        cost, place, passed = heapq.heappop(queue)
        cost += code[place].text != "NOP"
        passed = min(times, passed + code[place].is_in(part))
        if place == loop[1]:
            if passed == times:
                return cost
            continue
        for after in successors(code, labels, place):
            if after <= loop[1] and cost < best.get((after, passed), 1 << 30):
                best[after, passed] = cost
                heapq.heappush(queue, (cost, after, passed))
    return None


def counted(cubin: Path) -> dict[str, float]:
    """Instructions a pair of each part."""
    code, labels = disassembled(cubin)
    targets = [(target_of(instruction, labels), k) for k, instruction in enumerate(code)]
    loops = [(target, last) for target, last in targets if target is not None and target < last]
    counts = {}
    for part in PARTS:
        places = [k for k, instruction in enumerate(code) if instruction.is_in(part)]
        around = {
            min((loop for loop in loops if loop[0] <= k <= loop[1]), key=lambda x: x[1] - x[0])
            for k in places
        }
        costs = []
        for loop in around:
            inside = code[loop[0] : loop[1] + 1]
            if not any(part.has in instruction.text for instruction in inside):
                continue
            pairs = sum(loop[0] <= k <= loop[1] for k in places) if part.unrolled else 1
            cost = shortest(code, labels, loop, part, part.times * pairs)
            costs += [] if cost is None else [part.runs * cost / pairs]
        assert costs, f"no loop of {part.name!r}"
        counts[part.name] = min(costs)
    return counts


def compiled(architecture: int, folder: Path) -> Path:
    """The kernels of a chunk's rows for one architecture."""
    cubin = folder / f"sm_{architecture}.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "-lineinfo", f"-arch=sm_{architecture}", "-cubin"]
    subprocess.run([*command, str(SOURCE), "-o", str(cubin)], check=True)
    return cubin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=ARCHITECTURES)
    targets = parser.parse_args().targets
    with tempfile.TemporaryDirectory() as folder:
        counts = [counted(compiled(target, Path(folder))) for target in targets]
    print("| a pair | " + " | ".join(f"sm_{target}" for target in targets) + " |")
    print("|---|" + "---:|" * len(targets))
    for part in PARTS:
        print(f"| {part.name} | " + " | ".join(f"{c[part.name]:.0f}" for c in counts) + " |")
    print("| together | " + " | ".join(f"{sum(c.values()):.0f}" for c in counts) + " |")


if __name__ == "__main__":
    main()
