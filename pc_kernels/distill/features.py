"""A pretrained teacher's features of a table's inputs: computed once, kept in parts, gone on with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .storage import read_arrays, write_arrays
from .table import Table
from .teachers import ImageTeacher, Teacher, make_teacher

PART, BATCH = 1024, 32  # rows of a file, and of a call


def features_of(
    table: Table, name: str, *, size: int | None = None, cache: Path, device: torch.device | str
) -> np.ndarray:
    """Features [N, Dt] float32 of all rows.

    They are kept under `cache` in files of 1,024 rows, named by the teacher and the inputs. A call that
    was cut short, or is made again, computes what is missing.

    Args:
        table: whose inputs, images or texts, the teacher is to see.
        name: of the teacher, see `make_teacher`.
        size: see `make_teacher`.
        cache: a folder.
        device: where the teacher runs.

    Raises:
        ValueError: the teacher cannot be had, or is not for such inputs, or its features are not
            finite.
    """
    texts = table.inputs.dtype == object
    folder = cache / f"features-{_digest(table.inputs, name, size)}"
    starts = range(0, len(table.inputs), PART)
    files = {start: folder / f"{start:08}.npz" for start in starts}
    missing = {start: file for start, file in files.items() if not file.exists()}
    if missing:
        teacher = make_teacher(name, size).to(device)
        if isinstance(teacher, ImageTeacher) == texts:
            reads = "images" if isinstance(teacher, ImageTeacher) else "texts"
            raise ValueError(f"teacher: {name} reads {reads}; the data are others")
        with tqdm(desc=name, total=len(table.inputs), unit="row") as bar:
            bar.update(sum(len(table.inputs[s : s + PART]) for s in files.keys() - missing.keys()))
            for start, file in missing.items():
                part = _computed(teacher, table.inputs[start : start + PART], bar)
                write_arrays(file, features=part)
    return np.concatenate([read_arrays(file)["features"] for file in files.values()])


def export(table: Table, folder: Path) -> list[Path]:
    """Writes what `features:PATH` reads: `features` and `names`, a file for each split of the data."""
    assert table.features is not None and table.origins is not None
    written = []
    for split in np.unique(table.origins):
        rows = table.origins == split
        written.append(folder / f"{split}.npz")
        write_arrays(written[-1], features=table.features[rows], names=table.names[rows])
    return written


@torch.no_grad()
def _computed(teacher: Teacher, inputs: np.ndarray, bar: tqdm) -> np.ndarray:
    """Of a part; texts of like length go together, since they are padded to the longest."""
    texts = inputs.dtype == object
    order = np.argsort([len(text) for text in inputs]) if texts else np.arange(len(inputs))
    features: list[Tensor] = []
    for chosen in np.split(order, range(BATCH, len(order), BATCH)):
        batch = inputs[chosen]
        given = batch.tolist() if texts else torch.from_numpy(batch).to(_device(teacher))
        features.append(teacher(given).float().cpu())
        bar.update(len(chosen))
    found = torch.cat(features)
    if not found.isfinite().all():
        raise ValueError("teacher: its features are not finite")
    return found[torch.from_numpy(np.argsort(order))].numpy()


def _device(teacher: Teacher) -> torch.device:
    return next(teacher.parameters()).device


def _digest(inputs: np.ndarray, name: str, size: int | None) -> str:
    """Names a teacher's features of these inputs; of weights in files, by their sizes and times too."""
    digest = hashlib.sha256(f"{name}|{size}|{inputs.shape}".encode())
    place = name.partition("@")[2] or name.partition(":")[2]
    if place:
        path = Path(place).expanduser()
        for file in [path] if path.is_file() else sorted(path.glob("*")):
            status = file.stat()
            digest.update(f"{file}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    if inputs.dtype == object:
        digest.update("\0".join(inputs).encode())
    else:
        digest.update(np.ascontiguousarray(inputs).data)
    return digest.hexdigest()[:16]
