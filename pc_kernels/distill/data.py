"""Data for the reference trainer by name: its splits as tensors, and augmentation on their device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from .images import load_tree
from .table import SPLITS, Table, load_features, with_features
from .texts import load_texts, load_wordnet, tokenise

TEST_SHARE, VAL_SHARE = 0.3, 0.2  # of all rows; of what is left after the test rows
SPLIT_SEED = 0  # the split is the same for every seed of a run
KINDS = ("imagefolder", "texts", "wordnet", "features")
CIFAR = tuple(f"torchvision:{name}@FOLDER" for name in ("CIFAR10", "CIFAR100"))
SOURCES = ", ".join(["digits", *CIFAR, *(f"{kind}:PATH[,PATH...]" for kind in KINDS)])


class Split(NamedTuple):
    """Inputs [N, ...], class numbers [N] and, once known, the teacher's features [N, Dt].

    Texts are int64 [N, L], numbers of words; all else is as in `Table`.
    """

    inputs: Tensor
    labels: Tensor
    teacher: Tensor

    def to(self, device: torch.device | str) -> Split:
        """The same rows on another device."""
        return Split(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class Dataset:
    """Three splits of labelled inputs; `vocabulary`: how many words texts are made of, 0: no texts."""

    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    vocabulary: int = 0

    @property
    def splits(self) -> dict[str, Split]:
        """By name."""
        return {name: getattr(self, name) for name in SPLITS}

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on another device."""
        return self._changed(lambda _, split: split.to(device))

    def with_teacher(self, features: Mapping[str, Tensor]) -> Dataset:
        """The same data with a teacher's features of each split, centred and scaled.

        The training rows' mean becomes 0 and their mean square norm 1 a dimension: cosines see
        differences between inputs, not what all of them share, and no loss depends on the scale.
        """
        train = features["train"].float()
        centre = train.mean(0)
        scale = (train - centre).square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)

        def taught(name: str, split: Split) -> Split:
            return split._replace(teacher=(features[name].float() - centre) / scale)

        return self._changed(taught)

    def _changed(self, change: Callable[[str, Split], Split]) -> Dataset:
        train, val, test = (change(name, split) for name, split in self.splits.items())
        return Dataset(train, val, test, self.classes, self.vocabulary)


def load(source: str, teacher: str = "", **options: Any) -> Dataset:
    """Loads data by name, texts as the numbers of their most frequent words: `to_dataset(read(...))`."""
    return to_dataset(read(source, teacher, **options))


def read(
    source: str,
    teacher: str = "",
    *,
    limit: Mapping[str, int] | None = None,
    classes: int | None = None,
    image_size: int | None = None,
    cache: str | None = None,
) -> Table:
    """Reads data by name; every row has its split.

    Args:
        source: `digits`, the 1,797 8x8 grey images bundled with scikit-learn (the test part of the
            UCI "Optical Recognition of Handwritten Digits" set, no download);
            `torchvision:CIFAR10@FOLDER` or `CIFAR100`, downloaded there if it is not;
            `imagefolder:PATH[,PATH...]`, see `images.load_tree`; `texts:PATH[,PATH...]`, see
            `texts.load_texts`; `wordnet:FOLDER`, see `texts.load_wordnet`; or
            `features:PATH[,PATH...]`, see `table.load_features`.
        teacher: `features:PATH[,PATH...]`: features of the inputs by name, see
            `table.with_features`; anything else leaves the teacher's features empty.
        limit: at most this many rows of a split (`train`, `val`, `test`), the classes in equal
            parts; other splits are whole.
        classes: only the first so many classes, by name; None: all.
        image_size: side in pixels that images are resized to; None keeps their size.
        cache: folder that keeps decoded image trees; None keeps none.

    Raises:
        ValueError, FileNotFoundError: the data are not usable; the message says what, and why.
    """
    kind, _, rest = source.partition(":")
    paths = [Path(part).expanduser() for part in rest.split(",") if part]
    if source == "digits":
        table = _digits(image_size)
    elif f"{source.partition('@')[0]}@FOLDER" in CIFAR:
        table = _cifar(rest, image_size)
    elif kind not in KINDS or not paths or (kind == "wordnet" and len(paths) > 1):
        raise ValueError(f"data: got {source!r}; allowed: {SOURCES}")
    elif kind == "imagefolder":
        table = load_tree(paths, image_size, None if cache is None else Path(cache).expanduser())
    elif kind == "texts":
        table = load_texts(paths)
    else:
        table = load_wordnet(paths[0]) if kind == "wordnet" else load_features(paths)
    kind, _, rest = teacher.partition(":")
    if kind == "features":
        table = with_features(table, [Path(part).expanduser() for part in rest.split(",")])
    if classes is not None:
        table = table.rows(np.isin(table.labels, np.unique(table.labels)[:classes]))
    return _divided(table, limit or {})


def to_dataset(
    table: Table, tokenizer: str = "words", *, vocabulary: int = 8192, text_length: int = 32
) -> Dataset:
    """A table's splits as tensors, its classes numbered, its teacher's features centred and scaled.

    Args:
        table: as `read` gives it.
        tokenizer: of texts, see `texts.tokenise`.
        vocabulary: the most words.
        text_length: words of a text.

    Raises:
        ValueError, FileNotFoundError: the tokenizer cannot be read.
    """
    classes, numbers = np.unique(table.labels, return_inverse=True)
    inputs, words = table.inputs, 0
    if inputs.dtype == object:
        train = table.splits == "train"
        inputs, words = tokenise(
            inputs, train, tokenizer, vocabulary=vocabulary, length=text_length
        )
    features = np.empty((len(inputs), 0)) if table.features is None else table.features
    splits = {}
    for name in SPLITS:
        rows = table.splits == name
        own = [torch.from_numpy(array[rows]) for array in (inputs, numbers, features)]
        splits[name] = Split(own[0], own[1], own[2].float())
    data = Dataset(**splits, classes=tuple(classes.tolist()), vocabulary=words)
    if table.features is None:
        return data
    return data.with_teacher({name: split.teacher for name, split in splits.items()})


def _digits(image_size: int | None) -> Table:
    """Scikit-learn's digits; their grey levels 0 to 16 become 0 to 240."""
    bunch = load_digits()
    images = _resized((bunch.images * 15).astype(np.uint8), image_size)
    labels = bunch.target.astype(str)
    names = np.array([f"{label}/{row}" for row, label in enumerate(labels)])
    return Table(images[:, None], labels, np.full(len(labels), "train"), names)


def _cifar(name_and_folder: str, image_size: int | None) -> Table:
    """CIFAR-10 or CIFAR-100 as torchvision has it."""
    name, _, folder = name_and_folder.partition("@")
    root = Path(folder or "data").expanduser()
    try:
        make = getattr(import_module("torchvision.datasets"), name)
        parts = {
            split: make(root, train=split == "train", download=True) for split in ("train", "test")
        }
    except ImportError as error:
        raise ValueError(f"data: {error}: pip install torchvision") from error
    except (RuntimeError, OSError) as error:  # no network, or damaged files
        raise ValueError(f"data: torchvision has no {name} in {root}: {error}") from error
    images = np.concatenate([_resized(part.data, image_size) for part in parts.values()])
    labels = np.concatenate([np.array(part.classes)[part.targets] for part in parts.values()])
    splits = np.repeat(list(parts), [len(part.data) for part in parts.values()])
    names = np.array([f"{label}/{row}" for row, label in enumerate(labels)])
    return Table(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels, splits, names)


def _resized(images: np.ndarray, side: int | None) -> np.ndarray:
    """Images [N, H, W] or [N, H, W, C] with sides of so many pixels; None: as they are."""
    if side is None:
        return images
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in images])


def augment(inputs: Tensor, ways: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """A batch of images, each moved or mirrored on its own, all at once on their device.

    Args:
        inputs: [B, C, H, W], any dtype; other shapes are allowed where `ways` is empty.
        ways: `shift`: by up to an eighth of the side, black at the edge; `flip`: left and right
            change places with probability one half.
        generator: a CPU generator, so that the draws do not depend on the device.
    """
    if not ways:
        return inputs
    count, channels, height, width = inputs.shape
    pad = max(1, min(height, width) // 8) if "shift" in ways else 0
    padded = torch.nn.functional.pad(inputs, [pad] * 4)
    top, left = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if "flip" in ways:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(inputs.device), columns.to(inputs.device)
    image = torch.arange(count, device=inputs.device)[:, None, None, None]
    channel = torch.arange(channels, device=inputs.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _divided(table: Table, limit: Mapping[str, int]) -> Table:
    """Takes missing splits out of `train`, and shuffles and limits each."""
    rows = {name: np.flatnonzero(table.splits == name) for name in SPLITS}
    present = [name for name in SPLITS if len(rows[name])]
    if "train" not in present:
        raise ValueError(f"data: found only the split {' and '.join(present)}; train/ is needed")
    classes, numbers = np.unique(table.labels, return_inverse=True)
    _check_classes(table, rows, classes)
    for name, share in (("test", TEST_SHARE), ("val", VAL_SHARE)):
        if name not in present:
            rows["train"], rows[name] = _carve(rows["train"], numbers, share, name)
    for name in SPLITS:
        shuffled = np.random.default_rng(SPLIT_SEED).permutation(rows[name])
        rows[name] = _limited(shuffled, numbers, limit.get(name), name)
    splits = np.concatenate([np.full(len(rows[name]), name) for name in SPLITS])
    divided = table.rows(np.concatenate([rows[name] for name in SPLITS]))
    return replace(divided, splits=splits, origins=divided.splits)


def _check_classes(table: Table, rows: Mapping[str, np.ndarray], classes: np.ndarray) -> None:
    if len(classes) < 2:
        raise ValueError(f"data: found one class, {str(classes[0])!r}; at least 2 are needed")
    unknown = sorted(set(classes) - set(table.labels[rows["train"]]))
    if unknown:
        raise ValueError(f"data: class {str(unknown[0])!r} is held out but is not in train")


def _carve(
    rows: np.ndarray, numbers: np.ndarray, share: float, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Takes a stratified share out of rows: (the rest, the share)."""
    try:
        rest, part = train_test_split(
            rows, test_size=share, stratify=numbers[rows], random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise ValueError(
            f"data: {len(rows)} rows of {len(set(numbers[rows]))} classes are too few to set "
            f"{share:.0%} aside as {name}, each class in both parts ({error})"
        ) from error
    return rest, part


def _limited(rows: np.ndarray, numbers: np.ndarray, count: int | None, name: str) -> np.ndarray:
    """The first rows, as many of each class (or one more, or all that there are)."""
    if count is None or count >= len(rows):
        return rows
    labels = numbers[rows]
    classes = len(set(labels))
    if count < classes:
        raise ValueError(
            f"limit: {name} = {count} is less than a row for each of {classes} classes"
        )
    place = np.empty(len(rows), dtype=int)  # of a row among those of its class
    for label in set(labels):
        place[labels == label] = np.arange((labels == label).sum())
    return rows[np.sort(np.lexsort((labels, place))[:count])]
