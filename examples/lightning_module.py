"""Lightning: a module that distils, on any number of devices.

`python examples/lightning_module.py` runs it.
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pc_kernels


class Distillation(lightning.LightningModule):
    """Trains a student to order inputs as a frozen teacher does."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        """Takes both networks."""
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.loss_fn = pc_kernels.PerceptionCoherenceLoss(dissimilarity="cosine", temperature=1.0)

    def on_fit_start(self) -> None:
        """With several processes: one joint batch. The group is not there before, nor is it saved."""
        if torch.distributed.is_initialized():
            self.loss_fn.process_group = torch.distributed.group.WORLD

    def on_fit_end(self) -> None:
        """Lets go of the group."""
        self.loss_fn.process_group = None

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        (inputs,) = batch
        self.teacher.eval()  # Lightning sets all of the module to training
        loss: Tensor = self.loss_fn(self.student(inputs), self.teacher(inputs))
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """What the loss stands for, on other inputs."""
        (inputs,) = batch
        coherence = pc_kernels.coherence(self.student(inputs), self.teacher(inputs))
        self.log_dict({"agreement": coherence.agreement, "spearman": coherence.spearman})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of the student alone."""
        return torch.optim.AdamW(self.student.parameters(), lr=3e-3)


def main() -> None:
    """Trains on random inputs."""
    lightning.seed_everything(0, verbose=False)
    teacher = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 128))
    student = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))
    train, validation = TensorDataset(torch.randn(2560, 64)), TensorDataset(torch.randn(256, 64))
    trainer = lightning.Trainer(
        max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(
        Distillation(student, teacher),
        DataLoader(train, batch_size=256, shuffle=True, drop_last=True),
        DataLoader(validation, batch_size=256),
    )
    print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
