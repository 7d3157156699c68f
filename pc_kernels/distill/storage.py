"""Files that are either whole or not there: arrays, JSON and checkpoints, replaced atomically."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file beside `path`, then puts it in its place; what was there stays until then.

    Raises:
        OSError: it could not be written (a full disk, say); `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        last = "its last good version is intact" if path.exists() else "nothing was left behind"
        raise OSError(f"cannot write {path}: {error}; {last}") from error


def write_json(path: Path, value: Any) -> None:
    """JSON with None for NaN and infinity, which it does not have."""
    text = json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """An uncompressed npz."""
    held: dict[str, Any] = dict(arrays)
    write_whole(path, lambda file: np.savez(file, **held))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz or a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not readable as what its ending says.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file  # optional

            return dict(load_file(path))
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except ImportError as error:
        raise ValueError(f"{path}: needs the package: pip install safetensors") from error
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, AttributeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except Exception as error:  # SafetensorError is an Exception and nothing else
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"cannot read {path}: {error}") from error


def write_state(path: Path, state: dict[str, Any]) -> None:
    """A checkpoint; made in memory first, since torch.save does not say why a file was not written."""
    made = io.BytesIO()
    torch.save(state, made)
    write_whole(path, lambda file: file.write(made.getbuffer()))


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint of tensors, on the CPU whence modules and optimizers take them, and plain values.

    Raises:
        ValueError: it is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no common error
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot read the checkpoint {path}: {reason}; remove it") from error
    return state


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
