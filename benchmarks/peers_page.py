"""The family's results as tables and pictures, and their places in docs/benchmarks.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import machine
import report
from files import write
from rows import Results, Row

PAGE = machine.ROOT / "docs" / "benchmarks.md"
FOLDER = machine.ROOT / "benchmarks" / "results"
STEM = "peers"
BUSY = 0.5
"""A load from which on the page says that the machine had other work."""


def _seconds(row: Row, ours: Row | None) -> str:
    """The median in ms, and in times of ours."""
    if row.median is None:
        return row.status if row.status != "ok" else "–"
    shown = f"{1000 * row.median:,.3g}" if row.median < 1 else f"{1000 * row.median:,.0f}"
    if ours is None or ours is row or ours.median is None:
        return shown
    return f"{shown} ({row.median / ours.median:,.2g}×)"


def _mebibytes(row: Row) -> str:
    return "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:,.0f}"


def table_of(results: Results, name: str, axis: str) -> list[str]:
    """A table's lines: a row a contender and size."""
    rows = [row for row in results.rows if row.table == name]
    lines = [f"### {name}", "", f"| {axis} | by | ms | MiB | off |", "|---:|---|---:|---:|---:|"]
    for row in rows:
        ours = results.find(name, "ours", row.size)
        worst = max(row.errors.values(), default=None)
        off = row.detail if worst is None else f"{worst:.0e}"
        cells = [f"{row.size:,}", row.label, _seconds(row, ours), _mebibytes(row), off]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _about(about: dict[str, Any]) -> list[str]:
    """What it was measured on."""
    changed = " with uncommitted changes" if about["uncommitted_changes"] else ""
    lines = [
        f"{about['device']}, {machine.threads(about)} ({about['pc_kernels_simd']}); torch "
        f"{about['torch']}; pc_kernels at {(about['commit'] or 'unknown')[:12]}{changed}; "
        f"{about['date']}."
    ]
    if about["load_at_start"] > BUSY:
        lines += [
            "",
            f"**The machine had other work (load {about['load_at_start']}): ratios are rough.**",
        ]
    return [*lines, ""]


def between(page: str, mark: str, lines: list[str]) -> str:
    """The page with these lines between the comments of this mark.

    Raises:
        ValueError: the page has no such place.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    place = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if not place.search(page):
        raise ValueError(f"{PAGE.name} has no place marked {begin}")
    filled = "\n".join([begin, "", *lines, end])
    return place.sub(lambda _: filled, page)


def write_all(results: Results, axis_of: Mapping[str, str], about: dict[str, Any]) -> None:
    """Writes JSON, CSV and PNG, and fills in the page; needs matplotlib."""
    from plot import draw_peers

    FOLDER.mkdir(exist_ok=True)
    write(FOLDER / f"{STEM}.json", report.as_json(results, [], about))
    write(FOLDER / f"{STEM}.csv", report.as_csv(results))
    of = f"{about['device']}, {machine.threads(about)}, forward and backward"
    draw_peers(
        FOLDER / f"{STEM}-time.png", results, axis_of, lambda row: row.median, f"Seconds. {of}"
    )
    draw_peers(
        FOLDER / f"{STEM}-memory.png",
        results,
        axis_of,
        lambda row: None if not row.extra_bytes else row.extra_bytes / 2**20,
        f"Extra memory, MiB. {of}",
    )
    tables = [line for name, axis in axis_of.items() for line in table_of(results, name, axis)]
    page = between(PAGE.read_text("utf-8"), "results", [*_about(about), *tables])
    write(PAGE, page)
