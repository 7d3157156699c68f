"""The training loop: one for a teacher with labels and for a student with a teacher's features."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from .data import augment
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


class Training:
    """A network being trained for an objective; what it needs to go on is its `state`."""

    def __init__(
        self, title: str, network: Encoder, objective: nn.Module, schedule: Schedule
    ) -> None:
        """Nothing has been trained yet: the curve is empty."""
        self.title, self.network, self.objective = title, network, objective
        self.schedule = schedule
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
        self._take_up(checkpoint)
        plan, saved = self.schedule, time.perf_counter()
        steps = len(examples.inputs) // plan.batch_size
        epochs = tqdm(range(len(self.curve), plan.epochs), self.title, unit="epoch", mininterval=1)
        for epoch in epochs:
            generator = torch.manual_seed(plan.seed * 1_000_003 + epoch)
            order = torch.randperm(len(examples.inputs), generator=generator)
            order = order.to(examples.inputs.device)
            total, start = torch.zeros((), device=order.device), time.perf_counter()
            self.modules.train()
            for step, chosen in enumerate(order.split(plan.batch_size)[:steps]):
                self._set_learning_rate((epoch * steps + step) / (plan.epochs * steps))
                features = self.network(augment(examples.inputs[chosen], plan.augment, generator))
                loss = self.objective(features, *(target[chosen] for target in examples.targets))
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                total += loss.detach()
            self._log(epoch + 1, total.item() / steps, time.perf_counter() - start, validate)
            if checkpoint and time.perf_counter() - saved > checkpoint.every:
                write_state(checkpoint.path, self.state | {"identity": checkpoint.identity})
                saved = time.perf_counter()

    @property
    def state(self) -> dict[str, Any]:
        """All that training goes on from."""
        return {
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curve": self.curve,
        }

    def _take_up(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None or not checkpoint.path.exists():
            return
        device = str(next(self.network.parameters()).device)
        state = read_state(checkpoint.path, device)
        try:
            check_identity(state["identity"], checkpoint.identity)
        except ValueError as error:
            raise ValueError(f"{checkpoint.path}: {error}; remove it") from error
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curve = state["curve"]

    def _set_learning_rate(self, progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate * (1 + math.cos(math.pi * progress)) / 2

    def _log(self, epoch: int, loss: float, seconds: float, validate: Validate) -> None:
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


def check_identity(kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a ValueError that says in what a kept run differs from the one that is wanted."""
    for key in now:
        if kept.get(key) != now[key]:
            raise ValueError(f"of a run with {key} {kept.get(key)!r}, now {now[key]!r}")


def calibrate(network: Encoder, inputs: Tensor, batch_size: int) -> None:
    """Gives an untrained network the batch statistics of the training inputs, nothing else."""
    update_bn(inputs.split(batch_size), network)
