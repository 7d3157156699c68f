"""The training loop: one for a teacher with labels and for a student with a teacher's features.

Several processes train on one joint batch. Each runs the network on its part of it; features are then
gathered, and the objective sees all of them, on every process the same. What is computed is what one
process would, batch normalisation aside, which takes each part's own statistics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from pc_kernels import LayerOutputs

from .data import augment
from .engine import Alone, joined, share
from .log import Log
from .networks import Encoder
from .storage import read_state, write_state

Validate = Callable[[Encoder], dict[str, float]]
CURVE_POINTS = 6  # validations along a training run


class Schedule(NamedTuple):
    """How long and how fast: Adam, the learning rate annealed to 0 along a cosine."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    augment: tuple[str, ...] = ()


class Examples(NamedTuple):
    """Inputs [N, ...] and what the objective is told of each: tensors [N, ...]."""

    inputs: Tensor
    targets: tuple[Tensor, ...]


class Checkpoint(NamedTuple):
    """Where a run in progress is kept, what it is a run of, and how often, in seconds."""

    path: Path
    identity: dict[str, Any]
    every: float = 15.0


class LabelHead(nn.Module):
    """Cross-entropy of a linear classifier on features: what a teacher is trained for."""

    def __init__(self, width: int, classes: int) -> None:
        """Builds the classifier, which is dropped with the objective."""
        super().__init__()
        self.classifier = nn.Linear(width, classes)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """[B, D], [B] -> scalar."""
        return functional.cross_entropy(self.classifier(features), labels)


class Step(nn.Module):
    """What a batch costs: the network on this process's share of it, the objective on all of it.

    An objective that has `layers`, pairs of a student's and a teacher's by name, is also given what
    both networks' layers said of the same inputs.
    """

    def __init__(
        self, network: Encoder, objective: nn.Module, engine: Any, teacher: nn.Module | None
    ) -> None:
        """`teacher`: a network that runs in the step, where the objective asks for its layers."""
        super().__init__()
        self.objective, self.engine = objective, engine
        layers: Mapping[str, tuple[str, str]] = getattr(objective, "layers", {})
        mine, theirs = ({name: pair[side] for name, pair in layers.items()} for side in (0, 1))
        self.network = LayerOutputs(network, mine)
        self.teacher = None
        if theirs:
            assert teacher is not None
            self.teacher = LayerOutputs(teacher.requires_grad_(False), theirs)

    def forward(self, inputs: Tensor, *targets: Tensor) -> Tensor:
        """Inputs [B, ...] and targets [B, ...] of the joint batch -> its loss, a scalar."""
        inputs = share(inputs, self.engine)
        features, layers = self.network(inputs)
        said = [layers]
        if self.teacher is not None:
            with torch.no_grad():
                said.append(self.teacher(inputs).layers)
        with torch.autocast(features.device.type, enabled=False):
            features = self._whole(features)
            whole = tuple({name: self._whole(x) for name, x in side.items()} for side in said)
            if self.teacher is None:
                loss: Tensor = self.objective(features, *targets)
                return loss
            unreached = (
                0 * features.sum()
            )  # DDP wants a gradient of what lies behind all layers too
            return unreached + self.objective(features, *targets, whole)

    def train(self, mode: bool = True) -> Step:
        """As of any module, but the teacher stays as it is evaluated."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def remove_hooks(self) -> None:
        """Leaves both networks as they were."""
        self.network.remove()
        if self.teacher is not None:
            self.teacher.remove()

    def _whole(self, rows: Tensor) -> Tensor:
        """Of all processes, in float32."""
        return joined(rows.float(), self.engine)


class Training:
    """A network being trained for an objective; what it needs to go on is its `state`."""

    def __init__(
        self,
        title: str,
        network: Encoder,
        objective: nn.Module,
        schedule: Schedule,
        engine: Any = None,
        teacher: nn.Module | None = None,
    ) -> None:
        """Nothing has been trained yet: the curve is empty.

        Args:
            title: for progress bars and errors.
            network: to be trained, on the engine's device as all else.
            objective: maps features and targets to a loss; its parameters are trained as well.
            schedule: how long and how fast.
            engine: of `make_engine`; None: this process alone, on the CPU.
            teacher: see `Step`.

        Raises:
            ValueError: the batch cannot be shared out evenly.
        """
        self.title, self.network, self.schedule = title, network, schedule
        self.engine = engine = engine or Alone("cpu")
        if schedule.batch_size % engine.num_processes:
            raise ValueError(
                f"batch_size: got {schedule.batch_size}; allowed: multiples of the "
                f"{engine.num_processes} processes"
            )
        self.step = Step(network, objective, engine, teacher)
        self.modules = nn.ModuleList([network, objective])
        parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=schedule.learning_rate)
        self.curve: list[dict[str, float]] = []  # epoch, loss, seconds; at times, validation

    def fit(
        self, examples: Examples, validate: Validate, checkpoint: Checkpoint | None = None
    ) -> None:
        """Trains for the epochs that are left, over shuffled, augmented batches; drops a short last.

        An epoch draws its random numbers from the seed and its own number, so that a run that is
        taken up again from a checkpoint equals an unbroken one.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        plan, engine, data = self.schedule, self.engine, examples.inputs
        steps = len(data) // plan.batch_size
        with self._running(checkpoint) as (train_step, optimizer, record):
            for epoch in self._epochs():
                generator = torch.manual_seed(plan.seed * 1_000_003 + epoch)
                order = torch.randperm(len(data), generator=generator).to(data.device)
                total, start = torch.zeros((), device=data.device), time.perf_counter()
                self.step.train()
                for step, chosen in enumerate(order.split(plan.batch_size)[:steps]):
                    self._set_learning_rate((epoch * steps + step) / (plan.epochs * steps))
                    inputs = augment(data[chosen], plan.augment, generator)
                    loss = train_step(inputs, *(target[chosen] for target in examples.targets))
                    optimizer.zero_grad()
                    engine.backward(loss)
                    optimizer.step()
                    total += loss.detach()
                seconds = time.perf_counter() - start
                self._add_point(epoch + 1, total.item() / steps, seconds, validate)
                record.add()

    @property
    def state(self) -> dict[str, Any]:
        """All that training goes on from."""
        return {
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curve": self.curve,
        }

    @contextmanager
    def _running(self, checkpoint: Checkpoint | None) -> Iterator[tuple[Any, Any, _Record]]:
        """The step and the optimizer as the engine runs them, and what to tell of each epoch.

        Training goes on from a checkpoint, if there is one. Whatever ends it, the networks are left
        without hooks and the engine without references to them.
        """
        if checkpoint and checkpoint.path.exists():
            self._restore(checkpoint)
        self.engine.wait_for_everyone()  # all have read it before it may be replaced
        record = _Record(self, checkpoint if self.engine.is_main_process else None)
        try:
            yield *self.engine.prepare(self.step, self.optimizer), record
        finally:
            record.close()
            self.step.remove_hooks()
            self.engine.free_memory()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = read_state(checkpoint.path)
        try:
            check_identity(state["identity"], checkpoint.identity)
        except ValueError as error:
            raise ValueError(f"{checkpoint.path}: {error}; remove it") from error
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curve = state["curve"]

    def _epochs(self) -> Iterable[int]:
        """Those that are left, with a bar."""
        left = range(len(self.curve), self.schedule.epochs)
        quiet = not self.engine.is_main_process
        return tqdm(left, self.title, unit="epoch", mininterval=1, disable=quiet)

    def _set_learning_rate(self, progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate * (1 + math.cos(math.pi * progress)) / 2

    def _add_point(self, epoch: int, loss: float, seconds: float, validate: Validate) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{self.title}: the loss is {loss} in epoch {epoch} at the learning rate "
                f"{self.schedule.learning_rate}; a smaller one may help"
            )
        point = {"epoch": float(epoch), "loss": loss, "seconds": seconds}
        last = self.schedule.epochs
        if epoch == last or epoch % max(1, last // CURVE_POINTS) == 0:
            point |= validate(self.network)
        self.curve.append(point)


class _Record:
    """What a run leaves on disk as it goes: its curve and, now and then, a checkpoint."""

    def __init__(self, training: Training, checkpoint: Checkpoint | None) -> None:
        """Starts the log with the epochs that are done; without a checkpoint, nothing is kept."""
        self.training, self.checkpoint, self.saved = training, checkpoint, time.perf_counter()
        self.log = checkpoint and Log(checkpoint.path.with_suffix(".csv"), training.curve)

    def add(self) -> None:
        """An epoch is over."""
        if self.checkpoint is None or self.log is None:
            return
        self.log.add(self.training.curve[-1])
        if time.perf_counter() - self.saved > self.checkpoint.every:
            state = self.training.state | {"identity": self.checkpoint.identity}
            write_state(self.checkpoint.path, state)
            self.saved = time.perf_counter()

    def close(self) -> None:
        """Nothing more comes."""
        if self.log is not None:
            self.log.close()


def check_identity(kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a ValueError that says in what a kept run differs from the one that is wanted."""
    for key in now:
        if kept.get(key) != now[key]:
            raise ValueError(f"of a run with {key} {kept.get(key)!r}, now {now[key]!r}")


def calibrate(network: Encoder, inputs: Tensor, batch_size: int) -> None:
    """Gives an untrained network the batch statistics of the training inputs, nothing else."""
    update_bn(inputs.split(batch_size), network)
