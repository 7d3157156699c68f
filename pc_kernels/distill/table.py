"""What every source of data gives: rows of inputs, labels, splits, names and a teacher's features."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from .storage import read_arrays

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Table:
    """N inputs with what is known of each.

    Attributes:
        inputs: [N, ...]; images are uint8 [N, C, H, W], texts objects [N], anything else is
            floating-point.
        labels: names of classes [N].
        splits: `train`, `val` or `test` [N].
        names: `CLASS/FILE` [N], unique within a split.
        features: the teacher's [N, Dt] float32, or None where it is yet to be asked.
        origins: the splits that came with the data [N], where `splits` has been made of them.
    """

    inputs: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    names: np.ndarray
    features: np.ndarray | None = None
    origins: np.ndarray | None = None

    def rows(self, chosen: np.ndarray) -> Table:
        """Some of the rows, by number or by a mask."""
        return Table(**{name: array[chosen] for name, array in self.arrays().items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, those that are there."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def load_features(paths: list[Path]) -> Table:
    """Inputs, a teacher's features of them and labels, of any modality, from npz or safetensors.

    Each file holds `inputs` [N, ...], or texts [N], `features` [N, Dt] and `labels` [N] (integers or
    names). A file whose name begins with `train`, `val` or `test` is that split, any other is `train`.

    Raises:
        ValueError, FileNotFoundError: a file is not that; the message says which and why.
    """
    tables = []
    for path in paths:
        arrays = _checked(path, ("inputs", "features", "labels"))
        labels = arrays["labels"].astype(str)
        names = np.array([f"{label}/{row}" for row, label in enumerate(labels)])
        splits = np.full(len(labels), split_of(path))
        inputs = arrays["inputs"]
        if inputs.dtype.kind == "U" and inputs.ndim == 1:
            inputs = inputs.astype(object)
        elif inputs.dtype != np.uint8:
            inputs = _finite(path, "inputs", inputs)
        tables.append(Table(inputs, labels, splits, names, arrays["features"]))
    shapes = {(table.inputs.shape[1:], table.inputs.dtype) for table in tables}
    if len(shapes) > 1:
        raise ValueError(f"data: the files' inputs differ: {sorted(map(str, shapes))}")
    return Table(**{name: _joined(tables, name) for name in tables[0].arrays()})


def with_features(table: Table, paths: list[Path]) -> Table:
    """The rows of a table that the files have features of, with these features.

    Each file holds `features` [N, Dt] and `names` [N] (`CLASS/FILE`, as in the image tree); what
    its own name begins with says the split, as for `load_features`, else it serves all splits.

    Raises:
        ValueError, FileNotFoundError: a file is not that, or knows none of the rows.
    """
    known: dict[str, np.ndarray] = {}
    for path in paths:
        arrays = _checked(path, ("features", "names"))
        own = split_of(path, default="")
        for split in [own] if own else SPLITS:
            pairs = zip(arrays["names"].astype(str), arrays["features"], strict=True)
            known |= {f"{split}/{name}": feature for name, feature in pairs}
    widths = {feature.shape for feature in known.values()}
    if len(widths) > 1:
        raise ValueError(f"teacher: the files' features differ in width: {sorted(widths)}")
    keys = [f"{split}/{name}" for split, name in zip(table.splits, table.names, strict=True)]
    rows = np.array([row for row, key in enumerate(keys) if key in known], dtype=int)
    if not len(rows):
        raise ValueError(
            f"teacher: {', '.join(map(str, paths))} knows none of the {len(keys)} inputs; its "
            f"names are like {next(iter(known), 'none')!r}, theirs like {keys[0]!r}"
        )
    features = np.stack([known[keys[row]] for row in rows])
    return replace(table.rows(rows), features=features)


def _checked(path: Path, needed: tuple[str, ...]) -> dict[str, np.ndarray]:
    arrays = read_arrays(path)
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise ValueError(
            f"{path}: holds {', '.join(arrays) or 'nothing'}; {' and '.join(missing)} are needed"
        )
    counts = {name: len(arrays[name]) if arrays[name].ndim else 0 for name in needed}
    if len(set(counts.values())) > 1 or not counts["features"]:
        raise ValueError(f"{path}: rows must be as many in each, at least one; got {counts}")
    if arrays["features"].ndim != 2:
        raise ValueError(f"{path}: features must be [N, D]; got {arrays['features'].shape}")
    return arrays | {"features": _finite(path, "features", arrays["features"])}


def _finite(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path}: {name} must be floating-point; got {array.dtype}")
    array = array.astype(np.float32)
    bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    if bad.any():
        raise ValueError(f"{path}: {name} of row {bad.argmax()} are not finite")
    return array


def split_of(path: Path, default: str = "train") -> str:
    """The split that a file's name begins with."""
    return next((split for split in SPLITS if path.stem.startswith(split)), default)


def _joined(tables: list[Table], name: str) -> np.ndarray:
    arrays = [getattr(table, name) for table in tables]
    if name == "features" and len({array.shape[1] for array in arrays}) > 1:
        raise ValueError(f"data: the files' {name} differ in width")
    return np.concatenate(arrays)
