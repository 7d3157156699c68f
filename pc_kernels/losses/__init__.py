"""The losses: coherence.py is the one to read first; ranking.py is what losses of features share."""

from .coherence import PerceptionCoherenceLoss, perception_coherence_loss
from .function import PerceptionCoherenceFunction, Task
from .layers import MultiLayerPerceptionCoherenceLoss
from .matrices import coherence_loss_from_dissimilarities
from .ranking import RankingLoss, ranking_loss

__all__ = [
    "MultiLayerPerceptionCoherenceLoss",
    "PerceptionCoherenceFunction",
    "PerceptionCoherenceLoss",
    "RankingLoss",
    "Task",
    "coherence_loss_from_dissimilarities",
    "perception_coherence_loss",
    "ranking_loss",
]
