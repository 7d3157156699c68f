"""The comparison: for each seed a teacher, an untrained floor and one student per method."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .data import Dataset
from .evaluate import Metrics, embed, evaluate, validate
from .models import Encoder, make_student, make_teacher
from .objectives import METHODS
from .train import Schedule, calibrate, distil, train_teacher

TEACHER, FLOOR = "teacher", "floor"
TEACHER_LEARNING_RATE = 3e-3
CURVE_POINTS = 12  # validations along a training run


@dataclass(frozen=True)
class Config:
    """What to run; `python -m pc_kernels.distill --help` describes each, with the same defaults.

    The default learning rate is, for every method on its own, the best of 0.003, 0.01, 0.03 and 0.1
    on the digits' validation images (mean of linear probe and kNN over five seeds not used here).
    """

    data: str = "digits"
    name: str = "digits"
    out: str = "runs"
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = ("pc", "fitnet", "rkd")
    epochs: int = 48
    teacher_epochs: int = 24
    batch_size: int = 32
    temperature: float = 0.1
    lr: float = 0.01
    limit: int | None = None
    image_size: int | None = None
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        """Checks what the types do not say.

        Raises:
            ValueError: an argument is out of range; the message names it and what is allowed.
        """
        for option, number, least in (
            ("--epochs", self.epochs, 1),
            ("--teacher-epochs", self.teacher_epochs, 1),
            ("--batch-size", self.batch_size, 4),
            ("--limit", self.limit, 1),
            ("--image-size", self.image_size, 4),
            ("--threads", self.threads, 1),
        ):
            if number is not None and number < least:
                raise ValueError(f"{option}: got {number}; allowed: {least} or more")
        for option, rate in (("--temperature", self.temperature), ("--lr", self.lr)):
            if not 0 < rate < float("inf"):
                raise ValueError(f"{option}: got {rate}; allowed: a finite number above 0")
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"--methods: got {method!r}; allowed: {', '.join(METHODS)}")
        for option, values in (("--methods", self.methods), ("--seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{option}: got {values}; allowed: one or more, each once")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"--device: got {self.device!r}: {reason}") from error


@dataclass
class Run:
    """One network of one seed: what it scored and, where it was trained, how that went.

    Each point of the curve holds `epoch`, `loss` and, every few epochs, `knn` and `agreement` on
    the validation split. `seconds` is the training time, those validations included.
    """

    val: Metrics
    test: Metrics
    width: int
    parameters: int
    seconds: float
    curve: list[dict[str, float]]


@dataclass
class SeedResult:
    """The runs of one seed by name, and each network's features [N, width] of the test images."""

    seed: int
    runs: dict[str, Run] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


def run_seed(config: Config, data: Dataset, seed: int) -> SeedResult:
    """Trains and measures one seed's networks.

    Its students all start from the same weights and see the same augmented batches; the floor is
    that start, its batch statistics taken from the training images.
    """
    result = SeedResult(seed)
    teacher = _fresh(make_teacher, data, config, seed)
    log = _Log(teacher, teacher, data, config.teacher_epochs)
    schedule = Schedule(config.teacher_epochs, config.batch_size, TEACHER_LEARNING_RATE, seed)
    train_teacher(teacher, data, schedule, f"seed {seed}, teacher", log)
    _measure(result, TEACHER, log)

    floor = _fresh(make_student, data, config, seed)
    log = _Log(floor, teacher, data, 0)
    calibrate(floor, data, config.batch_size)
    _measure(result, FLOOR, log)

    for name in config.methods:
        method = METHODS[name]
        student = _fresh(make_student, data, config, seed)
        objective = method.make(student, teacher, config.temperature).to(config.device)
        schedule = Schedule(config.epochs, config.batch_size, config.lr, seed)
        log = _Log(student, teacher, data, config.epochs)
        title = f"seed {seed}, {method.title}"
        distil(student, teacher, objective, data, schedule, title, log)
        _measure(result, name, log)
    return result


@dataclass
class _Log:
    """Called after each epoch: keeps the loss and, every few epochs, the validation."""

    encoder: Encoder
    teacher: Encoder
    data: Dataset
    epochs: int
    curve: list[dict[str, float]] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    def __call__(self, epoch: int, loss: float) -> None:
        point = {"epoch": float(epoch), "loss": loss}
        if epoch == self.epochs or epoch % max(1, self.epochs // CURVE_POINTS) == 0:
            point |= validate(self.encoder, self.teacher, self.data)
        self.curve.append(point)


def _fresh(make: Callable[[Dataset], Encoder], data: Dataset, config: Config, seed: int) -> Encoder:
    torch.manual_seed(seed)
    return make(data).to(config.device)


def _measure(result: SeedResult, name: str, log: _Log) -> None:
    """Adds a trained network to the result."""
    seconds = time.perf_counter() - log.start
    encoder, data = log.encoder, log.data
    val, test = (evaluate(encoder, log.teacher, data.train, part) for part in (data.val, data.test))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    result.runs[name] = Run(val, test, encoder.width, parameters, seconds, log.curve)
    result.features[name] = embed(encoder, data.test.images)
