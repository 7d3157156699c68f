"""The trainer's engine: Accelerate and without it, two processes as one, curves on disk, a browser."""

from __future__ import annotations

import csv
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import test_distill
import torch
from browser import BROWSER, Browser
from conftest import ROOT, Run
from torch import Tensor, nn

from pc_kernels.distill import data, log, report
from pc_kernels.distill import engine as engines
from pc_kernels.distill.engine import Alone, make_engine
from pc_kernels.distill.methods import METHODS, Task
from pc_kernels.distill.networks import make_network
from pc_kernels.distill.train import Checkpoint, Examples, Schedule, Training

# Adam divides by the root of small squares: rounding of 1e-7 in the gradients becomes this, in 6 steps.
DRIFT = 1e-4


def trained(engine: Any, batch_size: int = 16) -> Training:
    """Three epochs of a tiny transformer, by two losses of the batch."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2, 50, (32, 6), generator=generator)
    targets = torch.randn(32, 5, generator=generator)
    torch.manual_seed(1)
    network = make_network("transformer_tiny", (6,), 4, 50)
    objective = METHODS["pc+lfcc"].build(Task(4, 5, 3, None, None), {"share": 0.1})  # type: ignore[arg-type]
    training = Training("x", network, objective, Schedule(3, batch_size, 0.01, 5), engine)
    training.fit(Examples(words, (targets,)), lambda _: {})
    return training


def weights(training: Training) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in training.modules.parameters()])


def test_accelerate_alone_is_the_plain_loop() -> None:
    pytest.importorskip("accelerate")
    one, two = trained(Alone("cpu")), trained(make_engine("cpu"))
    assert torch.equal(weights(one), weights(two))


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert isinstance(make_engine("cpu"), Alone)
    with pytest.raises(ValueError, match=r"mixed_precision: got 'bf16'.*pc_kernels\[train\]"):
        make_engine("cpu", "bf16")


BF16 = """
import sys; sys.path.insert(0, "tests")
from test_distill_engine import *
from pc_kernels.distill.evaluate import embed
from pc_kernels.distill.experiment import compare
engine, half, single, seen = make_engine("cpu", "bf16"), torch.bfloat16, torch.float32, set()

class Objective(nn.Module):
    def forward(self, student, teacher):
        seen.add(("objective", student.dtype, (student @ student.T).dtype))
        return (student - teacher).square().mean()

network, inputs, targets = make_network("mlp", (6,), 4), torch.randn(32, 6), torch.randn(32, 4)
network.register_forward_hook(lambda *said: seen.add(("network", network.training, said[2].dtype)))
training = Training("x", network, Objective(), Schedule(1, 16, 0.01, 5), engine)
training.fit(Examples(inputs, (targets,)), lambda network: {"knn": embed(network, inputs).sum()})
assert seen == {("network", True, half), ("network", False, single), ("objective", single, single)}

first, other = (trained(each).curve[0]["loss"] for each in (engine, Alone("cpu")))
assert 0 < abs(first / other - 1) < 2**-7, (first, other)  # features have 8 bits

values = {"teacher": "trained:resnet8_small", "student": "resnet8_small", "seeds": [0], "epochs": 1}
layers = {"x": ["body.3", "body.5"]}
values["methods"] = {"pc": {}, "rkd": {}, "lfcc": {"layers": layers, "width": 8}}
folder, loaded = Path(sys.argv[1]), data.load("digits", limit={"train": 60, "val": 40, "test": 60})
one, two = (
    compare(test_distill.tiny(folder / name, mixed_precision="bf16", **values), loaded, engine)
    for name in ("one", "two")
)
assert one.runs["lfcc"][0].test == two.runs["lfcc"][0].test
with pytest.raises(ValueError, match="of a run with mixed_precision 'bf16', now 'no'"):
    compare(test_distill.tiny(folder / "one", **values), loaded)
"""


def test_bf16_is_for_the_networks_alone(tmp_path: Path, python: Run) -> None:
    """The objective and what is measured are in float32, layers of a teacher in the step included."""
    pytest.importorskip("accelerate")
    done = python("-c", BF16, str(tmp_path))  # an Accelerator's precision is its process's
    assert done.returncode == 0, done.stderr


PROCESSES = """
import os, sys; sys.path.insert(0, "tests")
from test_distill_engine import *
from pc_kernels.distill import storage
from pc_kernels.distill.experiment import compare
folder = Path(sys.argv[1])
torch.save(weights(trained(Alone("cpu"))), folder / "alone")
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "1" if (child := os.fork()) else "0"
engine = make_engine("cpu")
torch.save(weights(trained(engine)), folder / f"together-{engine.process_index}")
options = {"layers": {"x": ["body", "body"]}, "width": 8}
config = test_distill.tiny(folder, seeds=[0], epochs=1, teacher_epochs=1, methods={"lfcc": options})
loaded = data.load("digits", limit=config.limit)
found = compare(config, loaded, engine).runs["lfcc"][0].test._asdict()
storage.write_json(folder / f"found-{engine.process_index}", found)
if child: sys.exit(os.waitpid(child, 0)[1])
"""


def test_two_processes_are_one(tmp_path: Path, python: Run) -> None:
    """Both hold the joint batch's loss, DDP makes its gradient of their shares, one writes for both."""
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    done = python("-c", PROCESSES, str(tmp_path), **world)
    assert done.returncode == 0, done.stderr
    alone, *together = (
        torch.load(tmp_path / name) for name in ("alone", "together-0", "together-1")
    )
    assert torch.equal(*together)
    assert float((together[0] - alone).norm() / alone.norm()) < DRIFT
    assert (tmp_path / "found-0").read_text() == (tmp_path / "found-1").read_text()


def test_batches_are_shared_out_evenly() -> None:
    three = Alone("cpu")
    three.num_processes = 3
    with pytest.raises(
        ValueError, match="batch_size: got 16; allowed: multiples of the 3 processes"
    ):
        trained(three)


class Diverges(nn.Module):
    """Looks at layers, and has no value."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = {"x": ("body", "body")}

    def forward(self, student: Tensor, teacher: Tensor, said: Any) -> Tensor:
        return student.sum() * float("nan")


def test_a_diverged_run_leaves_no_hooks() -> None:
    """The teacher is the next run's as well."""
    networks = [make_network("mlp", (6,), 4) for _ in range(2)]
    training = Training("x", networks[0], Diverges(), Schedule(1, 16, 0.01, 5), teacher=networks[1])
    with pytest.raises(FloatingPointError, match="x: the loss is nan in epoch 1"):
        training.fit(Examples(torch.randn(32, 6), (torch.randn(32, 5),)), lambda _: {})
    assert not any(module._forward_hooks for network in networks for module in network.modules())


def test_curves_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on from a checkpoint has its earlier epochs in the file as well."""
    monkeypatch.setattr(log, "find_spec", lambda name: None)  # TensorBoard
    checkpoint = Checkpoint(tmp_path / "x.checkpoint", {}, every=0)
    torch.manual_seed(0)
    words, targets = torch.randint(2, 50, (32, 6)), torch.randn(32, 5)
    for epochs in (2, 3):  # the second goes on where the first ended
        network = make_network("embedding_table", (6,), 4, 50)
        objective = METHODS["pc"].build(Task(4, 5, 3, None, None), {})  # type: ignore[arg-type]
        training = Training("x", network, objective, Schedule(epochs, 16, 0.01, 5))
        training.fit(Examples(words, (targets,)), lambda _: {"knn": 0.5}, checkpoint)
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [float(row["epoch"]) for row in rows] == [1, 2, 3]
    assert [float(row["loss"]) for row in rows] == [point["loss"] for point in training.curve]
    assert rows[2]["knn"] == "0.5" and rows[2]["agreement"] == ""


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    curve = log.Log(tmp_path / "x.csv", [])
    curve.add({"epoch": 1.0, "loss": 2.0, "seconds": 0.1})
    curve.close()
    assert list((tmp_path / "tensorboard" / "x").glob("events.*"))


LOOK = """({
  images: document.images.length,
  broken: [...document.images].filter(image => !image.naturalWidth).length,
  tables: document.querySelectorAll("table").length,
  fetched: performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here, and PC_KERNELS_BROWSER names none")
def test_report_in_a_browser(tmp_path: Path) -> None:
    """The page as it is laid out: every image is shown, nothing is fetched, nothing sticks out."""
    results, folder = test_distill.TestReport.results([0.8, 0.9], [0.7, 0.7]), tmp_path / "x"
    folder.mkdir()
    loaded = data.load("digits", limit={"train": 60, "val": 40, "test": 60})
    plots = report.plots_of(results, loaded)
    for name in plots:
        shutil.copy(ROOT / "docs/results/cifar100-small/scores.png", folder / name)
    page = folder / "report.html"
    page.write_text(report._page(results, loaded, folder), "utf-8")
    with Browser(tmp_path / "profile") as browser:
        seen = browser.look(page.as_uri(), LOOK)
    assert seen == {"images": len(plots), "broken": 0, "tables": 4, "fetched": 0, "overflow": 0}
