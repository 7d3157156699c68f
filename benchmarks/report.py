"""Results as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import machine
from launches import GPU_STEPS, STUBS, of_a_gpu_step
from rows import Results, Row
from targets import Target

TITLES = {
    "loss": "Whole loss: features to loss to gradient of the student's features",
    "rank": "Rank stage: soft ranks of a B×B matrix, forward and backward",
}
NOTES = """\
Every time is of forward and backward together, taken after the same run found the contender right
against float64 at that size (errors below). GEMM floor: T Tᵀ, S Sᵀ, W S, Wᵀ S by `torch.mm`. Half
products: the same by the lower halves of the Gram matrices, and (V + Vᵀ) S for V S + Vᵀ S.
`torch.cdist`: distances of the student's features alone, and their gradient. Direct: the formula with
all B³ sigmoids, written so that a compiler can fuse them.
¹ torchsort ranks by another relaxation (projection onto the permutahedron), so it is checked against
what is known of that one: its limits, and the sums of its ranks and gradients."""


ASKED = """\
Launches: on a GPU kernels, and the host's time until they are launched; on a CPU operators that PyTorch's
dispatcher sees (none inside those of this package):"""


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{_three(seconds / scale)} {unit}"
    return f"{_three(seconds * 1e6)} µs"


def _three(x: float) -> str:
    return f"{x:.0f}" if x >= 99.95 else f"{x:.1f}" if x >= 9.995 else f"{x:.2f}"


def amount(count: int) -> str:
    """Bytes in MiB or GiB."""
    if count < 2**20:
        return "< 1 MiB"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _time_cell(results: Results, row: Row | None) -> str:
    if row is None:
        return "–"
    if row.median is None:
        return f"{row.status} ({row.detail})" if row.detail else row.status
    ratio = results.to_floor(row)
    return duration(row.median) + ("" if ratio is None else f" ({_three(ratio)}×)")


def _memory_cell(_: Results, row: Row | None) -> str:
    return "–" if row is None or row.extra_bytes is None else amount(row.extra_bytes)


def _asked_cell(_: Results, row: Row | None) -> str:
    if row is None or row.launches is None:
        return "–"
    host = "" if row.host_seconds is None else f" ({duration(row.host_seconds)})"
    return f"{row.launches}{host}"


def _gpu_steps() -> list[str]:
    lines = [
        "## What a GPU's step launches",
        "",
        "Counted on tensors without data, at B = 256:",
        "",
    ]
    lines += ["| whole loss | " + " | ".join(f"`{backend}`" for backend in STUBS) + " |"]
    lines += ["|---|" + "---:|" * len(STUBS)]
    for name, step in GPU_STEPS.items():
        counts = (str(of_a_gpu_step(backend, **step)) for backend in STUBS)
        lines += [f"| {name} | " + " | ".join(counts) + " |"]
    return [*lines, ""]


def _grid(results: Results, table: str, corner: str, cell: Any) -> list[str]:
    keys = results.contenders(table)
    lines = [f"| {corner} | " + " | ".join(keys.values()) + " |", "|---:" * (len(keys) + 1) + "|"]
    for size in results.sizes:
        cells = [cell(results, results.cell(table, key, size)) for key in keys]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _details(results: Results) -> list[str]:
    lines = [
        "| table | B | contender | p20 | median | p80 | runs | errors against float64 |",
        "|---|---:|---|---:|---:|---:|---:|---|",
    ]
    for row in results.rows:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in row.errors.items())
        times = [row.percentile(p) for p in (20, 50, 80)]
        shown = ["–" if t is None else duration(t) for t in times]
        cells = [row.table, str(row.size), row.label, *shown, str(len(row.seconds)), errors]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _large(results: Results) -> list[str]:
    rows = [row for row in results.rows if row.table == "large"]
    if not rows:
        return []
    lines = ["## A large batch, run once", ""]
    lines += ["| B | contender | time | extra memory |", "|---:|---|---:|---:|"]
    for row in rows:
        cells = [_time_cell(results, row), _memory_cell(results, row)]
        lines.append(f"| {row.size} | {row.label} | {cells[0]} | {cells[1]} |")
    return [*lines, ""]


def markdown(results: Results, targets: list[Target], about: dict[str, Any]) -> str:
    """The whole report."""
    torch_about = f"torch {about['torch']}, Python {about['python']}, {machine.threads(about)}"
    commit = (about["commit"] or "unknown")[:12]
    dirty = " with uncommitted changes" if about["uncommitted_changes"] else ""
    lines = [f"# Benchmark: {about['device']}", ""]
    lines += [
        f"{torch_about}; pc_kernels {about['pc_kernels']} at {commit}{dirty}; {about['date']}."
    ]
    lines += [f"Student features of width {about['student_dim']}, teacher {about['teacher_dim']}."]
    if about["device"] == about["processor"] and about["load_at_start"] > 0.5:
        lines += ["", f"**The machine was busy (load {about['load_at_start']}) when this began.**"]
    lines += ["", *NOTES.splitlines(), "", "## Targets", ""]
    lines += ["| what | measured | target | reached |", "|---|---:|---:|---|"]
    lines += [f"| {t.what} | {t.measured} | {t.goal} | {t.verdict} |" for t in targets]
    for table, title in TITLES.items():
        if not set(results.contenders(table)) - set(results.contenders("yardstick")):
            continue
        lines += ["", f"## {title}", "", "Median time (in times of the GEMM floor):", ""]
        lines += _grid(results, table, "B", _time_cell)
        lines += ["Peak memory beyond the inputs:", ""]
        lines += _grid(results, table, "B", _memory_cell)
        lines += [ASKED, ""]
        lines += _grid(results, table, "B", _asked_cell)
    lines += _gpu_steps()
    lines += [*_large(results), "## Details", "", *_details(results)]
    return "\n".join(lines)


def as_csv(results: Results) -> str:
    """A line for each row, times in seconds."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    head = ["table", "size", "contender", "status", "detail", "p20_s", "median_s", "p80_s"]
    writer.writerow([*head, "runs", "to_floor", "extra_bytes", "launches", "host_s", "worst_error"])
    for row in results.rows:
        times = [row.percentile(p) for p in (20, 50, 80)]
        worst = max(row.errors.values(), default=None)
        head = [row.table, row.size, row.label, row.status, row.detail, *times]
        head += [len(row.seconds), results.to_floor(row), row.extra_bytes, row.launches]
        writer.writerow([*head, row.host_seconds, worst])
    return file.getvalue()


def read_json(path: Path) -> list[Row]:
    """The rows of a report."""
    names = {field.name for field in fields(Row)}
    read = json.loads(path.read_text("utf-8"))["rows"]
    return [Row(**{name: row[name] for name in names}) for row in read]


def as_json(results: Results, targets: list[Target], about: dict[str, Any]) -> str:
    """Everything, raw times too."""
    content = {
        "about": about,
        "targets": [
            {"what": t.what, "measured": t.value, "goal": t.goal, "reached": t.verdict.strip("*")}
            for t in targets
        ],
        "rows": [row.as_dict() for row in results.rows],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
