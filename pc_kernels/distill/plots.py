"""The plots of a comparison. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pc_kernels import coherence, hard_rank, pairwise_dissimilarity

from .data import Split
from .experiment import FLOOR, RANK_ROWS, TEACHER, Results, Run
from .methods import OURS

BLUE = "#0072B2"  # PC's
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F00", "#444444")
LINES = ("-", "--", ":", "-.")
LABEL_SIZE = 8
QUERIES, NEIGHBOURS = 3, 5  # of the plot of neighbours
FRAMES = {True: "#009E73", False: "#D55E00"}  # of the same class, of another
PANELS = 5  # of the plot of ranks, in a row


class Style(NamedTuple):
    """How a row is drawn."""

    colour: str
    line: str
    width: float


def plot_scores(path: Path, results: Results, titles: Mapping[str, str]) -> None:
    """Probe and kNN on the test split: a dot a seed, a bar and a number at the mean."""
    names = sorted(_students(results), key=lambda name: _mean(results.runs[name], "probe"))
    names = [FLOOR, *names]
    styles = _styles(results)
    figure = Figure(figsize=(11, 1.4 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    metrics = (("probe", "linear probe, test, %"), ("knn", "kNN, test, %"))
    for axes, (metric, title) in zip(panels, metrics, strict=True):
        for place, name in enumerate(names):
            values = [100 * getattr(run.test, metric) for run in results.runs[name]]
            colour = styles[name].colour
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.5, ms=5)
            axes.plot([np.mean(values)], [place], "|", color=colour, ms=16, mew=2.5)
            axes.annotate(
                f"{np.mean(values):.1f}", (1, place), xycoords=("axes fraction", "data"),
                xytext=(4, 0), textcoords="offset points", va="center", fontsize=LABEL_SIZE,
            )  # fmt: skip
        teacher = 100 * _mean(results.runs[TEACHER], metric)
        axes.axvline(teacher, color="black", ls="--", lw=1)
        axes.set_title(f"{title}; teacher {teacher:.1f} (dashed)", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), [titles[name] for name in names])
    figure.savefig(path, dpi=120)


def plot_curves(path: Path, results: Results, titles: Mapping[str, str]) -> None:
    """Validation kNN and coherence against the epoch, named at their ends with the last value."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    panels = figure.subplots(1, 2)
    metrics = (("knn", "kNN accuracy, validation, %"), ("agreement", "coherence, validation, %"))
    styles = _styles(results)
    for axes, (metric, title) in zip(panels, metrics, strict=True):
        ends = {}
        for name in _students(results):
            epochs, percent = _curve(results.runs[name], metric)
            style = styles[name]
            axes.plot(epochs, percent.mean(0), style.line, color=style.colour, lw=style.width)
            if style.colour == BLUE:
                axes.fill_between(
                    epochs, percent.min(0), percent.max(0), color=BLUE, alpha=0.12, lw=0
                )
            ends[name] = percent.mean(0)[-1]
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        _label_ends(axes, ends, titles, styles)
    figure.savefig(path, dpi=120)


def plot_ranks(path: Path, results: Results, titles: Mapping[str, str]) -> None:
    """Teacher's rank against student's, of each test input seen from each other, first seed."""
    students = _students(results)
    columns = min(PANELS, len(students))
    lines = -(-len(students) // columns)
    figure = Figure(figsize=(2.5 * columns + 0.9, 2.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(students) :]:
        axes.set_axis_off()
    teacher = results.features[TEACHER].float()
    across = _ranks(teacher).flatten()
    images: list[PolyCollection] = []
    for name, axes in zip(students, panels.flat, strict=False):
        student = results.features[name].float()
        spearman = float(coherence(student, teacher[:RANK_ROWS]).spearman)
        ranks = _ranks(student).flatten()
        images += [axes.hexbin(across, ranks, gridsize=32, extent=(0, 1, 0, 1), mincnt=1)]
        axes.set_title(f"{titles[name]}\nSpearman {spearman:.3f}", fontsize=9)
        axes.set_box_aspect(1)
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    figure.supxlabel("teacher's rank", fontsize=10)
    figure.supylabel("student's rank", fontsize=10)
    shared = LogNorm(1, max(np.max(np.asarray(image.get_array())) for image in images))
    for image in images:
        image.set(norm=shared, cmap="cividis")
    figure.colorbar(images[0], ax=panels, label="pairs of test inputs", pad=0.01)
    figure.savefig(path, dpi=110)


def plot_sweeps(path: Path, results: Results, titles: Mapping[str, str]) -> None:
    """Validation probe and kNN against each swept option, named at their ends with the last value."""
    sweeps, styles = results.config.sweeps, _styles(results)
    figure = Figure(figsize=(13, 4.2 * len(sweeps)), layout="constrained")
    panels = figure.subplots(len(sweeps), 2, squeeze=False)
    metrics = (("probe", "linear probe, validation, %"), ("knn", "kNN, validation, %"))
    for sweep, line in zip(sweeps, panels, strict=True):
        for axes, (metric, title) in zip(line, metrics, strict=True):
            places = _value_axis(axes, sweep.values)
            axes.axhline(100 * _mean(results.runs[FLOOR], metric, "val"), color="#777777", lw=1)
            ends = {}
            for name, of_values in results.sweeps[sweep.name].items():
                style = styles[name]
                means = [100 * _mean(runs, metric, "val") for runs in of_values]
                axes.plot(places, means, style.line, color=style.colour, lw=style.width)
                for place, runs in zip(places, of_values, strict=True):
                    percent = [100 * getattr(run.val, metric) for run in runs]
                    axes.plot([place] * len(runs), percent, "o", color=style.colour, ms=4)
                ends[name] = means[-1]
            axes.set_title(title, fontsize=11)
            axes.set_xlabel(sweep.option.replace("_", " "))
            axes.grid(alpha=0.3)
            _label_ends(axes, ends, titles, styles)
    figure.savefig(path, dpi=120)


def _value_axis(axes: Axes, values: Sequence[Any]) -> list[float]:
    """Where values lie on the axis, which names each: numbers by their logarithms, others in a row."""
    numbers = all(isinstance(value, int | float) and value > 0 for value in values)
    places = [float(np.log10(value)) for value in values] if numbers else [*range(len(values))]
    axes.set_xticks(places, [f"{value}" for value in values])
    return places


def plot_neighbours(path: Path, results: Results, test: Split, titles: Mapping[str, str]) -> None:
    """The test images nearest to the first of some classes, as each network sees it, of one seed."""
    labels = test.labels[:RANK_ROWS].tolist()
    queries = [labels.index(label) for label in sorted(set(labels))[:QUERIES]]
    width = 1 + min(NEIGHBOURS, len(labels) - 1)  # images shown for a query, itself the first
    rows, columns = len(results.features), len(queries) * width
    figure = Figure(figsize=(0.62 * columns + 1.9, 0.72 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for (name, features), row in zip(results.features.items(), panels, strict=True):
        distances = pairwise_dissimilarity(features.float())[queries]
        distances[range(len(queries)), queries] = -1  # equal images may lie at 0 as well
        shown = distances.argsort(1)[:, :width].tolist()
        for place, axes in enumerate(row):
            query, *_ = images = shown[place // width]
            index = images[place % width]
            picture = test.inputs[index].cpu().permute(1, 2, 0)
            axes.imshow(picture.squeeze(2) if picture.shape[2] == 1 else picture, cmap="gray")
            axes.set(xticks=[], yticks=[])
            frame = FRAMES[labels[index] == labels[query]] if index != query else "#000000"
            axes.spines[:].set(color=frame, linewidth=2)
        title = titles[name].replace(", ", ",\n", 1)
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=LABEL_SIZE)
    figure.savefig(path, dpi=110)


def _students(results: Results) -> list[str]:
    return [row.name for row in results.config.methods]


def _styles(results: Results) -> dict[str, Style]:
    """PC's rows, if few, are blue and thick, told apart by their lines; no two others look the same."""
    lines, others = cycle(LINES), cycle(product(LINES, COLOURS))
    styles = {FLOOR: Style("#777777", "-", 1.0)}
    rows = results.config.methods
    few = sum(row.method.make in OURS for row in rows) <= len(LINES)
    for row in rows:
        if few and row.method.make in OURS:
            styles[row.name] = Style(BLUE, next(lines), 2.6)
        else:
            line, colour = next(others)
            styles[row.name] = Style(colour, line, 1.4)
    return styles


def _mean(runs: Sequence[Run], metric: str, split: str = "test") -> float:
    return float(np.mean([getattr(getattr(run, split), metric) for run in runs]))


def _curve(runs: Sequence[Run], metric: str) -> tuple[list[float], np.ndarray]:
    """Epochs, and a metric in % there, [runs, epochs]."""
    points = [[point for point in run.curve if metric in point] for run in runs]
    epochs = [point["epoch"] for point in points[0]]
    return epochs, 100 * np.array([[point[metric] for point in curve] for curve in points])


def _label_ends(
    axes: Axes, ends: Mapping[str, float], titles: Mapping[str, str], styles: Mapping[str, Style]
) -> None:
    """Writes `title: value` beside the axes, moved apart where curves end together."""
    low, high = axes.get_ylim()
    needed = 0.052 * (high - low)
    names = sorted(ends, key=lambda name: ends[name])
    places = spread_out([ends[name] for name in names], needed)
    axes.set_ylim(min(low, places[0] - needed / 2), max(high, places[-1] + needed / 2))
    for name, place in zip(names, places, strict=True):
        axes.annotate(
            f"{titles[name]}: {ends[name]:.1f}", (1, ends[name]), (1.03, place),
            xycoords=("axes fraction", "data"), color=styles[name].colour, fontsize=LABEL_SIZE,
            va="center", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": styles[name].colour, "lw": 0.6, "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def spread_out(places: Sequence[float], apart: float) -> list[float]:
    """Ascending places moved as little as keeps each `apart` from the next, group by group.

    Args:
        places: in ascending order.
        apart: the least distance.
    """
    groups: list[tuple[float, int]] = []  # the mean of each group's own places, and their number
    for place in places:
        groups.append((place, 1))
        while len(groups) > 1:
            (one, n), (two, m) = groups[-2:]
            if two - (m - 1) * apart / 2 >= one + (n - 1) * apart / 2 + apart:
                break
            groups[-2:] = [((one * n + two * m) / (n + m), n + m)]
    return [
        middle + (number - (count - 1) / 2) * apart
        for middle, count in groups
        for number in range(count)
    ]


def _ranks(features: Tensor) -> Tensor:
    """Ranks [N, N - 1] of the other inputs, seen from each, in [0, 1]."""
    distances = pairwise_dissimilarity(features)
    others = ~torch.eye(len(features), dtype=torch.bool)
    return hard_rank(distances[others].view(len(features), -1))
