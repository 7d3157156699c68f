"""Two training loops: a teacher with labels, a student with nothing but the teacher's features."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn
from tqdm import trange

from pc_kernels import LayerOutputs

from .data import Dataset, augment
from .models import Encoder

AfterEpoch = Callable[[int, float], None]  # the epoch, from 1, and its mean training loss


class Schedule(NamedTuple):
    """How long and how fast: Adam, the learning rate annealed to 0 along a cosine."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int


def train_teacher(
    teacher: Encoder, data: Dataset, schedule: Schedule, title: str, after_epoch: AfterEpoch
) -> None:
    """Trains by cross-entropy on the labels, with a linear head that is then dropped."""
    head = nn.Linear(teacher.width, len(data.classes)).to(data.train.images.device)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(head(teacher(images)), labels)

    _fit(nn.ModuleList([teacher, head]), loss, data, schedule, title, after_epoch)


def distil(
    student: Encoder,
    teacher: Encoder,
    objective: nn.Module,
    data: Dataset,
    schedule: Schedule,
    title: str,
    after_epoch: AfterEpoch,
) -> None:
    """Trains the student by `objective(student's layers, teacher's layers)`, without labels.

    Both see the same augmented batch, the teacher in evaluation mode: nothing is precomputed.
    """
    teacher.eval()
    with (
        LayerOutputs(student, student.layers) as mine,
        LayerOutputs(teacher, teacher.layers) as theirs,
    ):

        def loss(images: Tensor, _: Tensor) -> Tensor:
            with torch.no_grad():
                target = theirs(images).layers
            value: Tensor = objective(mine(images).layers, target)
            return value

        _fit(nn.ModuleList([student, objective]), loss, data, schedule, title, after_epoch)


def calibrate(encoder: Encoder, data: Dataset, batch_size: int) -> None:
    """Gives an untrained encoder the batch statistics of the training images, nothing else."""
    update_bn(data.train.images.split(batch_size), encoder)


def _fit(
    modules: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    data: Dataset,
    schedule: Schedule,
    title: str,
    after_epoch: AfterEpoch,
) -> None:
    """Minimises `loss_of(images, labels)` over shuffled, augmented batches; drops a short last."""
    images, labels = data.train
    generator = torch.Generator().manual_seed(schedule.seed)
    optimizer = torch.optim.Adam(modules.parameters(), lr=schedule.learning_rate)
    steps = len(labels) // schedule.batch_size
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.epochs * steps)
    progress = trange(schedule.epochs, desc=title, unit="epoch", mininterval=0.5)
    for epoch in progress:
        modules.train()
        total = torch.zeros((), device=images.device)
        order = torch.randperm(len(labels), generator=generator).to(images.device)
        for chosen in order.split(schedule.batch_size)[:steps]:
            loss = loss_of(augment(images[chosen], data.flip, generator), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            annealing.step()
            total += loss.detach()
        mean = total.item() / steps
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"{title}: the loss is {mean} in epoch {epoch + 1} at the learning rate "
                f"{schedule.learning_rate}; a smaller --lr may help"
            )
        progress.set_postfix(loss=f"{mean:.4g}", refresh=False)
        after_epoch(epoch + 1, mean)
