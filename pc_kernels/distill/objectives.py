"""What a student is trained for: PC, FitNet's projected MSE or RKD distance.

Each is a module `objective(student, teacher) -> scalar` on features [B, Ds] and [B, Dt]; its own
parameters, if it has any, are trained with the student's. None of them sees a label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from pc_kernels import PerceptionCoherenceLoss


class ProjectedMSE(nn.Module):
    """Mean squared error between the teacher's features and a linear map of the student's.

    The hint loss of FitNets (Romero et al. 2015, arXiv 1412.6550), on feature vectors.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        """Builds the regressor [Ds] -> [Dt], trained with the student and then dropped."""
        super().__init__()
        self.regressor = nn.Linear(student_width, teacher_width)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar."""
        return functional.mse_loss(self.regressor(student), teacher)


class RKDDistance(nn.Module):
    """Huber loss between pairwise distances, each divided by its mean over the batch.

    RKD-D of Park et al., CVPR 2019, arXiv 1904.05068.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, Ds], [B, Dt] -> scalar."""
        return functional.smooth_l1_loss(self._distances(student), self._distances(teacher))

    @staticmethod
    def _distances(features: Tensor) -> Tensor:
        distances = functional.pdist(features)
        return distances / distances.mean()


class Method(NamedTuple):
    """A row of the comparison: its printed name and how its objective is built."""

    title: str
    make: Callable[[int, int, float], nn.Module]  # student width, teacher width, PC's temperature


METHODS = {
    "pc": Method("PC", lambda _, __, temperature: PerceptionCoherenceLoss(temperature=temperature)),
    "fitnet": Method("FitNet", lambda student, teacher, _: ProjectedMSE(student, teacher)),
    "rkd": Method("RKD distance", lambda _, __, ___: RKDDistance()),
}
