"""Images for the reference trainer: scikit-learn's digits, or a class-per-folder tree or tar."""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_IMAGE_BYTES = 64 * 2**20
TAR_SUFFIXES = (".tar", ".tar.bz2", ".tar.gz", ".tar.xz", ".tgz", ".txz")
TAR_ERRORS = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)
SPLITS = ("train", "val", "test")
TEST_SHARE, VAL_SHARE = 0.3, 0.2  # of all images; of what is left after the test images
SPLIT_SEED = 0  # the split is the same for every seed of a run
IMAGEFOLDER = "imagefolder:"

Array = npt.NDArray[np.uint8]


class Split(NamedTuple):
    """Images [N, C, H, W] (uint8, 0 to 255) and their class numbers [N] (int64)."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Split:
        """The same split on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Three splits of labelled images. `flip`: may an image be mirrored to augment it?"""

    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    flip: bool

    def to(self, device: torch.device) -> Dataset:
        """The same data on another device."""
        train, val, test = (split.to(device) for split in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test)


class Entry(NamedTuple):
    """An image file that has been found and not yet read."""

    split: str
    label: str
    name: str
    read: Callable[[], bytes]


def load(spec: str, limit: int | None = None, image_size: int | None = None) -> Dataset:
    """Loads the data that `--data` names.

    Args:
        spec: `digits`, the 1,797 8x8 grey images bundled with scikit-learn (the test part of the
            UCI "Optical Recognition of Handwritten Digits" set, no download), or
            `imagefolder:PATH[,PATH...]`, see `load_imagefolder`.
        limit: use at most this many images, spread evenly over the classes; None uses all.
        image_size: side in pixels that images are resized to; None keeps their size.

    Raises:
        ValueError: the data are not usable; the message says which file or argument, and why.
        FileNotFoundError: a path does not exist.
    """
    if spec == "digits":
        return load_digits_data(limit, image_size)
    if spec.startswith(IMAGEFOLDER):
        paths = [Path(part) for part in spec.removeprefix(IMAGEFOLDER).split(",") if part]
        if paths:
            return load_imagefolder(paths, limit, image_size)
    raise ValueError(f"--data: got {spec!r}; allowed: digits or imagefolder:PATH[,PATH...]")


def load_digits_data(limit: int | None, image_size: int | None) -> Dataset:
    """Scikit-learn's digits; their grey levels 0 to 16 become 0 to 240."""
    bunch = load_digits()
    images = (bunch.images * 15).astype(np.uint8)
    quota = _Quota(limit)
    for image, label in zip(images, bunch.target, strict=True):
        if quota.wants("train", str(label)):
            if image_size is not None:
                image = np.asarray(Image.fromarray(image).resize((image_size, image_size)))
            quota.add("train", str(label), image[None])
    return _to_dataset(quota.result(), flip=False)


def load_imagefolder(
    paths: list[Path], limit: int | None = None, image_size: int | None = None
) -> Dataset:
    """Reads a class-per-folder image tree as RGB, all of it into memory.

    Each path is a folder, a `.tar` (also `.tar.xz`, `.tar.gz`, `.tar.bz2`) or a folder of such
    tars; several paths are read as one tree. An image's folder is its class; where that folder's
    parent is called `train`, `val` or `test`, that is its split. A split which is not there is
    taken, stratified, out of `train`. Tars are streamed, nothing is unpacked to disk, and members
    which are not regular files are skipped.

    Tars are usually ordered by class and name no class ahead, so under a `limit` all of a tar has
    to be passed through; only the first images of each class are decoded and kept.
    """
    quota = _Quota(limit)
    first: tuple[str, tuple[int, ...]] | None = None
    for entry in tqdm(_entries(paths), desc="reading images", unit="img", mininterval=0.5):
        if not quota.wants(entry.split, entry.label):
            continue
        image = _decode(entry, image_size)
        first = first or (entry.name, image.shape)
        if image.shape != first[1]:
            raise ValueError(
                f"--data: images differ in size ({first[0]}: {_size(first[1])}, "
                f"{entry.name}: {_size(image.shape)}); give --image-size to resize them"
            )
        quota.add(entry.split, entry.label, image)
    if first is None:
        raise ValueError(
            f"--data: no images in {', '.join(map(str, paths))}; expected CLASS/IMAGE or "
            f"train/CLASS/IMAGE, IMAGE ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return _to_dataset(quota.result(), flip=True)


def augment(images: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Shifts each image by up to an eighth of its side, black at the edge; mirrors half of them.

    Args:
        images: [B, C, H, W], any dtype.
        flip: mirror left and right with probability one half.
        generator: a CPU generator, so that the draws do not depend on the device.
    """
    count, channels, height, width = images.shape
    pad = max(1, min(height, width) // 8)
    padded = torch.nn.functional.pad(images, [pad] * 4)
    top, left = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


class _Quota:
    """Keeps the first images of each class in each split, as many as a stratified limit allows.

    Neither the classes nor the splits are known ahead: a class may hold limit / (classes seen so
    far in its split) images, and `result` trims to the final quota.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.kept: dict[str, dict[str, list[Array]]] = defaultdict(lambda: defaultdict(list))

    def wants(self, split: str, label: str) -> bool:
        """Is there room for one more image of this class?"""
        if self.limit is None:
            return True
        labels = self.kept[split]
        room = -(-self.limit // (len(labels) + (label not in labels)))
        return len(labels.get(label, ())) < room

    def add(self, split: str, label: str, image: Array) -> None:
        """Keeps an image [C, H, W]."""
        self.kept[split][label].append(image)

    def result(self) -> dict[str, dict[str, list[Array]]]:
        """What was kept; with val or test beside train, the limit is shared out 3 : 1 : 1."""
        kept = {split: labels for split, labels in self.kept.items() if labels}
        if self.limit is None:
            return kept
        held_out = self.limit // (2 + len(kept))
        trimmed = {}
        for split, labels in kept.items():
            share = self.limit - held_out * (len(kept) - 1) if split == "train" else held_out
            if share < len(labels):
                raise ValueError(
                    f"--limit: {self.limit} leaves {share} images for the {len(labels)} classes of "
                    f"{split}; at least one a class is needed"
                )
            base, extra = divmod(share, len(labels))
            trimmed[split] = {
                label: labels[label][: base + (number < extra)]
                for number, label in enumerate(sorted(labels))
            }
        return trimmed


def _entries(paths: list[Path]) -> Iterator[Entry]:
    """The image files under the paths, in a fixed order."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"--data: {path} does not exist")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if (file.parent == path and file.name.endswith(TAR_SUFFIXES)) or file == path:
                yield from _tar_entries(file)
            elif (place := _place(file.relative_to(path).as_posix())) and file.is_file():
                yield Entry(*place, str(file), file.read_bytes)


def _tar_entries(path: Path) -> Iterator[Entry]:
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                place = _place(member.name)
                if place and member.isreg():
                    name = f"{path}:{member.name}"
                    if member.size > MAX_IMAGE_BYTES:
                        raise ValueError(f"--data: {name} is larger than {MAX_IMAGE_BYTES} bytes")
                    file = archive.extractfile(member)
                    assert file is not None  # a regular member always has a file
                    yield Entry(*place, name, file.read)
            # tarfile takes a cut or garbled header for the end; a real end is a block of zeros.
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it breaks off at byte {archive.offset}")
    except TAR_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--data: cannot read {path} as a tar: {reason}") from error


def _place(name: str) -> tuple[str, str] | None:
    """Split and class of an image file's path inside its tree; None for any other file."""
    path = PurePosixPath(name)
    if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
        return None
    if path.parent.name in ("", ".."):
        return None
    split = path.parent.parent.name
    return (split if split in SPLITS else "train"), path.parent.name


def _decode(entry: Entry, image_size: int | None) -> Array:
    """An image file as RGB [3, H, W]."""
    try:
        image = Image.open(io.BytesIO(entry.read())).convert("RGB")
    except (*TAR_ERRORS, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--data: cannot read the image {entry.name}: {error}") from error
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]}"


def _to_dataset(kept: Mapping[str, Mapping[str, list[Array]]], flip: bool) -> Dataset:
    """Numbers the classes, shuffles each split and takes missing splits out of `train`."""
    if "train" not in kept:
        raise ValueError(f"--data: found only the split {' and '.join(kept)}; train/ is needed")
    classes = tuple(sorted(kept["train"]))
    if len(classes) < 2:
        raise ValueError(f"--data: found one class, {classes[0]!r}; at least 2 are needed")
    splits = {split: _stack(labels, classes) for split, labels in kept.items()}
    if "test" not in splits:
        splits["train"], splits["test"] = _carve(splits["train"], TEST_SHARE, "test", classes)
    if "val" not in splits:
        splits["train"], splits["val"] = _carve(splits["train"], VAL_SHARE, "val", classes)
    return Dataset(splits["train"], splits["val"], splits["test"], classes, flip)


def _stack(labels: Mapping[str, list[Array]], classes: tuple[str, ...]) -> Split:
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise ValueError(f"--data: class {unknown[0]!r} is held out but is not in train")
    images = np.stack([image for name in sorted(labels) for image in labels[name]])
    numbers = [classes.index(name) for name in sorted(labels) for _ in labels[name]]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    return Split(torch.from_numpy(images[order]), torch.tensor(numbers)[order])


def _carve(split: Split, share: float, name: str, classes: tuple[str, ...]) -> tuple[Split, Split]:
    """Takes a stratified share out of a split: (the rest, the share)."""
    try:
        rest, part = train_test_split(
            np.arange(len(split.labels)),
            test_size=share,
            stratify=split.labels.numpy(),
            random_state=SPLIT_SEED,
        )
    except ValueError as error:
        raise ValueError(
            f"--data/--limit: {len(split.labels)} images of {len(classes)} classes are too few to "
            f"set {share:.0%} aside as {name}, each class in both parts ({error})"
        ) from error
    return Split(split.images[rest], split.labels[rest]), Split(
        split.images[part], split.labels[part]
    )
