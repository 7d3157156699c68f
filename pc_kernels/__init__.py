"""Ranking losses over pairwise dissimilarities, exact and in O(B²): perception coherence for PyTorch.

Start at `PerceptionCoherenceLoss`; the definitions are in `pc_kernels.reference`.
"""

from . import metrics, reference
from .agreement import Coherence, coherence
from .cdf import smooth_cdf
from .installation import FallbackWarning
from .losses import (
    ApproxMRRLoss,
    ApproxNDCGLoss,
    AUCLoss,
    AveragePrecisionLoss,
    ContrastiveLoss,
    KendallLoss,
    LFCCLoss,
    MultiLayerPerceptionCoherenceLoss,
    PerceptionCoherenceFunction,
    PerceptionCoherenceLoss,
    RankNetLoss,
    RecallAtKLoss,
    SmoothAPLoss,
    SoftTargets,
    SpearmanLoss,
    coherence_loss_from_dissimilarities,
    contrastive_loss,
    perception_coherence_loss,
)
from .pairwise import pairwise_dissimilarity
from .ranks import hard_rank, soft_rank
from .sorting import SoftTopK, soft_sort, soft_topk
from .training.gradient_cache import cached_backward
from .training.layer_outputs import LayerOutputs
from .training.low_pass import LowPass
from .training.pooling import pool_features
from .training.queue import FeatureQueue

__version__ = "0.1.0"

__all__ = [
    "AUCLoss",
    "ApproxMRRLoss",
    "ApproxNDCGLoss",
    "AveragePrecisionLoss",
    "Coherence",
    "ContrastiveLoss",
    "FallbackWarning",
    "FeatureQueue",
    "KendallLoss",
    "LFCCLoss",
    "LayerOutputs",
    "LowPass",
    "MultiLayerPerceptionCoherenceLoss",
    "PerceptionCoherenceFunction",
    "PerceptionCoherenceLoss",
    "RankNetLoss",
    "RecallAtKLoss",
    "SmoothAPLoss",
    "SoftTargets",
    "SoftTopK",
    "SpearmanLoss",
    "cached_backward",
    "coherence",
    "coherence_loss_from_dissimilarities",
    "contrastive_loss",
    "hard_rank",
    "metrics",
    "pairwise_dissimilarity",
    "perception_coherence_loss",
    "pool_features",
    "reference",
    "smooth_cdf",
    "soft_rank",
    "soft_sort",
    "soft_topk",
]
