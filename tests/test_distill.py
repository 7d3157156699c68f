"""The reference trainer: data, errors, determinism, report, and the command line end to end."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pc_kernels.distill
from pc_kernels.distill import data, report
from pc_kernels.distill.__main__ import main
from pc_kernels.distill.evaluate import Metrics
from pc_kernels.distill.experiment import FLOOR, TEACHER, Config, Run, SeedResult, run_seed
from pc_kernels.distill.models import Encoder, make_student
from pc_kernels.distill.objectives import METHODS
from pc_kernels.distill.train import calibrate

CLASSES = ("ant", "bee", "cow")


def png(value: int, size: int = 8) -> bytes:
    """A noisy image around a grey value."""
    pixels = np.random.default_rng(value).integers(0, 40, (size, size, 3)) + value
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def images(counts: dict[str, int], classes: tuple[str, ...] = CLASSES) -> dict[str, bytes]:
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


def sizes(loaded: data.Dataset) -> tuple[int, int, int]:
    return len(loaded.train.labels), len(loaded.val.labels), len(loaded.test.labels)


def same(a: data.Dataset, b: data.Dataset) -> bool:
    pairs = zip((*a.train, *a.val, *a.test), (*b.train, *b.val, *b.test), strict=True)
    return a.classes == b.classes and all(torch.equal(x, y) for x, y in pairs)


class TestData:
    def test_digits(self) -> None:
        loaded = data.load("digits")
        assert sum(sizes(loaded)) == 1797
        assert loaded.train.images.shape[1:] == (1, 8, 8)
        assert loaded.train.images.dtype == torch.uint8
        assert int(loaded.train.images.max()) == 240
        for split in (loaded.train, loaded.val, loaded.test):
            share = torch.bincount(split.labels).double() / len(split.labels)
            assert share.sub(0.1).abs().max() < 0.01

    def test_splits_do_not_overlap(self, tmp_path: Path) -> None:
        loaded = data.load_imagefolder([write_tree(tmp_path, images({"": 20}))])
        everything = torch.cat([loaded.train.images, loaded.val.images, loaded.test.images])
        assert sizes(loaded) == (33, 9, 18)
        assert len(torch.unique(everything.flatten(1), dim=0)) == 60

    @pytest.mark.parametrize("suffix", [".tar", ".tar.xz"])
    @pytest.mark.parametrize("counts", [{"": 12}, {"train/": 12, "test/": 4}, {"./a/train/": 12}])
    def test_tar_is_the_tree(self, tmp_path: Path, suffix: str, counts: dict[str, int]) -> None:
        files = dict(sorted(images(counts).items()))
        tree = data.load_imagefolder([write_tree(tmp_path / "tree", files)])
        tar = data.load_imagefolder([write_tar(tmp_path / f"x{suffix}", files)])
        assert tree.classes == CLASSES
        assert tree.train.images.shape[1:] == (3, 8, 8)
        assert same(tree, tar)

    def test_given_splits_are_kept(self, tmp_path: Path) -> None:
        files = images({"train/": 10, "val/": 2, "test/": 3})
        assert sizes(data.load_imagefolder([write_tree(tmp_path, files)])) == (30, 6, 9)

    def test_several_tars_and_a_folder_of_tars(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "test.tar", images({"test/": 4}))
        write_tar(tmp_path / "train-0.tar.xz", images({"train/": 10}, CLASSES[:2]))
        write_tar(tmp_path / "train-1.tar.xz", images({"train/": 10}, CLASSES[2:]))
        listed = ",".join(str(path) for path in sorted(tmp_path.iterdir()))
        loaded = data.load(f"imagefolder:{listed}")
        assert sizes(loaded) == (24, 6, 12)
        assert same(loaded, data.load(f"imagefolder:{tmp_path}"))

    @pytest.mark.parametrize("limit", [40, 45, 1000])
    def test_limit_is_stratified(self, tmp_path: Path, limit: int) -> None:
        files = images({"train/": 30, "test/": 30})
        loaded = data.load_imagefolder([write_tar(tmp_path / "x.tar", files)], limit)
        assert sum(sizes(loaded)) == min(limit, 180)
        for split in (loaded.train, loaded.val, loaded.test):
            counts = torch.bincount(split.labels, minlength=3)
            assert int(counts.max() - counts.min()) <= 1

    def test_resize(self, tmp_path: Path) -> None:
        files = images({"": 10}) | {"ant/big.png": png(7, 20)}
        loaded = data.load_imagefolder([write_tree(tmp_path, files)], image_size=6)
        assert loaded.train.images.shape[1:] == (3, 6, 6)

    def test_odd_members_are_skipped(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", images({"": 10}) | {"ant/notes.txt": b"no image"})
        with tarfile.open(path, "a") as archive:
            for name, kind in (("ant/s.png", tarfile.SYMTYPE), ("ant/d.png", tarfile.CHRTYPE)):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "/etc/passwd"
                archive.addfile(member)
            archive.addfile(tarfile.TarInfo("ant/._0.png"))
        before = set(tmp_path.rglob("*"))
        assert sum(sizes(data.load_imagefolder([path]))) == 30
        assert set(tmp_path.rglob("*")) == before

    def test_augmentation_shifts_and_mirrors(self) -> None:
        image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8) + 1
        batch = image.expand(200, -1, -1, -1)
        one, two = (data.augment(batch, True, torch.Generator().manual_seed(3)) for _ in "ab")
        assert torch.equal(one, two)
        padded = torch.nn.functional.pad(image, [1] * 4)[0, 0]
        crops = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
        expected = torch.stack(crops + [crop.flip(1) for crop in crops])
        assert torch.equal(torch.unique(one[:, 0], dim=0), torch.unique(expected, dim=0))


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--data cifar", "--data: got 'cifar'; allowed: digits or imagefolder:PATH"),
            ("--data imagefolder:", "--data: got 'imagefolder:'"),
            ("--data imagefolder:/no/such/place", "--data: /no/such/place does not exist"),
            ("--methods pc,crd", "--methods: got 'crd'; allowed: pc, fitnet, rkd"),
            ("--methods pc,pc", "--methods: got ('pc', 'pc'); allowed: one or more, each once"),
            ("--seeds 0,x", "--seeds: got '0,x'; allowed: integers"),
            ("--seeds ,", "--seeds: got (); allowed: one or more"),
            ("--batch-size 2", "--batch-size: got 2; allowed: 4 or more"),
            ("--batch-size 5000", "--batch-size: got 5000; allowed: at most the 1005 training"),
            ("--epochs 0", "--epochs: got 0; allowed: 1 or more"),
            ("--temperature 0", "--temperature: got 0.0; allowed: a finite number above 0"),
            ("--lr nan", "--lr: got nan; allowed: a finite number above 0"),
            ("--limit 7", "--limit: 7 leaves 7 images for the 10 classes of train"),
            ("--limit 12", "12 images of 10 classes are too few"),
            ("--device tpu9", "--device: got 'tpu9'"),
        ],
    )
    def test_arguments(
        self, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit_:
            main(arguments.split())
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err

    def test_empty_tree(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"ant/notes.txt": b""})
        with pytest.raises(ValueError, match="no images in"):
            data.load_imagefolder([tmp_path])

    def test_one_class(self, tmp_path: Path) -> None:
        write_tree(tmp_path, images({"": 10}, ("ant",)))
        with pytest.raises(ValueError, match="found one class, 'ant'; at least 2"):
            data.load_imagefolder([tmp_path])

    def test_unknown_class_in_test(self, tmp_path: Path) -> None:
        write_tree(tmp_path, images({"train/": 10}) | images({"test/": 2}, ("dog",)))
        with pytest.raises(ValueError, match="class 'dog' is held out but is not in train"):
            data.load_imagefolder([tmp_path])

    def test_only_a_test_split(self, tmp_path: Path) -> None:
        write_tree(tmp_path, images({"test/": 10}))
        with pytest.raises(ValueError, match="only the split test; train/ is needed"):
            data.load_imagefolder([tmp_path])

    def test_sizes_differ(self, tmp_path: Path) -> None:
        write_tree(tmp_path, images({"": 10}) | {"ant/big.png": png(7, 20)})
        with pytest.raises(ValueError, match=r"differ in size .*8x8.*20x20.*--image-size"):
            data.load_imagefolder([tmp_path])

    @pytest.mark.parametrize("content", [b"", b"not an image", png(9)[:60]])
    def test_corrupt_image_is_named(self, tmp_path: Path, content: bytes) -> None:
        files = images({"": 10}) | {"bee/bad.png": content}
        for path in (write_tree(tmp_path / "a", files), write_tar(tmp_path / "b.tar", files)):
            with pytest.raises(ValueError, match=r"cannot read the image .*bee/bad\.png"):
                data.load_imagefolder([path])

    @pytest.mark.parametrize("suffix", [".tar", ".tar.xz"])
    def test_broken_tar_is_named(self, tmp_path: Path, suffix: str) -> None:
        path = write_tar(tmp_path / f"x{suffix}", images({"": 30}))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 300])
        with pytest.raises(ValueError, match=r"x\.tar"):
            data.load_imagefolder([path])
        path.write_bytes(b"no tar")
        with pytest.raises(ValueError, match=r"cannot read .*x\.tar.* as a tar"):
            data.load_imagefolder([path])

    def test_missing_package_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name)
        )
        with pytest.raises(ImportError, match=r"scikit-learn: pip install pc_kernels\[distill\]"):
            importlib.reload(pc_kernels.distill)


class TestTraining:
    @pytest.mark.parametrize("name", METHODS)
    def test_objectives(self, name: str) -> None:
        torch.manual_seed(0)
        networks = Encoder(1, (3, 5), 4), Encoder(1, (6, 7), 6)
        objective = METHODS[name].make(*networks, 0.1)
        shapes = ((3, 8, 8), (5, 4, 4), (4,)), ((6, 8, 8), (7, 4, 4), (6,))
        student, teacher = (
            {layer: torch.randn(16, *s) for layer, s in zip(network.layers, of_side, strict=True)}
            for network, of_side in zip(networks, shapes, strict=True)
        )
        learning = student["features"].requires_grad_()
        loss = objective(student, teacher)
        loss.backward()
        assert loss.shape == ()
        assert loss.item() > 0
        assert learning.grad is not None
        assert learning.grad.isfinite().all()
        if name in ("pc", "rkd"):  # the others train projections
            for scaled, close in (
                ({"features": 3 * learning}, 1),
                ({"features": 5 * teacher["features"]}, 0),
            ):
                value = objective(scaled, teacher).item()
                assert (
                    value == pytest.approx(loss.item(), rel=1e-4)
                    if close
                    else value < loss.item() / 4
                )

    def test_floor_keeps_its_weights(self) -> None:
        loaded = data.load("digits", limit=200)
        student = make_student(loaded)
        before = [parameter.clone() for parameter in student.parameters()]
        calibrate(student, loaded, 32)
        assert all(map(torch.equal, before, student.parameters()))
        assert any(float(b.abs().max()) not in (0, 1) for b in student.buffers() if b.ndim)

    def test_same_seed_same_numbers(self) -> None:
        loaded = data.load("digits", limit=200)
        config = Config(epochs=1, teacher_epochs=1, batch_size=16, methods=tuple(METHODS))
        one, two, other = (run_seed(config, loaded, seed) for seed in (5, 5, 6))
        assert list(one.runs) == [TEACHER, FLOOR, *METHODS]
        for name, run in one.runs.items():
            assert run.curve == two.runs[name].curve
            assert (run.val, run.test) == (two.runs[name].val, two.runs[name].test)
            assert torch.equal(one.features[name], two.features[name])
            assert not torch.equal(one.features[name], other.features[name])

    def test_divergence_is_reported(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = "--limit 200 --teacher-epochs 1 --epochs 2 --methods fitnet --lr 1e30"
        with pytest.raises(SystemExit) as exit_:
            main([*arguments.split(), "--seeds", "0"])
        assert exit_.value.code == 1
        assert "FitNet: the loss is" in capsys.readouterr().err


class TestReport:
    @staticmethod
    def results(pc: list[float], rkd: list[float]) -> list[SeedResult]:
        def run(score: float) -> Run:
            metrics = Metrics(score, score, score, score)
            return Run(metrics, metrics, 8, 1000, 1.0, [])

        return [
            SeedResult(seed, {TEACHER: run(1.0), FLOOR: run(0.5), "pc": run(a), "rkd": run(b)})
            for seed, (a, b) in enumerate(zip(pc, rkd, strict=True))
        ]

    @pytest.mark.parametrize(
        ("rkd", "word"),
        [([0.7, 0.71, 0.72], "above"), ([0.81, 0.79, 0.8], "on par"), ([0.9, 0.92, 0.91], "below")],
    )
    def test_verdict_follows_the_numbers(self, rkd: list[float], word: str) -> None:
        text = report.verdict(self.results([0.8, 0.8, 0.8], rkd))
        assert "Untrained student (floor), above in linear probe (+30.0 ± 0.0 points)" in text
        assert f"against RKD distance, {word} in linear probe" in text

    def test_one_seed_has_no_spread(self) -> None:
        results = self.results([0.8], [0.7])
        assert "One seed has no spread" in report.verdict(results)
        assert "±" not in report.table(results)

    def test_table(self) -> None:
        lines = report.table(self.results([0.8, 0.9], [0.7, 0.7])).splitlines()
        assert len(lines) == 6
        assert len({len(line) for line in lines}) == 1
        assert "85.0 ± 7.1" in lines[4]
        assert "0.850 ± 0.071" in lines[4]


class TestCommandLine:
    def check(self, folder: Path, methods: tuple[str, ...], seeds: tuple[str, ...]) -> None:
        results = json.loads((folder / "results.json").read_text())
        assert tuple(results["test"]) == (TEACHER, FLOOR, *methods)
        assert tuple(results["seeds"]) == seeds
        for name in methods:
            assert 0 <= results["test"][name]["knn"]["mean"] <= 1
            curve = results["seeds"][seeds[0]][name]["curve"]
            assert {"epoch", "loss", "knn", "agreement"} <= set(curve[-1])
        assert results["versions"]["torch"] == torch.__version__
        assert (folder / "table.md").read_text().count("\n|") == 1 + 2 + len(methods)
        for name in ("curves.png", "ranks.png", "neighbours.png"):
            with Image.open(folder / name) as image:
                assert min(image.size) > 200

    def test_digits(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = "--limit 200 --seeds 3,4 --epochs 2 --teacher-epochs 1 --name tiny --out"
        assert main([*arguments.split(), str(tmp_path)]) == 0
        self.check(tmp_path / "tiny", Config.methods, ("3", "4"))
        assert (tmp_path / "tiny" / "table.md").read_text() in capsys.readouterr().out

    def test_images_from_a_tar_as_a_process(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar.xz", images({"train/": 16, "test/": 6}))
        arguments = (
            f"--data imagefolder:{path} --seeds 0 --epochs 1 --teacher-epochs 1 --threads 1 "
            f"--batch-size 8 --methods rkd,pc,pc+lfcc --image-size 16 --out {tmp_path}"
        )
        done = subprocess.run(
            [sys.executable, "-m", "pc_kernels.distill", *arguments.split()],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "seed 0, PC: 100%" in done.stderr
        self.check(tmp_path / "imagefolder", ("rkd", "pc", "pc+lfcc"), ("0",))

    def test_no_part_of_the_package(self) -> None:
        code = "import sys, pc_kernels; print('sklearn' in sys.modules, 'pc_kernels.distill' in"
        done = subprocess.run(
            [sys.executable, "-c", code + " sys.modules)"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split() == ["False", "False"]


@pytest.mark.skipif(
    "PC_KERNELS_CIFAR100" not in os.environ, reason="PC_KERNELS_CIFAR100 names no folder of tars"
)
def test_cifar100() -> None:
    folder = os.environ["PC_KERNELS_CIFAR100"]
    loaded = data.load(f"imagefolder:{folder}", limit=2000)
    assert len(loaded.classes) == 100
    assert sum(sizes(loaded)) == 2000
    assert loaded.train.images.shape[1:] == (3, 32, 32)
    for split in (loaded.train, loaded.val, loaded.test):
        assert len(torch.unique(split.labels)) == 100
