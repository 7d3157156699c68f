"""The reference trainer: metrics, training and resuming, configurations, comparison and report."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import resource
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pc_kernels.distill
from pc_kernels.distill import data, report, storage, train
from pc_kernels.distill.__main__ import main
from pc_kernels.distill.config import CONFIGS, Config, load_config, make_config
from pc_kernels.distill.engine import Alone
from pc_kernels.distill.evaluate import Metrics, evaluate, knn_accuracy, probe_layer, retrieval
from pc_kernels.distill.experiment import FLOOR, TEACHER, Results, Run, compare, prepare
from pc_kernels.distill.methods import OURS
from pc_kernels.distill.networks import Encoder, make_network
from pc_kernels.distill.plots import spread_out
from pc_kernels.distill.train import Checkpoint, Examples, Schedule, Training

METHODS = {"pc": {}, "fitnet": {}, "compress": {"queue": 32}, "kd": {}}


def tiny(tmp_path: Path, **changes: Any) -> Config:
    """A comparison of a second: a small multilayer perceptron on a few digits."""
    values: dict[str, Any] = {
        "name": "tiny", "out": str(tmp_path), "teacher": "trained:mlp", "teacher_epochs": 2,
        "student": "mlp", "student_width": 4, "epochs": 2, "batch_size": 16, "seeds": [3, 4],
        "learning_rates": [0.01], "limit": {"train": 60, "val": 40, "test": 60},
        "methods": METHODS,
    }  # fmt: skip
    return make_config(values | changes)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits", limit={"train": 60, "val": 40, "test": 60})


class TestMetrics:
    def test_retrieval_by_hand(self) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = nn.functional.normalize(torch.randn(12, 3, generator=generator))
        labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3])  # the last is alone
        averages, firsts = [], []
        for i in range(11):
            order = sorted(
                (j for j in range(12) if j != i), key=lambda j: -float(rows[i] @ rows[j])
            )
            right = [int(labels[j] == labels[i]) for j in order]
            r = sum(right)
            averages.append(sum(right[k] * sum(right[: k + 1]) / (k + 1) for k in range(r)) / r)
            firsts.append(right[0])
        map_r, recall_1 = retrieval(rows, labels)
        assert map_r == pytest.approx(np.mean(averages))
        assert recall_1 == pytest.approx(np.mean(firsts))

    def test_neighbours_vote_by_likeness(self) -> None:
        bank = nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.05, 1.0]]))
        queries = nn.functional.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0]]))
        labels = torch.tensor([0, 1, 1])
        assert knn_accuracy(bank, labels, queries, torch.tensor([0, 1])) == 1
        assert knn_accuracy(bank, labels, queries, torch.tensor([1, 1])) == 0.5

    @pytest.mark.parametrize("classes", [2, 3])
    def test_probe_as_a_layer(self, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(60) % classes
        rows = torch.randn(60, 4, generator=generator) + 2 * nn.functional.one_hot(labels, 4) + 5
        logits = probe_layer(rows, labels, classes)(rows)
        assert logits.shape == (60, classes)
        assert float((logits.argmax(1) == labels).float().mean()) > 0.8

    def test_features_of_the_teacher_agree_with_it(self, digits: data.Dataset) -> None:
        known = {name: split.inputs.flatten(1).float() for name, split in digits.splits.items()}
        metrics = evaluate(known, digits.with_teacher(known))
        for split in ("val", "test"):
            # pixels are integers: their distances tie, until the teacher's are centred and scaled
            assert metrics[split].agreement == pytest.approx(1, abs=1e-3)
            assert metrics[split].spearman == pytest.approx(1, abs=1e-3)
            assert 0.5 < metrics[split].map_r < metrics[split].recall_1 <= 1


class TestTraining:
    schedule = Schedule(4, 16, 0.01, 5, ("shift",))

    def training(self) -> Training:
        torch.manual_seed(0)
        network = make_network("mlp", (1, 8, 8), 4)
        return Training("test", network, train.LabelHead(4, 10), self.schedule)

    def examples(self, digits: data.Dataset) -> Examples:
        return Examples(digits.train.inputs, (digits.train.labels,))

    def test_resumed_equals_unbroken(self, digits: data.Dataset, tmp_path: Path) -> None:
        """A run is killed in its third epoch, after the checkpoint of its second."""
        checkpoint = Checkpoint(tmp_path / "x.checkpoint", {"seed": 5}, every=0)
        whole, broken, resumed = (self.training() for _ in range(3))
        whole.fit(self.examples(digits), lambda _: {})

        def killed(_: Encoder) -> dict[str, float]:
            if len(broken.curve) == 2:
                raise KeyboardInterrupt
            return {}

        with pytest.raises(KeyboardInterrupt):
            broken.fit(self.examples(digits), killed, checkpoint)
        resumed.fit(self.examples(digits), lambda _: {}, checkpoint)
        for one, two in zip(whole.modules.parameters(), resumed.modules.parameters(), strict=True):
            assert torch.equal(one, two)
        assert [p["loss"] for p in whole.curve] == [p["loss"] for p in resumed.curve]
        other = checkpoint._replace(identity={"seed": 6})
        with pytest.raises(ValueError, match="of a run with seed 5, now 6; remove it"):
            self.training().fit(self.examples(digits), lambda _: {}, other)

    def test_full_disk_keeps_the_last_checkpoint(self, tmp_path: Path) -> None:
        """A limit on the sizes of files stands for the disk: writing fails half-way there as well."""
        path = tmp_path / "x.checkpoint"
        storage.write_state(path, {"good": torch.ones(3)})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            with pytest.raises(OSError, match=r"cannot write .*x\.checkpoint: .*large.* is intact"):
                storage.write_state(path, {"good": torch.zeros(100_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == [path]
        assert storage.read_state(path)["good"].sum() == 3
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(ValueError, match=r"cannot read the checkpoint .*; remove it"):
            storage.read_state(path)

    def test_floor_keeps_its_weights(self, digits: data.Dataset) -> None:
        network = make_network("resnet8_small", (1, 8, 8))
        before = [parameter.clone() for parameter in network.parameters()]
        train.calibrate(network, digits.train.inputs, 32)
        assert all(map(torch.equal, before, network.parameters()))
        assert any(float(b.abs().max()) not in (0, 1) for b in network.buffers() if b.ndim)


class TestConfig:
    def test_those_of_the_package(self) -> None:
        for path in CONFIGS.glob("*.toml"):
            config = load_config(path.stem, ["device=cpu", "mixed_precision=no"])
            assert config.name == path.stem
            rivals = any(row.method.make not in OURS for row in config.methods)
            assert len(config.seeds) >= 3 or not rivals

    def test_cifar100_on_a_cpu(self, tmp_path: Path) -> None:
        """The GPU's configuration, whole, on a few small images and a network that is at hand."""
        changes = [
            "data=digits", "teacher=trained:resnet8_small", "teacher_epochs=1", "student=resnet8",
            "device=cpu", "mixed_precision=no", "epochs=1", "batch_size=32", "seeds=[0]",
            "learning_rates=[0.001]", "limit={train=64,val=40,test=60}", f"out={tmp_path}",
            "sweeps.temperature.values=[0.3, 1.0]", "sweeps.batch_size.values=[16, 32]",
            *(f"methods.lfcc.layers.{name}=['body.{n}', 'body.{n}']"
              for n, name in ((3, "early"), (4, "middle"), (5, "late"))),
        ]  # fmt: skip
        config = load_config("cifar100", changes)
        results = compare(config, prepare(config, Alone("cpu")))
        assert len(results.runs) == 2 + len(config.methods)

    def test_changes(self) -> None:
        changes = [
            "epochs=7",
            "limit.val=50",
            "data=imagefolder:/a b",
            "methods.pc.temperature=0.5",
        ]
        config = load_config("digits", [*changes, "seeds=[1, 2]"])
        assert (config.epochs, config.seeds) == (7, (1, 2))
        assert (config.limit["val"], config.data) == (50, "imagefolder:/a b")
        assert next(row for row in config.methods if row.name == "pc").options["temperature"] == 0.5

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("epoch=3", "unknown key 'epoch'; allowed: name, methods, sweeps, data"),
            ("epochs=0", "epochs: got 0; allowed: 1 or more"),
            ("epochs=many", "epochs: got 'many'; allowed: int"),
            ("classes=1", "classes: got 1; allowed: 2 or more"),
            ("batch_size=2", "batch_size: got 2; allowed: 4 or more"),
            ("batch_size=5000", "batch_size: got 5000; allowed: at most the"),
            ("seeds=[]", r"seeds: got \(\); allowed: one or more, each once"),
            ("seeds=[0, 0]", r"seeds: got \(0, 0\); allowed: one or more, each once"),
            ("seeds=0", r"seeds: got 0; allowed: tuple\[int, ...\]"),
            ("learning_rates=[nan]", "learning rate: got nan; allowed: a finite number above 0"),
            ("student=vgg", "student: got 'vgg'; allowed: resnet8_small"),
            ("teacher=trained:vgg", "teacher: trained: got 'vgg'; allowed: resnet8_small"),
            ("teacher=clip", "teacher: got 'clip'; allowed: , features, trained"),
            ("data=features:x.npz", "teacher: got 'trained:.*' with data 'features:x.npz'"),
            ("data=cifar", "data: got 'cifar'; allowed: digits, torchvision"),
            ("augment=[\"turn\"]", "augment: got 'turn'; allowed: shift, flip"),
            ("limit.all=3", "limit: got 'all'; allowed: train, val, test"),
            ("limit=3", "limit: got 3; allowed: a table"),
            ("methods={}", r"methods: got \(\); allowed: one or more"),
            ("methods.mine.a=1", "methods.mine: got 'mine'; allowed: pc, pc_shared"),
            ("methods.pc.tau=1", "PC with options .*'tau': 1}: .*tau"),
            ("device=tpu9", "device: got 'tpu9'"),
            ("sweeps.epochs.value=[1]", "sweeps.epochs: unknown key 'value'; allowed: name, option"),
            ("sweeps.epochs.methods=['pc']", r"sweeps.epochs.values: got \(\); allowed: one or more"),
            ("sweeps.x={values=[1], methods=['a']}", "sweeps: got the method 'a'; allowed: pc, pc_e"),
            ("sweeps.tau={values=[1], methods=['pc']}", "PC with options .*'tau': 1}: .*tau"),
            ("sweeps.epochs={values=[0], methods=['pc']}", "epochs: got 0; allowed: 1 or more"),
            ("sweeps.epochs={values=['a'], methods=['pc']}", "epochs: got 'a'; allowed: int"),
            ("sweeps.batch_size={values=[500], methods=['pc']}", "batch_size: got 500; allowed: at most"),
            ("epochs", "--set: got 'epochs'; allowed: KEY=VALUE"),
        ],
    )  # fmt: skip
    def test_errors(
        self, change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        few = ["limit.train=60", "teacher_epochs=1", f"out={tmp_path}", change]
        arguments = [part for each in few for part in ("--set", each)]
        with pytest.raises(SystemExit) as exit_:
            main(["compare", "--config", "digits", *arguments])
        assert exit_.value.code == 2
        assert re.search(message, capsys.readouterr().err)

    def test_files(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="imagenet does not exist; allowed: a file, or"):
            load_config("imagenet")
        (tmp_path / "x.toml").write_text("data = digits")
        with pytest.raises(ValueError, match=r"x\.toml is not TOML"):
            load_config(str(tmp_path / "x.toml"))

    def test_missing_package_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name)
        )
        with pytest.raises(ImportError, match=r"scikit-learn: pip install pc_kernels\[distill\]"):
            importlib.reload(pc_kernels.distill)


class TestComparison:
    def test_same_seed_same_numbers_and_finished_runs_are_kept(
        self, digits: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = tiny(tmp_path)
        one, two = compare(config, digits), compare(tiny(tmp_path / "again"), digits)
        assert list(one.runs) == [TEACHER, FLOOR, *METHODS]
        for name in METHODS:
            runs = zip(one.runs[name], two.runs[name], strict=True)
            assert all((a.val, a.test) == (b.val, b.test) for a, b in runs)
            assert torch.equal(one.features[name], two.features[name])
            assert one.runs[name][0].test != one.runs[name][1].test  # another seed
        monkeypatch.setattr(Training, "fit", None)  # nothing is left to train
        kept = compare(config, digits)
        assert kept.runs == one.runs
        changed = tiny(tmp_path, epochs=3)
        with pytest.raises(ValueError, match="of a run with epochs 2, now 3; remove it or choose"):
            compare(changed, digits)

    def test_what_is_missing_comes_out_the_same(self, digits: data.Dataset, tmp_path: Path) -> None:
        """A run draws its numbers from its own seed, whatever ran before it in the same process."""
        config = tiny(tmp_path, methods={"fitnet": {}, "lfcc": {}})
        one = compare(config, digits)
        for path in (tmp_path / "tiny" / "runs").glob("*-4.json"):
            path.unlink()
        two = compare(config, digits)
        for name in ("fitnet", "lfcc"):
            assert [run.test for run in one.runs[name]] == [run.test for run in two.runs[name]]

    def test_sweeps(self, digits: data.Dataset, tmp_path: Path) -> None:
        """Each value is trained and tuned as a row; the row's own value is the row."""
        methods = {"pc": {}, "compress": {"queue": 32}}
        sweeps = {
            "temperature": {"values": [0.1, 1.0], "methods": ["pc"]},
            "batch": {"option": "batch_size", "values": [8, 16], "methods": ["pc", "compress"],
                      "seeds": [3]},
        }  # fmt: skip
        config = tiny(tmp_path, methods=methods, sweeps=sweeps, learning_rates=[0.01, 0.001])
        results = compare(config, digits)
        pc, first = results.runs["pc"], results.runs["compress"][0]
        assert list(results.sweeps) == ["temperature", "batch"]
        assert results.sweeps["temperature"]["pc"][1] == pc
        assert results.sweeps["batch"]["pc"][1] == pc[:1]
        assert results.sweeps["batch"]["compress"][1] == [first]
        assert results.sweeps["batch"]["pc"][0][0].test != pc[0].test
        cold = tiny(
            tmp_path / "cold", methods={"pc": {"temperature": 0.1}}, learning_rates=[0.01, 0.001]
        )
        alone, swept = compare(cold, digits).runs["pc"], results.sweeps["temperature"]["pc"][0]
        assert [run.test for run in alone] == [run.test for run in swept]

    def test_layers_of_a_teacher_in_the_step(self, digits: data.Dataset, tmp_path: Path) -> None:
        layers = {"early": ["body.3", "body.4"], "late": ["body", "body.5"]}
        options = {"layers": layers, "width": 8}
        methods = {"lfcc": options, "pc+lfcc": {"lfcc": options}, "vectors": {"method": "lfcc"}}
        values = {"teacher": "trained:resnet8_small", "seeds": [0], "epochs": 1, "methods": methods}
        config = tiny(tmp_path, **values)
        assert [row.title for row in config.methods] == [
            "LFCC (layers early, late)", "PC + LFCC (layers early, late)", "LFCC (feature vectors)",
        ]  # fmt: skip
        results = compare(config, digits)
        teacher = storage.read_state(tmp_path / "tiny" / "teacher.pt")["network"]
        assert all(results.runs[name][0].curve[0]["loss"] > 0 for name in methods)
        again = compare(tiny(tmp_path / "again", **values), digits)
        assert again.runs["lfcc"][0].test == results.runs["lfcc"][0].test
        kept = storage.read_state(tmp_path / "again" / "tiny" / "teacher.pt")["network"]
        assert all(torch.equal(teacher[name], kept[name]) for name in kept)
        layers["late"] = ["body", "body.9"]
        with pytest.raises(ValueError, match=r"the model has no module 'body\.9'"):
            compare(tiny(tmp_path / "no", **values), digits)
        with pytest.raises(
            ValueError, match=r"methods\.lfcc: layers are of a teacher that runs in the"
        ):
            tiny(tmp_path, **values | {"teacher": "features:x.npz"})

    def test_divergence(self, digits: data.Dataset, tmp_path: Path) -> None:
        """A learning rate that diverges is not taken; where all do, it is an error."""
        wild = {"methods": {"fitnet": {}}, "seeds": [0]}
        results = compare(tiny(tmp_path / "a", learning_rates=[1e30, 1e-3], **wild), digits)
        assert results.tuning["fitnet"][1e30] is None
        assert results.runs["fitnet"][0].learning_rate == 1e-3
        with pytest.raises(FloatingPointError, match="FitNet: the loss is not finite at any"):
            compare(tiny(tmp_path / "b", learning_rates=[1e30], **wild), digits)

    def test_features_as_inputs(self, tmp_path: Path) -> None:
        random = np.random.default_rng(0)
        labels = np.arange(90) % 3
        inputs = random.normal(size=(90, 6)).astype(np.float32) + labels[:, None]
        storage.write_arrays(
            tmp_path / "x.npz", inputs=inputs, features=inputs[:, :4] ** 2, labels=labels
        )
        source = f"features:{tmp_path}/x.npz"
        config = tiny(tmp_path, data=source, teacher="", augment=[], methods={"pc": {}}, seeds=[0])
        assert compare(config, data.load(source)).runs["pc"][0].width == 4
        with pytest.raises(
            ValueError, match=r"augment: got \('shift',\) for inputs of shape \(6,\)"
        ):
            compare(tiny(tmp_path, data=source, teacher=""), data.load(source))


class Page(HTMLParser):
    """Checks that elements nest, and collects what they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.refers: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.refers += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


class TestReport:
    @staticmethod
    def results(pc: list[float], rkd: list[float]) -> Results:
        def run(score: float) -> Run:
            metrics = Metrics(*[score] * 7)
            return Run(metrics, metrics, 8, 1000, 0.01, 1.0, None, [{"epoch": 1.0}])

        config = make_config(
            {"name": "x", "teacher": "trained:mlp", "seeds": list(range(len(pc))),
             "methods": {"pc": {}, "rkd": {}},
             "sweeps": {"batch_size": {"values": [32, 64], "methods": ["pc"]}}}
        )  # fmt: skip
        runs = {TEACHER: [run(1.0)], FLOOR: [run(0.5) for _ in pc]}
        runs |= {"pc": list(map(run, pc)), "rkd": list(map(run, rkd))}
        return Results(config, runs, sweeps={"batch_size": {"pc": [[run(0.6)], runs["pc"]]}})

    @pytest.mark.parametrize(
        ("rkd", "word"),
        [([0.7, 0.71, 0.72], "above"), ([0.81, 0.79, 0.8], "on par"), ([0.9, 0.92, 0.91], "below")],
    )
    def test_words_follow_the_numbers(self, rkd: list[float], word: str) -> None:
        grid = report.against_rivals(self.results([0.8, 0.8, 0.8], rkd), "pc")
        assert [row[0] for row in grid.rows] == ["Untrained student", "RKD"]
        assert grid.rows[0][1] == "above (+30.0 ± 0.0)"
        assert grid.rows[1][1].startswith(f"{word} (")

    def test_table(self) -> None:
        lines = report.table(self.results([0.8, 0.9], [0.7, 0.7])).markdown().splitlines()
        assert len(lines) == 6
        assert len({len(line) for line in lines}) == 1
        assert f"85.0 ± {100 * stdev([0.8, 0.9]):.1f}" in lines[4]
        assert "±" not in report.table(self.results([0.8], [0.7])).markdown()

    def test_sweep(self) -> None:
        results = self.results([0.8, 0.9], [0.7, 0.7])
        grid = report.sweep_table(results, results.config.sweeps[0])
        assert grid.head[:2] == ["", "batch size"]
        assert [row[1] for row in grid.rows] == ["32", "64"]
        assert [row[-1] for row in grid.rows] == ["60.0", "85.0 ± 7.1"]

    def test_labels_are_spread_out(self) -> None:
        places = spread_out([1.0, 1.1, 1.2, 5.0, 5.05], 0.5)
        assert all(b - a >= 0.5 - 1e-9 for a, b in pairwise(places))
        assert np.allclose(places, [0.6, 1.1, 1.6, 4.775, 5.275])

    def test_command_line(self, tmp_path: Path) -> None:
        file = tmp_path / "two.toml"
        file.write_text(
            f'teacher = "trained:mlp"\nstudent = "mlp"\nseeds = [0]\nlearning_rates = [0.01]\n'
            f'limit = {{train = 70, val = 40, test = 60}}\nteacher_epochs = 1\nout = "{tmp_path}"\n'
            "[methods.pc]\n[methods.rkd]\n"
            '[sweeps.relaxation]\nmethods = ["pc"]\nvalues = ["logistic", "normal"]\n'
            '[sweeps.temperature]\nmethods = ["pc"]\nvalues = [0.1, 1.0]\n'
        )
        arguments = ("compare", "--config", str(file), "--set", "epochs=1")
        done = subprocess.run(
            [sys.executable, "-m", "pc_kernels.distill", *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "two"
        assert (folder / "report.md").read_text() in done.stdout
        results = json.loads((folder / "results.json").read_text())
        assert tuple(results["test"]) == (TEACHER, FLOOR, "pc", "rkd")
        assert results["sweeps"]["temperature"]["pc"][1] == results["runs"]["pc"]
        assert results["versions"]["torch"] == torch.__version__
        page = Page()
        page.feed((folder / "report.html").read_text())
        assert not page.open
        plots = report.PLOTS | report.SWEEPS | report.NEIGHBOURS
        assert len(page.refers) == len(plots)
        assert all(target.startswith("data:image/png;base64,") for target in page.refers)
        for name in plots:
            with Image.open(folder / name) as image:
                assert min(image.size) > 200

    def test_no_part_of_the_package(self) -> None:
        code = "import sys, pc_kernels; print('sklearn' in sys.modules, 'pc_kernels.distill' in"
        done = subprocess.run(
            [sys.executable, "-c", code + " sys.modules)"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split() == ["False", "False"]
