"""Draws docs/lfcc_filters.png: what `LowPass` does to an axis, and to an image.

python docs/lfcc_filters.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.fft import idctn
from sklearn.datasets import load_digits
from torch import Tensor

from pc_kernels import LowPass

POSITIONS, SCALE = 16, 4
TITLES = {"average": "average", "gaussian": "gaussian, sigma 0.5", "dct": "dct (orthonormal)"}


def rows(kind: str) -> Tensor:
    """A [SCALE, POSITIONS] of a kind, as the filter's answers to single positions."""
    impulses = torch.eye(POSITIONS)[:, None, :, None].expand(-1, -1, -1, POSITIONS)
    low = LowPass(kind, (SCALE,))(impulses)[SCALE].reshape(POSITIONS, SCALE, SCALE)
    return low[:, :, 0].mT / (POSITIONS**0.5 if kind == "dct" else 1)


def left(kind: str, image: Tensor, scale: int) -> Tensor:
    """An image [n, n] as a filter leaves it."""
    low = LowPass(kind, (scale,))(image[None, None])[scale].reshape(scale, scale)
    if kind != "dct":
        return low
    spectrum = torch.zeros_like(image)
    spectrum[:scale, :scale] = low
    return torch.from_numpy(idctn(spectrum.numpy(), norm="ortho"))


def main() -> None:
    """Draws a row of panels for each kind."""
    image = torch.tensor(load_digits().images[2], dtype=torch.float32)
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    panels = figure.subplots(3, 4, width_ratios=[2.6, 1, 1, 1])
    for (kind, title), (curves, *pictures) in zip(TITLES.items(), panels, strict=True):
        for i, row in enumerate(rows(kind)):
            style = {"drawstyle": "steps-mid"} if kind == "average" else {"marker": "."}
            curves.plot(row, label=f"i = {i}", **style)
        curves.set_ylabel(title)
        curves.set_xticks(range(0, POSITIONS, 5))
        curves.grid(alpha=0.3)
        views = {"8×8 pixels": image, "s = 2": left(kind, image, 2), "s = 4": left(kind, image, 4)}
        for axes, (name, view) in zip(pictures, views.items(), strict=True):
            axes.imshow(view, cmap="gray_r", vmin=0, vmax=16)
            axes.set_xticks([])
            axes.set_yticks([])
            if kind == "average":
                axes.set_title(name, fontsize=10)
    panels[0][0].set_title(f"rows of A, s = {SCALE}, n = {POSITIONS}", fontsize=10)
    panels[0][0].legend(fontsize=7, ncols=4, loc="upper center")
    panels[0][0].set_ylim(top=0.36)
    panels[2][0].set_xlabel("position j")
    figure.savefig(Path(__file__).with_name("lfcc_filters.png"), dpi=100)


if __name__ == "__main__":
    main()
