"""The pictures of docs/options.md, from the package's own tables: a new row is a new panel or curve.

`python docs/site/pictures.py folder` draws them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import pc_kernels
from pc_kernels.formulas import PENALTIES, RELAXATIONS

TEMPERATURES = (0.01, 0.1, 0.3, 1.0)
GREY = "#808890"
STYLE = {  # readable on white and on black: one picture serves both schemes
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": GREY,
    "axes.prop_cycle": matplotlib.cycler(
        color=["#e4572e", "#17a398", "#4f86f7", "#b07cc6", "#c79a2b", "#6aa84f"]
    ),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.color": GREY,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.hashsalt": "pc_kernels",
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


SHOWN = (*RELAXATIONS, "projection")
"""The relaxations."""


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """As many axes side by side, with a common vertical axis."""
    figure, axes = pyplot.subplots(
        1,
        count,
        figsize=(min(4.2, 13 / count) * count, 3.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    return figure, list(axes[0])


def ranks() -> Figure:
    """Soft rank against value, for each relaxation and temperature, and the hard rank."""
    values = torch.randn(24, generator=torch.Generator().manual_seed(4)).sort().values
    values = (values - values.mean()) / values.std(correction=0)
    figure, axes = panels(len(SHOWN))
    for ax, relaxation in zip(axes, SHOWN, strict=True):
        ax.step(values, pc_kernels.hard_rank(values), where="mid", color=GREY, lw=1, label="hard")
        for temperature in TEMPERATURES:
            rank = pc_kernels.soft_rank(values, temperature, relaxation, scale="std")
            ax.plot(values, rank, "o-", ms=3, lw=1.2, label=f"temperature {temperature:g}")
        ax.set(title=relaxation, xlabel="dissimilarity, in standard deviations of its row")
    axes[0].set_ylabel("normalised rank")
    axes[0].legend()
    return figure


def pull(relaxation: str, temperature: float, displacements: torch.Tensor) -> torch.Tensor:
    """What pulls a reference of middle rank back that the student has displaced by each of these.

    A row of 200 normal quantiles, which student and teacher order alike but for that reference.
    """
    m = 200
    row = torch.special.ndtri((torch.arange(m, dtype=torch.float64) + 0.5) / m)
    student = row.repeat(len(displacements), 1)
    student[:, m // 2] += displacements
    student.requires_grad_()
    loss = pc_kernels.coherence_loss_from_dissimilarities(
        student,
        row.expand_as(student),
        relaxation=relaxation,
        temperature=temperature,
        reduction="sum",
    )
    (gradient,) = torch.autograd.grad(loss, student)
    return m * gradient[:, m // 2]


def gradients() -> Figure:
    """The gradient of the loss in the dissimilarity of a displaced reference, against how far it is."""
    displacements = torch.linspace(-4, 4, 321, dtype=torch.float64)
    figure, axes = panels(len(SHOWN))
    for ax, relaxation in zip(axes, SHOWN, strict=True):
        for temperature in TEMPERATURES:
            slope = pull(relaxation, temperature, displacements)
            ax.plot(displacements, slope, lw=1.2, label=f"temperature {temperature:g}")
        ax.set(title=relaxation, xlabel="displacement, in standard deviations of the row")
    axes[0].set_ylabel("m · ∂L/∂δ of that reference")
    axes[0].legend()
    return figure


def penalties() -> Figure:
    """Each penalty of a residual of ranks, and its slope."""
    residual = torch.linspace(-1, 1, 401, dtype=torch.float64)
    figure, (left, right) = panels(2)
    for penalty in PENALTIES.values():
        left.plot(residual, penalty.value(residual), label=penalty.name)
        right.plot(residual, penalty.slope(residual))
    left.set(title="penalty ℓ", xlabel="student's rank − teacher's rank")
    right.set(title="its slope ℓ′", xlabel="student's rank − teacher's rank")
    left.legend()
    return figure


PICTURES: tuple[Callable[[], Figure], ...] = (ranks, gradients, penalties)


def draw_all(folder: Path) -> list[Path]:
    """Draws every picture into a folder, as SVG by its function's name, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with pyplot.rc_context(STYLE):
        for picture in PICTURES:
            paths.append(folder / f"{picture.__name__}.svg")
            figure = picture()
            figure.savefig(paths[-1], metadata={"Date": None})
            pyplot.close(figure)
    return paths


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
