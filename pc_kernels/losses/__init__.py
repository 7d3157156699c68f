"""The losses: coherence.py is the one to read first; ranking.py is what losses of features share."""

from .coherence import PerceptionCoherenceLoss, perception_coherence_loss
from .contrastive import ContrastiveLoss, SoftTargets, contrastive_loss
from .function import LossFunction, PerceptionCoherenceFunction, Task
from .layers import MultiLayerPerceptionCoherenceLoss
from .lfcc import LFCCLoss
from .matrices import coherence_loss_from_dissimilarities
from .ranking import RankingLoss, ranking_loss

__all__ = [
    "ContrastiveLoss",
    "LFCCLoss",
    "LossFunction",
    "MultiLayerPerceptionCoherenceLoss",
    "PerceptionCoherenceFunction",
    "PerceptionCoherenceLoss",
    "RankingLoss",
    "SoftTargets",
    "Task",
    "coherence_loss_from_dissimilarities",
    "contrastive_loss",
    "perception_coherence_loss",
    "ranking_loss",
]
