"""A run's curve as it grows: a CSV file, and TensorBoard's events where that is installed."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

COLUMNS = ("epoch", "loss", "seconds", "knn", "agreement")


class Log:
    """Writes points of a curve, each epoch's as it comes."""

    def __init__(self, path: Path, curve: Sequence[Mapping[str, float]]) -> None:
        """Starts `path`, a CSV file, with the points that a checkpoint held."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", newline="")
        self.rows = csv.DictWriter(self.file, COLUMNS)
        self.rows.writeheader()
        self.rows.writerows(curve)
        self.board: Any = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            folder = path.parent / "tensorboard" / path.stem
            self.board = SummaryWriter(folder, purge_step=len(curve) + 1)

    def add(self, point: Mapping[str, float]) -> None:
        """The next epoch's."""
        self.rows.writerow(point)
        self.file.flush()
        if self.board is not None:
            for name in point.keys() - {"epoch"}:
                self.board.add_scalar(name, point[name], int(point["epoch"]))

    def close(self) -> None:
        """Nothing more comes."""
        self.file.close()
        if self.board is not None:
            self.board.close()
