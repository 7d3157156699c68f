"""torchmetrics: coherence of a whole validation set, over batches and processes.

`python examples/torchmetrics_metric.py` runs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

import pc_kernels


class CoherenceMetric(Metric):
    """Agreement and Spearman's correlation of all features seen: inputs of all batches are compared."""

    full_state_update = False
    higher_is_better = True
    student: list[Tensor]
    teacher: list[Tensor]

    def __init__(self, dissimilarity: str = "euclidean", **arguments: Any) -> None:
        """Takes the dissimilarity of `pc_kernels.coherence`, and what a Metric takes."""
        super().__init__(**arguments)
        self.dissimilarity = dissimilarity
        self.add_state("student", [], dist_reduce_fx="cat")
        self.add_state("teacher", [], dist_reduce_fx="cat")

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Takes features [B, Ds] and [B, Dt] of the same inputs."""
        self.student.append(student.detach())
        self.teacher.append(teacher.detach())

    def compute(self) -> dict[str, Tensor]:
        """Of all of them."""
        features = dim_zero_cat(self.student), dim_zero_cat(self.teacher)
        return pc_kernels.coherence(*features, dissimilarity=self.dissimilarity)._asdict()


def main() -> None:
    """In batches, and at once: the same."""
    torch.manual_seed(0)
    teacher = torch.randn(300, 32)
    student = teacher[:, :8]  # which keeps a part of the order
    metric = CoherenceMetric()
    for batch in torch.arange(300).split(64):
        metric.update(student[batch], teacher[batch])
    found, whole = metric.compute(), pc_kernels.coherence(student, teacher)
    torch.testing.assert_close(found["spearman"], whole.spearman)
    print({name: round(value.item(), 4) for name, value in found.items()})


if __name__ == "__main__":
    main()
