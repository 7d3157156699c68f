"""The reference trainer's data: image trees and tars, feature files, splits, limits, augmentation."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pc_kernels.distill import data, images
from pc_kernels.distill.storage import write_arrays

CLASSES = ("ant", "bee", "cow")


def png(value: int, size: int = 8) -> bytes:
    """A noisy image around a grey value."""
    pixels = np.random.default_rng(value).integers(0, 40, (size, size, 3)) + value
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(counts: dict[str, int], classes: tuple[str, ...] = CLASSES) -> dict[str, bytes]:
    """Names and contents of a tree: `counts` images a class under each prefix."""
    return {
        f"{prefix}{label}/{i}.png": png(50 * number + i % 50)
        for prefix, count in counts.items()
        for number, label in enumerate(classes)
        for i in range(count)
    }


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:xz" if path.suffix == ".xz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sizes(loaded: data.Dataset) -> tuple[int, ...]:
    return tuple(len(split.labels) for split in loaded.splits.values())


def same(one: data.Dataset, two: data.Dataset) -> bool:
    pairs = zip(one.splits.values(), two.splits.values(), strict=True)
    return one.classes == two.classes and all(
        torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True)
    )


def tree(*paths: Path, **options: Any) -> data.Dataset:
    return data.load("imagefolder:" + ",".join(map(str, paths)), **options)


class TestImages:
    def test_digits(self) -> None:
        loaded = data.load("digits")
        assert sum(sizes(loaded)) == 1797
        assert loaded.train.inputs.shape[1:] == (1, 8, 8)
        assert loaded.train.inputs.dtype == torch.uint8
        assert int(loaded.train.inputs.max()) == 240
        assert loaded.train.teacher.shape[1] == 0
        for split in loaded.splits.values():
            share = torch.bincount(split.labels).double() / len(split.labels)
            assert share.sub(0.1).abs().max() < 0.01

    def test_torchvision(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stand-in with torchvision's attributes; its own files have checksums that none passes."""

        def make(root: Path, train: bool, download: bool) -> SimpleNamespace:
            if root != tmp_path:
                raise RuntimeError("Dataset not found or corrupted.")
            count = 40 if train else 12
            images = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), np.uint8)
            targets = [row % 4 for row in range(count)]
            return SimpleNamespace(
                data=images, targets=targets, classes=["ant", "bee", "cat", "dog"]
            )

        stand = SimpleNamespace(CIFAR10=make)
        monkeypatch.setattr(data, "import_module", lambda name: stand)
        loaded = data.load(f"torchvision:CIFAR10@{tmp_path}")
        assert [len(split.labels) for split in loaded.splits.values()] == [32, 8, 12]
        assert loaded.classes == ("ant", "bee", "cat", "dog")
        table = data.read(f"torchvision:CIFAR10@{tmp_path}")
        image = make(tmp_path, train=False, download=True).data[0]
        row = int(np.flatnonzero(table.names == "ant/40")[0])
        assert np.array_equal(table.inputs[row], image.transpose(2, 0, 1))
        assert table.splits[row] == "test"
        small = data.load(f"torchvision:CIFAR10@{tmp_path}", image_size=8)
        assert small.train.inputs.shape == (32, 3, 8, 8)
        with pytest.raises(
            ValueError, match="torchvision has no CIFAR10 in elsewhere: Dataset not"
        ):
            data.load("torchvision:CIFAR10@elsewhere")

    def test_splits_do_not_overlap(self, tmp_path: Path) -> None:
        loaded = tree(write_tree(tmp_path, pictures({"": 20})))
        everything = torch.cat([split.inputs for split in loaded.splits.values()])
        assert sizes(loaded) == (33, 9, 18)
        assert len(torch.unique(everything.flatten(1), dim=0)) == 60

    @pytest.mark.parametrize("suffix", [".tar", ".tar.xz"])
    @pytest.mark.parametrize("counts", [{"": 12}, {"train/": 12, "test/": 4}, {"./a/train/": 12}])
    def test_tar_is_the_tree(self, tmp_path: Path, suffix: str, counts: dict[str, int]) -> None:
        files = dict(sorted(pictures(counts).items()))
        folder = tree(write_tree(tmp_path / "tree", files))
        assert folder.classes == CLASSES
        assert folder.train.inputs.shape[1:] == (3, 8, 8)
        assert same(folder, tree(write_tar(tmp_path / f"x{suffix}", files)))

    def test_given_splits_are_kept(self, tmp_path: Path) -> None:
        files = pictures({"train/": 10, "val/": 2, "test/": 3})
        assert sizes(tree(write_tree(tmp_path, files))) == (30, 6, 9)

    def test_several_tars_and_a_folder_of_tars(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "test.tar", pictures({"test/": 4}))
        write_tar(tmp_path / "train-0.tar.xz", pictures({"train/": 10}, CLASSES[:2]))
        write_tar(tmp_path / "train-1.tar.xz", pictures({"train/": 10}, CLASSES[2:]))
        loaded = tree(*sorted(tmp_path.iterdir()))
        assert sizes(loaded) == (24, 6, 12)
        assert same(loaded, tree(tmp_path))

    def test_cache_is_read_until_the_tree_changes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = pictures({"": 10})
        path, cache = write_tree(tmp_path / "tree", files), str(tmp_path / "cache")
        first = tree(path, cache=cache)
        decode = images._decode_tree
        monkeypatch.setattr(images, "_decode_tree", None)
        assert same(first, tree(path, cache=cache))
        monkeypatch.setattr(images, "_decode_tree", decode)
        write_tree(path, {"ant/new.png": png(9)})
        assert sum(sizes(tree(path, cache=cache))) == 31

    def test_limit_and_classes(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", pictures({"train/": 30, "test/": 30}))
        loaded = tree(path, limit={"train": 40, "test": 1000})
        assert sizes(loaded) == (40, 18, 90)
        counts = torch.bincount(loaded.train.labels)
        assert int(counts.max() - counts.min()) <= 1
        assert tree(path, classes=2).classes == CLASSES[:2]

    def test_resize(self, tmp_path: Path) -> None:
        files = pictures({"": 10}) | {"ant/big.png": png(7, 20)}
        loaded = tree(write_tree(tmp_path, files), image_size=6)
        assert loaded.train.inputs.shape[1:] == (3, 6, 6)

    def test_odd_members_are_skipped(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", pictures({"": 10}) | {"ant/notes.txt": b"no image"})
        with tarfile.open(path, "a") as archive:
            for name, kind in (("ant/s.png", tarfile.SYMTYPE), ("ant/d.png", tarfile.CHRTYPE)):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "/etc/passwd"
                archive.addfile(member)
            archive.addfile(tarfile.TarInfo("ant/._0.png"))
        before = set(tmp_path.rglob("*"))
        assert sum(sizes(tree(path))) == 30
        assert set(tmp_path.rglob("*")) == before

    def test_augmentation_shifts_and_mirrors(self) -> None:
        image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8) + 1
        batch, ways = image.expand(200, -1, -1, -1), ("shift", "flip")
        one, two = (data.augment(batch, ways, torch.Generator().manual_seed(3)) for _ in "ab")
        assert torch.equal(one, two)
        padded = torch.nn.functional.pad(image, [1] * 4)[0, 0]
        crops = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
        expected = torch.stack(crops + [crop.flip(1) for crop in crops])
        assert torch.equal(torch.unique(one[:, 0], dim=0), torch.unique(expected, dim=0))
        assert data.augment(batch, (), torch.Generator()) is batch


class TestImageErrors:
    def test_empty_tree(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"ant/notes.txt": b""})
        with pytest.raises(ValueError, match="no images in"):
            tree(tmp_path)

    @pytest.mark.parametrize("kind", ["folder", "tar"])
    def test_empty_class_folder_is_named(self, tmp_path: Path, kind: str) -> None:
        path = write_tree(tmp_path / "tree", pictures({"train/": 10}))
        (path / "train" / "dog").mkdir()
        (path / "__MACOSX").mkdir()
        if kind == "tar":
            with tarfile.open(tmp_path / "x.tar", "w") as archive:
                archive.add(path, ".")
            path = tmp_path / "x.tar"
        with pytest.raises(ValueError, match=r"the class folder .*train/dog holds no image"):
            tree(path)

    def test_one_class(self, tmp_path: Path) -> None:
        write_tree(tmp_path, pictures({"": 10}, ("ant",)))
        with pytest.raises(ValueError, match="found one class, 'ant'; at least 2"):
            tree(tmp_path)

    def test_unknown_class_in_test(self, tmp_path: Path) -> None:
        write_tree(tmp_path, pictures({"train/": 10}) | pictures({"test/": 2}, ("dog",)))
        with pytest.raises(ValueError, match="class 'dog' is held out but is not in train"):
            tree(tmp_path)

    def test_only_a_test_split(self, tmp_path: Path) -> None:
        write_tree(tmp_path, pictures({"test/": 10}))
        with pytest.raises(ValueError, match="only the split test; train/ is needed"):
            tree(tmp_path)

    def test_too_few(self, tmp_path: Path) -> None:
        write_tree(tmp_path, pictures({"": 2}))
        with pytest.raises(ValueError, match="6 rows of 3 classes are too few to set"):
            tree(tmp_path)

    def test_sizes_differ(self, tmp_path: Path) -> None:
        write_tree(tmp_path, pictures({"": 10}) | {"ant/big.png": png(7, 20)})
        with pytest.raises(ValueError, match=r"differ in size .*8x8.*20x20.*image_size"):
            tree(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"not an image", png(9)[:60]])
    def test_corrupt_image_is_named(self, tmp_path: Path, content: bytes) -> None:
        files = pictures({"": 10}) | {"bee/bad.png": content}
        for path in (write_tree(tmp_path / "a", files), write_tar(tmp_path / "b.tar", files)):
            with pytest.raises(ValueError, match=r"cannot read the image .*bee/bad\.png"):
                tree(path)

    @pytest.mark.parametrize("suffix", [".tar", ".tar.xz"])
    def test_broken_tar_is_named(self, tmp_path: Path, suffix: str) -> None:
        path = write_tar(tmp_path / f"x{suffix}", pictures({"": 30}))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 300])
        with pytest.raises(ValueError, match=r"x\.tar"):
            tree(path)
        path.write_bytes(b"no tar")
        with pytest.raises(ValueError, match=r"cannot read .*x\.tar.* as a tar"):
            tree(path)

    def test_limit_below_one_a_class(self) -> None:
        with pytest.raises(ValueError, match="limit: train = 7 is less than a row for each of 10"):
            data.load("digits", limit={"train": 7})


class TestFeatures:
    def file(self, path: Path, **changes: Any) -> Path:
        """30 inputs of 3 classes; None takes an array out."""
        random = np.random.default_rng(0)
        arrays: dict[str, Any] = {
            "inputs": random.normal(size=(30, 5)).astype(np.float32),
            "features": random.normal(size=(30, 4)).astype(np.float16) + 3,
            "labels": np.arange(30) % 3,
        }
        arrays |= changes
        write_arrays(path, **{key: value for key, value in arrays.items() if value is not None})
        return path

    def test_inputs_of_any_kind(self, tmp_path: Path) -> None:
        paths = [self.file(tmp_path / name) for name in ("train-0.npz", "train-1.npz", "test.npz")]
        loaded = data.load("features:" + ",".join(map(str, paths)))
        assert sizes(loaded) == (48, 12, 30)
        assert loaded.train.inputs.shape[1:] == (5,)
        assert loaded.train.teacher.mean(0).abs().max() < 1e-6
        assert float(loaded.train.teacher.square().mean()) == pytest.approx(1)

    def test_safetensors(self, tmp_path: Path) -> None:
        numpy = pytest.importorskip("safetensors.numpy")
        with np.load(self.file(tmp_path / "a.npz")) as arrays:
            numpy.save_file(dict(arrays), tmp_path / "a.safetensors")
        one, two = (data.load(f"features:{tmp_path}/a.{kind}") for kind in ("npz", "safetensors"))
        assert same(one, two)
        (tmp_path / "a.safetensors").write_bytes(b"no")
        with pytest.raises(ValueError, match=r"cannot read .*a\.safetensors"):
            data.load(f"features:{tmp_path}/a.safetensors")

    def test_teacher_by_name(self, tmp_path: Path) -> None:
        """Rows come in another order, one input has no features, and splits share names."""
        files = pictures({"train/": 10, "test/": 4})
        path = write_tar(tmp_path / "x.tar", files)
        plain = tree(path)
        for split, count in (("train", 30), ("test", 12)):
            names = [name.removeprefix(f"{split}/") for name in files if name.startswith(split)]
            first = [
                np.asarray(Image.open(io.BytesIO(files[f"{split}/{name}"])))[0, 0, 0]
                for name in names
            ]
            order = np.random.default_rng(1).permutation(count)[: count - (split == "train")]
            write_arrays(
                tmp_path / f"{split}.npz",
                names=np.array(names)[order],
                features=np.array(first, np.float32)[order, None],
            )
        loaded = tree(path, teacher=f"features:{tmp_path}/train.npz,{tmp_path}/test.npz")
        assert sum(sizes(loaded)) == sum(sizes(plain)) - 1
        pixels = loaded.train.inputs[:, 0, 0, 0].float()
        for split in loaded.splits.values():
            expected = split.inputs[:, 0, 0, 0].float() - pixels.mean()
            ratio = split.teacher[:, 0] / expected
            assert ratio.sub(ratio[0]).abs().max() < 1e-4 * ratio[0]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"features": None}, "holds inputs, labels; features are needed"),
            ({"labels": np.arange(9)}, "rows must be as many in each"),
            ({"features": np.zeros(30, np.float32)}, r"features must be \[N, D\]; got \(30,\)"),
            ({"features": np.zeros((30, 2), int)}, "features must be floating-point; got int64"),
            ({"inputs": np.full((30, 2), np.nan)}, "inputs of row 0 are not finite"),
            ({"labels": np.array([None] * 30)}, r"cannot read .*x\.npz"),
        ],
    )
    def test_errors(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        path = self.file(tmp_path / "x.npz", **changes)
        with pytest.raises(ValueError, match=message):
            data.load(f"features:{path}")

    def test_names_that_do_not_match(self, tmp_path: Path) -> None:
        path = self.file(tmp_path / "x.npz", names=np.array([f"dog/{i}.png" for i in range(30)]))
        with pytest.raises(ValueError, match="knows none of the 1797 inputs; its names are like"):
            data.load("digits", f"features:{path}")

    @pytest.mark.parametrize("source", ["cifar", "imagefolder:", "features:"])
    def test_unknown_source(self, source: str) -> None:
        with pytest.raises(ValueError, match=f"data: got '{source}'; allowed: digits, torchvision"):
            data.load(source)

    @pytest.mark.parametrize("kind", ["imagefolder", "features"])
    def test_missing_path(self, kind: str) -> None:
        with pytest.raises(FileNotFoundError, match=r"/no/such/place\.npz does not exist"):
            data.load(f"{kind}:/no/such/place.npz")


@pytest.mark.skipif(
    "PC_KERNELS_CIFAR100" not in os.environ, reason="PC_KERNELS_CIFAR100 names no folder of tars"
)
def test_cifar100() -> None:
    loaded = data.load(f"imagefolder:{os.environ['PC_KERNELS_CIFAR100']}", cache="runs/cache")
    assert len(loaded.classes) == 100
    assert sizes(loaded) == (40000, 10000, 10000)
    assert loaded.train.inputs.shape[1:] == (3, 32, 32)
