"""The comparison: a teacher's features once, then every method, tuned alike, over several seeds.

Each finished run is a JSON file under `OUT/NAME/runs`, so a comparison that is started again does what
is missing; a run that was cut short goes on from its checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import Config, Row
from .data import Dataset
from .evaluate import Metrics, embed, evaluate, probe_layer, validate
from .meter import PeakMemory
from .methods import Task
from .networks import Encoder, make_network
from .storage import read_arrays, write_arrays, write_json
from .train import (
    Checkpoint,
    Examples,
    LabelHead,
    Schedule,
    Training,
    calibrate,
    check_identity,
)

TEACHER, FLOOR = "teacher", "floor"
RANK_ROWS = 500  # test rows whose features are kept for the plot of ranks


@dataclass(frozen=True)
class Run:
    """One network: what it scored and, where it was trained, how that went.

    Each point of the curve holds `epoch`, `loss`, `seconds` and, at times, `knn` and `agreement` on the
    validation split. `step_seconds` is the median over epochs; `peak_mib` is what training added.
    """

    val: Metrics
    test: Metrics
    width: int
    parameters: int
    learning_rate: float = 0.0
    step_seconds: float = 0.0
    peak_mib: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def tuning_score(self) -> float:
        """What learning rates are chosen by."""
        return (self.val.probe + self.val.knn) / 2


@dataclass
class Results:
    """Runs by row and seed; those that learning rates were chosen by; test features of one seed."""

    config: Config
    runs: dict[str, list[Run]] = field(default_factory=dict)
    tuning: dict[str, dict[float, float | None]] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


def compare(config: Config, data: Dataset) -> Results:
    """Runs what is missing of a comparison and returns all of it."""
    _check_sizes(config, data)
    folder = Path(config.out) / config.name
    data = _with_teacher(config, data, folder)
    results = Results(config)
    known = {name: split.teacher.cpu() for name, split in data.splits.items()}
    study = _Study(config, data, folder)
    results.runs[TEACHER] = [study.measured(known)]
    results.features[TEACHER] = known["test"][:RANK_ROWS]
    results.runs[FLOOR] = [study.floor(seed) for seed in config.seeds]
    for row in config.methods:
        scores = {rate: study.tuning_score(row, rate) for rate in config.learning_rates}
        usable = {rate: score for rate, score in scores.items() if score is not None}
        if not usable:
            raise FloatingPointError(f"{row.title}: the loss is not finite at any learning rate")
        best = max(usable, key=lambda rate: usable[rate])
        results.tuning[row.name] = scores
        results.runs[row.name] = [study.run(row, best, seed) for seed in config.seeds]
        results.features[row.name] = study.features(row, best, config.seeds[0])
    return results


def _check_sizes(config: Config, data: Dataset) -> None:
    if len(data.train.inputs) < config.batch_size:
        raise ValueError(
            f"batch_size: got {config.batch_size}; allowed: at most the {len(data.train.inputs)} "
            "training rows"
        )
    if config.augment and data.train.inputs.dim() != 4:
        raise ValueError(
            f"augment: got {config.augment} for inputs of shape "
            f"{tuple(data.train.inputs.shape[1:])}; allowed: [] for what is no image"
        )


def _with_teacher(config: Config, data: Dataset, folder: Path) -> Dataset:
    """The data with the features of a teacher that is trained here, unless it has some already."""
    if data.train.teacher.shape[1]:
        return data
    path = folder / "teacher.npz"
    name = config.teacher.partition(":")[2]
    schedule = Schedule(
        config.teacher_epochs, config.batch_size, config.teacher_learning_rate, 0, config.augment
    )
    identity = _digest([name, schedule, data.train.inputs, data.train.labels])
    if path.exists():
        arrays = read_arrays(path)
        if str(arrays.pop("identity")) == identity:
            return data.with_teacher(_tensors(arrays, config.device))
    torch.manual_seed(schedule.seed)
    network = make_network(name, data.train.inputs.shape[1:]).to(config.device)
    objective = LabelHead(network.width, len(data.classes)).to(config.device)
    training = Training("teacher", network, objective, schedule)
    checkpoint = Checkpoint(folder / "teacher.checkpoint", {"teacher": identity})
    training.fit(Examples(data.train.inputs, (data.train.labels,)), lambda _: {}, checkpoint)
    arrays = {key: embed(network, split.inputs).numpy() for key, split in data.splits.items()}
    write_arrays(path, identity=np.array(identity), **arrays)
    checkpoint.path.unlink(missing_ok=True)
    return data.with_teacher(_tensors(arrays, config.device))


class _Study:
    """Trains, measures and keeps single runs of one comparison."""

    def __init__(self, config: Config, data: Dataset, folder: Path) -> None:
        self.config, self.data, self.folder = config, data, folder / "runs"

    @functools.cached_property
    def digest(self) -> str:
        """A name for the data and the teacher's features."""
        return _digest([tensor for split in self.data.splits.values() for tensor in split])

    @functools.cached_property
    def task(self) -> Task:
        """What methods may know."""
        train, classes = self.data.train, len(self.data.classes)
        head = functools.cache(
            lambda: probe_layer(train.teacher.cpu(), train.labels.cpu(), classes)
        )
        return Task(self._student(0).width, train.teacher.shape[1], classes, head)

    def tuning_score(self, row: Row, rate: float) -> float | None:
        """The validation score at a learning rate; None where the loss is not finite."""
        try:
            return self.run(row, rate, self.config.seeds[0]).tuning_score
        except FloatingPointError:
            return None

    def run(self, row: Row, rate: float, seed: int) -> Run:
        """One student, trained and measured now or before."""
        path, config = self._path(row, rate, seed), self.config
        identity = self._identity(row, rate, seed)
        if path.exists():
            return _read_run(path, identity)
        student, schedule = self._student(seed), Schedule(
            config.epochs, config.batch_size, rate, seed, config.augment
        )  # fmt: skip
        objective = row.method.build(self.task, row.options).to(config.device)
        training = Training(f"{row.title}, {rate:g}, seed {seed}", student, objective, schedule)
        train = self.data.train
        targets = (train.teacher, train.labels) if row.method.uses_labels else (train.teacher,)
        checkpoint = Checkpoint(path.with_suffix(".checkpoint"), identity)
        with PeakMemory(config.device) as memory:
            training.fit(
                Examples(train.inputs, targets), lambda net: validate(net, self.data), checkpoint
            )
        steps = len(train.inputs) // config.batch_size
        features = self._embedded(student)
        run = self.measured(
            features,
            parameters=_count(student), learning_rate=rate, peak_mib=memory.mib,
            step_seconds=median(point["seconds"] for point in training.curve) / steps,
            curve=training.curve,
        )  # fmt: skip
        write_arrays(path.with_suffix(".npz"), test=features["test"][:RANK_ROWS].numpy())
        write_json(path, {"identity": identity} | _as_dict(run))
        checkpoint.path.unlink(missing_ok=True)
        return run

    def floor(self, seed: int) -> Run:
        """The student before training, its batch statistics taken from the training inputs."""
        student = self._student(seed)
        calibrate(student, self.data.train.inputs, self.config.batch_size)
        return self.measured(self._embedded(student), parameters=_count(student))

    def features(self, row: Row, rate: float, seed: int) -> Tensor:
        """Of the first test rows, kept by `run`."""
        return torch.from_numpy(
            read_arrays(self._path(row, rate, seed).with_suffix(".npz"))["test"]
        )

    def measured(self, features: dict[str, Tensor], **known: Any) -> Run:
        """A run of what is known of it and the metrics of its features."""
        metrics, width = evaluate(features, self.data), features["test"].shape[1]
        return Run(metrics["val"], metrics["test"], width, **{"parameters": 0} | known)

    def _student(self, seed: int) -> Encoder:
        torch.manual_seed(seed)
        config = self.config
        shape = self.data.train.inputs.shape[1:]
        return make_network(config.student, shape, config.student_width).to(config.device)

    def _embedded(self, network: Encoder) -> dict[str, Tensor]:
        return {name: embed(network, split.inputs) for name, split in self.data.splits.items()}

    def _path(self, row: Row, rate: float, seed: int) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', row.name)}-{rate:g}-{seed}.json"

    def _identity(self, row: Row, rate: float, seed: int) -> dict[str, Any]:
        """What makes a run this run, as JSON gives it back."""
        kept = ("student", "student_width", "epochs", "batch_size", "augment")
        identity = {key: getattr(self.config, key) for key in kept}
        identity |= {"data and teacher": self.digest, "learning_rate": rate, "seed": seed}
        identity |= {"method": row.method.title, "options": dict(row.options)}
        return dict(json.loads(json.dumps(identity)))


def _read_run(path: Path, identity: Mapping[str, Any]) -> Run:
    try:
        kept = json.loads(path.read_text())
        check_identity(kept.pop("identity"), identity)
        kept |= {split: Metrics(**kept[split]) for split in ("val", "test")}
        return Run(**kept)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}; remove it or choose another output folder") from error


def _as_dict(run: Run) -> dict[str, Any]:
    return run.__dict__ | {"val": run.val._asdict(), "test": run.test._asdict()}


def _count(network: Encoder) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _digest(values: Sequence[Any]) -> str:
    """A name for what the values hold; tensors count whole."""
    digest = hashlib.sha256()
    for value in values:
        tensor = isinstance(value, Tensor)
        digest.update(value.cpu().numpy().tobytes() if tensor else repr(value).encode())
    return digest.hexdigest()[:16]


def _tensors(arrays: Mapping[str, Any], device: str) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
