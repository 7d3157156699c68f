"""pytorch-metric-learning: its call, and its CrossBatchMemory. Labels are the numbers of the inputs.

`python examples/metric_learning.py` runs it.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.losses import CrossBatchMemory
from torch import Tensor, nn

import pc_kernels


class TeacherOrder(nn.Module):
    """Perception coherence with a table of the teacher's features, called as losses are there."""

    def __init__(self, teacher_features: Tensor, **options: Any) -> None:
        """Takes the features of every input [N, Dt], and the options of `PerceptionCoherenceLoss`."""
        super().__init__()
        self.register_buffer("teacher_features", teacher_features, persistent=False)
        self.loss_fn = pc_kernels.PerceptionCoherenceLoss(**options)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of embeddings [B, Ds] of the inputs with the numbers `labels`. Pairs are not mined."""
        target = self.teacher_features[labels]
        if ref_emb is None or ref_labels is None:
            return self.loss_fn(embeddings, target)
        others = labels[:, None] != ref_labels[None, :]  # a memory holds the batch itself as well
        return self.loss_fn(
            embeddings, target, ref_emb, self.teacher_features[ref_labels], pair_mask=others
        )


class Memory(CrossBatchMemory):
    """Which has a list of the losses that it takes."""

    @staticmethod
    def supported_losses() -> list[str]:
        """That one."""
        return ["TeacherOrder"]


def main() -> None:
    """Distils from a table of features, with a memory of 512 embeddings."""
    torch.manual_seed(0)
    inputs = torch.randn(2048, 64)
    teacher = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 128))
    student = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))
    with torch.no_grad():
        order = TeacherOrder(teacher(inputs))
    loss_fn = Memory(order, embedding_size=16, memory_size=512)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for epoch in range(3):
        for numbers in torch.randperm(len(inputs)).split(128):
            loss = loss_fn(student(inputs[numbers]), numbers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.5f}")


if __name__ == "__main__":
    main()
