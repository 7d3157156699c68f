"""The losses: coherence.py is the one to read first; ranking.py is what losses of features share.

Those of retrieval, of lists, of correlation and of binary scores are built on `smooth_cdf`: retrieval.py,
listwise.py, correlation.py, classification.py.
"""

from .classification import AUCLoss, AveragePrecisionLoss
from .coherence import PerceptionCoherenceLoss, perception_coherence_loss
from .contrastive import ContrastiveLoss, SoftTargets, contrastive_loss
from .correlation import KendallLoss, SpearmanLoss
from .function import LossFunction, PerceptionCoherenceFunction, Task
from .layers import MultiLayerPerceptionCoherenceLoss
from .lfcc import LFCCLoss
from .listwise import ApproxMRRLoss, ApproxNDCGLoss, ListLoss, RankNetLoss
from .matrices import coherence_loss_from_dissimilarities
from .ranking import RankingLoss, ranking_loss
from .retrieval import RecallAtKLoss, RetrievalLoss, SmoothAPLoss

__all__ = [
    "AUCLoss",
    "ApproxMRRLoss",
    "ApproxNDCGLoss",
    "AveragePrecisionLoss",
    "ContrastiveLoss",
    "KendallLoss",
    "LFCCLoss",
    "ListLoss",
    "LossFunction",
    "MultiLayerPerceptionCoherenceLoss",
    "PerceptionCoherenceFunction",
    "PerceptionCoherenceLoss",
    "RankNetLoss",
    "RankingLoss",
    "RecallAtKLoss",
    "RetrievalLoss",
    "SmoothAPLoss",
    "SoftTargets",
    "SpearmanLoss",
    "Task",
    "coherence_loss_from_dissimilarities",
    "contrastive_loss",
    "perception_coherence_loss",
    "ranking_loss",
]
