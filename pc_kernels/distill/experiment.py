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
from dataclasses import dataclass, field, replace
from itertools import chain
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pc_kernels import LayerOutputs

from .config import Config, Row, Sweep, varied
from .data import Dataset, read, to_dataset
from .engine import Alone
from .evaluate import Metrics, embed, evaluate, probe_layer, validate
from .features import features_of
from .meter import PeakMemory
from .methods import Layers, Task
from .networks import Encoder, make_network
from .storage import read_arrays, read_state, write_arrays, write_json, write_state
from .table import Table
from .teachers import make_teacher
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
    """What came of a comparison.

    Attributes:
        config: what was run.
        runs: of each row, by seed.
        tuning: the validation score of each row at each learning rate.
        features: of each row, of the first test inputs, by the first seed.
        sweeps: of each sweep and row, a list for each value, of runs by seed.
    """

    config: Config
    runs: dict[str, list[Run]] = field(default_factory=dict)
    tuning: dict[str, dict[float, float | None]] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    sweeps: dict[str, dict[str, list[list[Run]]]] = field(default_factory=dict)


def prepare(config: Config, engine: Any) -> Dataset:
    """The data of a comparison, with the features of a teacher that is not trained here."""
    with engine.main_process_first():  # the others then find what it has kept
        table = table_of(config, engine.device)
    data = to_dataset(
        table, config.tokenizer, vocabulary=config.vocabulary, text_length=config.text_length
    )
    return data.to(engine.device)


def table_of(config: Config, device: torch.device) -> Table:
    """The same as a table."""
    table = read(
        config.data, config.teacher, limit=config.limit, classes=config.classes,
        image_size=config.image_size, cache=config.cache,
    )  # fmt: skip
    if not config.pretrained:
        return table
    cache, size = Path(config.cache).expanduser(), config.teacher_size
    features = features_of(table, config.teacher, size=size, cache=cache, device=device)
    return replace(table, features=features)


def compare(config: Config, data: Dataset, engine: Any = None) -> Results:
    """Runs what is missing of a comparison and returns all of it.

    Args:
        config: what to run.
        data: of `prepare`, on the engine's device.
        engine: of `make_engine`; None: this process alone, on the CPU.
    """
    engine = engine or Alone("cpu")
    _check_sizes(config, data)
    folder = Path(config.out) / config.name
    data, teacher = _with_teacher(config, data, folder, engine)
    results = Results(config)
    known = {name: split.teacher.cpu() for name, split in data.splits.items()}
    study = _Study(config, data, folder, engine, teacher)
    results.runs[TEACHER] = [study.measured(known)]
    results.features[TEACHER] = known["test"][:RANK_ROWS]
    results.runs[FLOOR] = [study.floor(seed) for seed in config.seeds]
    for row in config.methods:
        results.tuning[row.name], runs = study.tuned(row, config.seeds)
        results.runs[row.name] = runs
        results.features[row.name] = study.features(row, runs[0].learning_rate, config.seeds[0])
    for sweep in config.sweeps:
        results.sweeps[sweep.name] = {name: study.swept(sweep, name) for name in sweep.methods}
    return results


def _check_sizes(config: Config, data: Dataset) -> None:
    swept = [sweep.values for sweep in config.sweeps if sweep.option == "batch_size"]
    largest = max([config.batch_size, *chain(*swept)])
    if len(data.train.inputs) < largest:
        raise ValueError(
            f"batch_size: got {largest}; allowed: at most the {len(data.train.inputs)} "
            "training rows"
        )
    if config.augment and data.train.inputs.dim() != 4:
        raise ValueError(
            f"augment: got {config.augment} for inputs of shape "
            f"{tuple(data.train.inputs.shape[1:])}; allowed: [] for what is no image"
        )


def _with_teacher(
    config: Config, data: Dataset, folder: Path, engine: Any
) -> tuple[Dataset, nn.Module | None]:
    """The data with the teacher's features, and the teacher itself where a method needs its layers."""
    layered = any(row.layered for row in config.methods)
    if data.train.teacher.shape[1]:
        if not layered:
            return data, None
        if data.vocabulary:
            raise ValueError("methods: layers of a pretrained teacher are for images; got texts")
        return data, make_teacher(config.teacher, config.teacher_size).to(engine.device)
    network = _trained_teacher(config, data, folder, engine)
    features = {name: embed(network, split.inputs) for name, split in data.splits.items()}
    features = {name: rows.to(engine.device) for name, rows in features.items()}
    return data.with_teacher(features), network if layered else None


def _trained_teacher(config: Config, data: Dataset, folder: Path, engine: Any) -> Encoder:
    """A teacher that is trained with labels, now or before."""
    path, name = folder / "teacher.pt", config.teacher.partition(":")[2]
    schedule = Schedule(
        config.teacher_epochs, config.batch_size, config.teacher_learning_rate, 0, config.augment
    )
    identity = _digest([name, schedule, data.train.inputs, data.train.labels])
    torch.manual_seed(schedule.seed)
    network = make_network(name, data.train.inputs.shape[1:], None, data.vocabulary)
    network = network.to(engine.device)
    if not path.exists() or read_state(path)["identity"] != identity:
        objective = LabelHead(network.width, len(data.classes)).to(engine.device)
        training = Training("teacher", network, objective, schedule, engine)
        checkpoint = Checkpoint(folder / "teacher.checkpoint", {"teacher": identity})
        training.fit(Examples(data.train.inputs, (data.train.labels,)), lambda _: {}, checkpoint)
        if engine.is_main_process:
            write_state(path, {"identity": identity, "network": network.state_dict()})
            checkpoint.path.unlink(missing_ok=True)
        engine.wait_for_everyone()
    network.load_state_dict(read_state(path)["network"])
    return network


class _Study:
    """Trains, measures and keeps single runs of one comparison.

    Of several processes all train, the first measures and writes, and all read what it wrote.
    """

    def __init__(
        self, config: Config, data: Dataset, folder: Path, engine: Any, teacher: nn.Module | None
    ) -> None:
        self.config, self.data, self.folder = config, data, folder
        self.engine, self.teacher = engine, teacher

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
        width = self._student(0).width
        return Task(width, train.teacher.shape[1], classes, head, self._channels_of)

    def tuned(self, row: Row, seeds: Sequence[int]) -> tuple[dict[float, float | None], list[Run]]:
        """Validation scores of the learning rates with the first seed, and all seeds' runs at the best.

        A score is None where the loss is not finite.

        Raises:
            FloatingPointError: that is so at every learning rate.
        """
        scores = {rate: self._score(row, rate, seeds[0]) for rate in self.config.learning_rates}
        usable = {rate: score for rate, score in scores.items() if score is not None}
        if not usable:
            raise FloatingPointError(f"{row.title}: the loss is not finite at any learning rate")
        best = max(usable, key=lambda rate: usable[rate])
        return scores, [self.run(row, best, seed) for seed in seeds]

    def swept(self, sweep: Sweep, name: str) -> list[list[Run]]:
        """A row's runs at each value of a sweep, each value tuned by itself."""
        found = []
        for value in sweep.values:
            config, row = varied(self.config, name, sweep.option, value)
            study = _Study(config, self.data, self.folder, self.engine, self.teacher)
            found.append(study.tuned(row, sweep.seeds or config.seeds)[1])
        return found

    def _score(self, row: Row, rate: float, seed: int) -> float | None:
        try:
            return self.run(row, rate, seed).tuning_score
        except FloatingPointError:
            return None

    def run(self, row: Row, rate: float, seed: int) -> Run:
        """One student, trained and measured now or before."""
        path, identity = self._path(row, rate, seed), self._identity(row, rate, seed)
        self.engine.wait_for_everyone()
        if not path.exists():
            self._train(row, rate, seed)
            self.engine.wait_for_everyone()
        return _read_run(path, identity)

    def _train(self, row: Row, rate: float, seed: int) -> None:
        path, config, task = self._path(row, rate, seed), self.config, self.task
        schedule = Schedule(config.epochs, config.batch_size, rate, seed, config.augment)
        student = self._student(seed)
        objective = row.method.build(task, row.options).to(self.engine.device)
        training = Training(
            f"{row.title}, {rate:g}, seed {seed}", student, objective, schedule, self.engine,
            self.teacher if row.layered else None,
        )  # fmt: skip
        train = self.data.train
        targets = (train.teacher, train.labels) if row.method.uses_labels else (train.teacher,)
        identity = self._identity(row, rate, seed)
        checkpoint = Checkpoint(path.with_suffix(".checkpoint"), identity)
        with PeakMemory(str(self.engine.device)) as memory:
            training.fit(
                Examples(train.inputs, targets), lambda net: validate(net, self.data), checkpoint
            )
        if not self.engine.is_main_process:
            return
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
        shape, width = self.data.train.inputs.shape[1:], self.config.student_width
        network = make_network(self.config.student, shape, width, self.data.vocabulary)
        return network.to(self.engine.device)

    @torch.no_grad()
    def _channels_of(self, layers: Layers) -> dict[str, tuple[int, int]]:
        """What the layers of both networks make of two inputs."""
        assert self.teacher is not None
        found = []
        with torch.random.fork_rng():
            for side, network in enumerate((self._student(0).eval(), self.teacher.eval())):
                names = {name: pair[side] for name, pair in layers.items()}
                with LayerOutputs(network, names) as outputs:
                    said = outputs(self.data.train.inputs[:2]).layers
                found.append({name: x.shape[1 if x.dim() == 4 else -1] for name, x in said.items()})
        return {name: (found[0][name], found[1][name]) for name in layers}

    def _embedded(self, network: Encoder) -> dict[str, Tensor]:
        return {name: embed(network, split.inputs) for name, split in self.data.splits.items()}

    def _path(self, row: Row, rate: float, seed: int) -> Path:
        folder = self.folder / "runs"
        return folder / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', row.name)}-{rate:g}-{seed}.json"

    def _identity(self, row: Row, rate: float, seed: int) -> dict[str, Any]:
        """What makes a run this run, as JSON gives it back."""
        kept = ("student", "student_width", "epochs", "batch_size", "augment", "mixed_precision")
        identity = {key: getattr(self.config, key) for key in kept}
        identity |= {"data and teacher": self.digest, "learning_rate": rate, "seed": seed}
        identity |= {"method": row.method.title, "options": dict(row.options)}
        return dict(json.loads(json.dumps(identity)))


def _read_run(path: Path, identity: Mapping[str, Any]) -> Run:
    try:
        kept = json.loads(path.read_text())
        check_identity(kept.pop("identity"), identity)
        for split in ("val", "test"):  # JSON has no NaN
            known = {key: nan if value is None else value for key, value in kept[split].items()}
            kept[split] = Metrics(**known)
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
