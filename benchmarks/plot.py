"""The log-log picture: time against batch size, a panel for each table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import machine
import matplotlib
from rows import Results, Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

PANELS = {"loss": "Whole loss, forward + backward", "rank": "Rank stage, forward + backward"}

# Okabe and Ito's palette: told apart by readers of every colour vision.
STYLES = {
    "floor": ("#000000", "--", ""),
    "half": ("#000000", ":", ""),
    "cdist": ("#767676", ":", ""),
    "eager": ("#D55E00", "-", "s"),
    "compile": ("#E69F00", "-", "D"),
    "torchsort": ("#CC79A7", "-", "^"),
    "published": ("#009E73", "-", "P"),
    "library": ("#56B4E9", "-", "v"),
    "keops": ("#767676", "-", "X"),
}
Value = Callable[[Row], float | None]
OURS = (("#0072B2", "o"), ("#56B4E9", "v"), ("#009E73", "P"), ("#F0E442", "X"))


def _styles(keys: list[str]) -> dict[str, tuple[str, str, str]]:
    ours = [key for key in keys if key not in STYLES]
    return STYLES | {
        key: (color, "-", mark) for key, (color, mark) in zip(ours, OURS, strict=False)
    }


def _lines(axes: Axes, results: Results, table: str, value: Value = lambda row: row.median) -> int:
    """Draws times, and a cross at the top where there is none; returns the most crosses at a size."""
    labels = results.contenders(table)
    styles = _styles(list(labels))
    missing: dict[int, int] = {}
    for key, label in labels.items():
        color, line, mark = styles[key]
        rows = [row for size in results.sizes if (row := results.cell(table, key, size))]
        known = [(row.size, value(row)) for row in rows if value(row) is not None]
        axes.plot(
            [size for size, _ in known],
            [y for _, y in known],
            color=color,
            linestyle=line,
            marker=mark,
            markersize=5,
            linewidth=1.8,
            label=label.replace(" ¹", ""),
        )
        for row in rows:
            if value(row) is None:
                height = 0.97 - 0.035 * missing.get(row.size, 0)
                missing[row.size] = missing.get(row.size, 0) + 1
                across = axes.get_xaxis_transform()
                axes.plot(
                    row.size, height, "x", color=color, transform=across, markersize=6, mew=1.8
                )
    return max(missing.values(), default=0)


def _finish(axes: Axes, results: Results, table: str) -> None:
    axes.set_title(PANELS[table], fontsize=11)
    axes.set_xscale("log", base=2)
    axes.set_xticks(results.sizes, [str(size) for size in results.sizes], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("batch size B")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Figure, panels: list[Axes]) -> None:
    """One for both panels, below them."""
    handles = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    missing = Line2D([], [], color="#333333", marker="x", linestyle="", mew=1.8)
    handles["not timed: see the table"] = missing
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False
    )


def draw(path: Path, results: Results, about: dict[str, Any]) -> None:
    """Writes the PNG."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 6), sharey=True, layout="constrained")
    panels[0].set_yscale("log")
    stack = max(_lines(axes, results, table) for axes, table in zip(panels, PANELS, strict=True))
    low, high = panels[0].get_ylim()
    room = 0.03 + 0.035 * stack  # the share of the height that the crosses have to themselves
    panels[0].set_ylim(low, high * (high / low) ** (room / (1 - room)))
    for axes, table in zip(panels, PANELS, strict=True):
        _finish(axes, results, table)
    _legend(figure, list(panels))
    panels[0].set_ylabel("median time, seconds")
    widths = f"features {about['student_dim']} (student), {about['teacher_dim']} (teacher)"
    figure.suptitle(
        f"{about['device']}, {machine.threads(about)}, float32; {widths}",
        fontsize=12,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_peers(
    path: Path, results: Results, axis_of: Mapping[str, str], value: Value, title: str
) -> None:
    """Writes the PNG of the family's losses: a panel for each, log-log, its own contenders in it."""
    columns = 3
    figure, grid = plt.subplots(
        -(-len(axis_of) // columns), columns, figsize=(13, 11), layout="constrained", squeeze=False
    )
    for axes, (table, axis) in zip(grid.flat, axis_of.items(), strict=False):
        _lines(axes, results, table, value)
        axes.set_title(table, fontsize=11)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(axis)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(fontsize=7, frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in grid.flat[len(axis_of) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)
