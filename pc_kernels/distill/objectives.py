"""What a student is trained for: PC, FitNet's projected MSE, RKD distance, LFCC, or PC and LFCC.

Each is a module `objective(student, teacher) -> scalar` on what the layers of both said, by name (see
`Encoder.layers`); its own parameters, if it has any, are trained with the student's. None of them sees
a label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from pc_kernels import LFCCLoss, PerceptionCoherenceLoss

from .models import Encoder

Layers = Mapping[str, Tensor]
LFCC_SHARE = 0.01  # beside PC, whose values are that much smaller


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


class OfFeatures(nn.Module):
    """A loss of the layer "features" alone."""

    def __init__(self, loss_fn: nn.Module) -> None:
        """Takes a loss of [B, Ds] and [B, Dt]."""
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, student: Layers, teacher: Layers) -> Tensor:
        """Outputs of layers, by name -> scalar."""
        loss: Tensor = self.loss_fn(student["features"], teacher["features"])
        return loss


class Sum(nn.Module):
    """One objective, and a share of another."""

    def __init__(self, first: nn.Module, second: nn.Module, share: float) -> None:
        """Takes both, and what the second weighs."""
        super().__init__()
        self.first, self.second, self.share = first, second, share

    def forward(self, student: Layers, teacher: Layers) -> Tensor:
        """Outputs of layers, by name -> scalar."""
        loss: Tensor = self.first(student, teacher) + self.share * self.second(student, teacher)
        return loss


class Method(NamedTuple):
    """A row of the comparison: its printed name and how its objective is built."""

    title: str
    make: Callable[[Encoder, Encoder, float], nn.Module]  # student, teacher, PC's temperature


def _pc(_: Encoder, __: Encoder, temperature: float) -> nn.Module:
    return OfFeatures(PerceptionCoherenceLoss(temperature=temperature))


def _fitnet(student: Encoder, teacher: Encoder, _: float) -> nn.Module:
    return OfFeatures(ProjectedMSE(student.width, teacher.width))


def _rkd(_: Encoder, __: Encoder, ___: float) -> nn.Module:
    return OfFeatures(RKDDistance())


def _lfcc(student: Encoder, _: Encoder, __: float) -> nn.Module:
    return LFCCLoss(dict.fromkeys(student.layers, 1 / len(student.layers)))


def _both(student: Encoder, teacher: Encoder, temperature: float) -> nn.Module:
    pc, lfcc = (make(student, teacher, temperature) for make in (_pc, _lfcc))
    return Sum(pc, lfcc, LFCC_SHARE)


METHODS = {
    "pc": Method("PC", _pc),
    "fitnet": Method("FitNet", _fitnet),
    "rkd": Method("RKD distance", _rkd),
    "lfcc": Method("LFCC", _lfcc),
    "pc+lfcc": Method("PC + LFCC", _both),
}
