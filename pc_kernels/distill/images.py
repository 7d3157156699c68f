"""Reads a class-per-folder image tree, from folders or tars, into one array that is kept on disk."""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from .storage import read_arrays, write_arrays
from .table import SPLITS, Table

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_IMAGE_BYTES = 64 * 2**20
TAR_SUFFIXES = (".tar", ".tar.bz2", ".tar.gz", ".tar.xz", ".tgz", ".txz")
TAR_ERRORS = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)


class Entry(NamedTuple):
    """Something found in a tree: an image file that has not been read, or a folder."""

    path: PurePosixPath  # inside the tree
    where: str  # for messages
    read: Callable[[], bytes] | None  # None: a folder

    @property
    def hidden(self) -> bool:
        """Is it, or its folder, what systems leave behind (`.DS_Store`, `__MACOSX`)?"""
        return any(part.startswith((".", "__")) for part in self.path.parts)


def load_tree(paths: list[Path], image_size: int | None, cache: Path | None) -> Table:
    """Reads all images as RGB, [N, 3, H, W] uint8; of the same tree a second time, from the cache.

    Each path is a folder, a `.tar` (also `.tar.xz`, `.tar.gz`, `.tar.bz2`) or a folder of such
    tars; several paths are read as one tree. An image's folder is its class; where that folder's
    parent is called `train`, `val` or `test`, that is its split, else `train`. Tars are streamed,
    nothing of them is unpacked to disk, and members which are not regular files are skipped.

    Args:
        paths: of the tree.
        image_size: side in pixels that images are resized to; None keeps their size.
        cache: folder for the decoded array, named by the files' paths, sizes and times; None
            decodes each time.

    Raises:
        ValueError: an image cannot be read, a tar is broken, a class folder is empty, sizes
            differ, or there is no image; the message names it.
        FileNotFoundError: a path does not exist.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"data: {path} does not exist")
    kept = None if cache is None else cache / f"images-{_digest(paths, image_size)}.npz"
    if kept is not None and kept.exists():
        return Table(**read_arrays(kept))
    table = _decode_tree(paths, image_size)
    if kept is not None:
        write_arrays(kept, **table.arrays())
    return table


def _decode_tree(paths: list[Path], image_size: int | None) -> Table:
    images: list[np.ndarray] = []
    labels: list[str] = []
    splits: list[str] = []
    names: list[str] = []
    folders: dict[PurePosixPath, str] = {}
    inhabited: set[PurePosixPath] = set()
    for entry in tqdm(_entries(paths), desc="reading images", unit="img", mininterval=0.5):
        if entry.hidden:
            continue
        if entry.read is None:
            folders[entry.path] = entry.where
        elif entry.path.suffix.lower() in IMAGE_SUFFIXES and entry.path.parent.name:
            images.append(_decode(entry, image_size))
            if images[-1].shape != images[0].shape:
                raise ValueError(
                    f"data: images differ in size ({names[0]}: {_size(images[0])}, {entry.where}: "
                    f"{_size(images[-1])}); give image_size to resize them"
                )
            split, label = entry.path.parent.parent.name, entry.path.parent.name
            splits.append(split if split in SPLITS else "train")
            labels.append(label)
            names.append(f"{label}/{entry.path.name}")
            inhabited.update(entry.path.parents)
    if not images:
        raise ValueError(
            f"data: no images in {', '.join(map(str, paths))}; expected CLASS/IMAGE or "
            f"train/CLASS/IMAGE, IMAGE ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    empty = [where for path, where in folders.items() if path not in inhabited]
    if empty:
        raise ValueError(f"data: the class folder {empty[0]} holds no image; fill or remove it")
    return Table(np.stack(images), np.array(labels), np.array(splits), np.array(names))


def _entries(paths: list[Path]) -> Iterator[Entry]:
    """Folders and files under the paths, in a fixed order."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            inside = PurePosixPath(file.relative_to(path).as_posix())
            if file == path or (file.parent == path and file.name.endswith(TAR_SUFFIXES)):
                yield from _tar_entries(file)
            elif file.is_dir():
                yield Entry(inside, str(file), None)
            elif file.is_file():
                yield Entry(inside, str(file), file.read_bytes)


def _tar_entries(path: Path) -> Iterator[Entry]:
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name, inside = f"{path}:{member.name}", PurePosixPath(member.name)
                if member.isdir() and inside.parts:
                    yield Entry(inside, name, None)
                elif member.isreg() and inside.suffix.lower() in IMAGE_SUFFIXES:
                    if member.size > MAX_IMAGE_BYTES:
                        raise ValueError(f"data: {name} is larger than {MAX_IMAGE_BYTES} bytes")
                    file = archive.extractfile(member)
                    assert file is not None  # a regular member always has a file
                    yield Entry(inside, name, file.read)
            # tarfile takes a cut or garbled header for the end; a real end is a block of zeros.
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it breaks off at byte {archive.offset}")
    except TAR_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"data: cannot read {path} as a tar: {reason}") from error


def _decode(entry: Entry, image_size: int | None) -> np.ndarray:
    """An image file as RGB [3, H, W]."""
    assert entry.read is not None
    try:
        image = Image.open(io.BytesIO(entry.read())).convert("RGB")
    except (*TAR_ERRORS, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"data: cannot read the image {entry.where}: {error}") from error
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _size(image: np.ndarray) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"


def _digest(paths: list[Path], image_size: int | None) -> str:
    """Names a tree: changes with any file's path, size or time of change."""
    digest = hashlib.sha256(repr(image_size).encode())
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            status = file.stat()
            digest.update(f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
