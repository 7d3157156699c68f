"""The two plots of a run. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from pc_kernels import coherence, hard_rank, pairwise_dissimilarity

from .data import Split
from .experiment import FLOOR, TEACHER, SeedResult

COLOURS = {"pc": "#0072B2", "fitnet": "#D55E00", "rkd": "#009E73", TEACHER: "#000000"}
COLOURS |= {"lfcc": "#CC79A7", "pc+lfcc": "#56B4E9", FLOOR: "#777777"}
MARKERS = {"pc": "o", "fitnet": "s", "rkd": "^", "lfcc": "D", "pc+lfcc": "v"}
QUERIES, NEIGHBOURS = 3, 5  # of the neighbours' plot
FRAMES = {True: COLOURS["rkd"], False: COLOURS["fitnet"]}  # of the same class, of another
RANK_IMAGES = 500  # images of the rank plot; each is the anchor for all others


def plot_curves(path: Path, results: Sequence[SeedResult], titles: Mapping[str, str]) -> None:
    """Validation kNN and coherence, and each method's own objective, against the epoch.

    The panels' legends say where the curves end, mean and standard deviation over seeds.
    """
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    knn, agreement, loss = figure.subplots(1, 3, width_ratios=[3, 3, 2])
    students = [name for name in results[0].runs if name not in (TEACHER, FLOOR)]
    for metric, axes in (("knn", knn), ("agreement", agreement)):
        for name in students:
            _plot_metric(axes, results, name, metric, titles[name])
        for name, style in ((TEACHER, "--"), (FLOOR, ":")):
            levels = [100 * getattr(result.runs[name].val, metric) for result in results]
            label = f"{titles[name]}  {_mean(levels)}"
            axes.axhline(np.mean(levels), color=COLOURS[name], linestyle=style, label=label)
        axes.legend(loc="lower right", fontsize=8, title="at the end", title_fontsize=8)
    knn.set_ylabel("kNN accuracy, % of validation images")
    agreement.set_ylabel("coherence, % of pairs ordered as by the teacher")
    for name in students:
        curves = np.array([[p["loss"] for p in r.runs[name].curve] for r in results])
        relative = (curves / curves[:, :1]).mean(axis=0)
        label = f"{titles[name]}  {relative[-1]:.2g}"
        loss.plot(np.arange(1, len(relative) + 1), relative, color=COLOURS[name], label=label)
    loss.set_yscale("log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_locator(NullLocator())
    loss.set_ylabel("each one's own training loss, relative to epoch 1")
    loss.legend(loc="upper right", fontsize=8, title="at the end", title_fontsize=8)
    for axes in (knn, agreement, loss):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    seeds = len(results)
    spread = (
        f"mean of {seeds} seeds, bands from the least to the greatest" if seeds > 1 else "one seed"
    )
    figure.suptitle(f"Students distilled without labels ({spread})", fontsize=11)
    figure.savefig(path, dpi=120)


def plot_ranks(path: Path, result: SeedResult, titles: Mapping[str, str]) -> None:
    """Teacher's rank against student's, of each test image seen from each other, of one seed."""
    features = result.features
    students = [name for name in features if name != TEACHER]
    figure = Figure(figsize=(3.1 * len(students) + 0.9, 3.9), layout="constrained")
    panels = figure.subplots(1, len(students), sharex=True, sharey=True, squeeze=False)[0]
    teacher = features[TEACHER][:RANK_IMAGES]
    across = _ranks(teacher).flatten()
    images: list[PolyCollection] = []
    for name, axes in zip(students, panels, strict=True):
        student = features[name][:RANK_IMAGES]
        spearman = float(coherence(student, teacher).spearman)
        ranks = _ranks(student).flatten()
        images += [axes.hexbin(across, ranks, gridsize=40, extent=(0, 1, 0, 1), mincnt=1)]
        axes.set_title(f"{titles[name]}\nrank correlation {spearman:.3f}", fontsize=10)
        axes.set_xlabel("teacher's rank")
        axes.set_box_aspect(1)
        axes.set(xlim=(0, 1), ylim=(0, 1))
    panels[0].set_ylabel("student's rank")
    shared = LogNorm(1, max(np.max(np.asarray(image.get_array())) for image in images))
    for image in images:
        image.set(norm=shared, cmap="cividis")
    figure.colorbar(images[0], ax=panels, label="pairs of test images", pad=0.01)
    count = len(teacher)
    figure.suptitle(
        f"How near {count} test images are to each other, by rank; seed {result.seed}", fontsize=11
    )
    figure.savefig(path, dpi=120)


def plot_neighbours(path: Path, result: SeedResult, test: Split, titles: Mapping[str, str]) -> None:
    """The test images nearest to the first of some classes, as each network sees it, of one seed."""
    labels = test.labels.tolist()
    queries = [labels.index(label) for label in sorted(set(labels))[:QUERIES]]
    width = 1 + min(NEIGHBOURS, len(labels) - 1)  # images shown for a query, itself the first
    columns = len(queries) * width
    rows = len(result.features)
    figure = Figure(figsize=(0.62 * columns + 1.6, 0.72 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for (name, features), row in zip(result.features.items(), panels, strict=True):
        distances = pairwise_dissimilarity(features)[queries]
        distances[range(len(queries)), queries] = -1  # equal images may lie at 0 as well
        shown = distances.argsort(1)[:, :width].tolist()
        for place, axes in enumerate(row):
            query, *_ = images = shown[place // width]
            index = images[place % width]
            picture = test.images[index].cpu().permute(1, 2, 0).squeeze(2)
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            frame = FRAMES[labels[index] == labels[query]] if index != query else "#000000"
            axes.spines[:].set(color=frame, linewidth=2)
        title = titles[name].replace(" (", "\n(")
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
    for number, axes in enumerate(panels[0][::width]):
        axes.set_title(f"image {number + 1}", fontsize=9)
    figure.suptitle(
        f"The {width - 1} nearest test images: green of the same class, orange of another; "
        f"seed {result.seed}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def _plot_metric(
    axes: Axes, results: Sequence[SeedResult], name: str, metric: str, title: str
) -> None:
    """The mean over seeds with a band from the least to the greatest, from the floor at 0."""
    curves = [[p for p in result.runs[name].curve if metric in p] for result in results]
    epochs = [0, *(point["epoch"] for point in curves[0])]
    floors = [getattr(result.runs[FLOOR].val, metric) for result in results]
    rows = [[floor, *(p[metric] for p in c)] for floor, c in zip(floors, curves, strict=True)]
    percent = 100 * np.array(rows)
    colour = COLOURS[name]
    axes.fill_between(epochs, percent.min(0), percent.max(0), color=colour, alpha=0.15, lw=0)
    label = f"{title}  {_mean(percent[:, -1])}"
    axes.plot(epochs, percent.mean(0), color=colour, marker=MARKERS[name], ms=4, label=label)


def _mean(values: Sequence[float] | npt.NDArray[np.float64]) -> str:
    """The mean, with the sample standard deviation if there is one."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def _ranks(features: Tensor) -> Tensor:
    """Ranks [N, N - 1] of the other images, seen from each, in [0, 1]."""
    distances = pairwise_dissimilarity(features)
    others = ~torch.eye(len(features), dtype=torch.bool)
    return hard_rank(distances[others].view(len(features), -1))
