"""Ranking losses over pairwise dissimilarities, exact and in O(B²): perception coherence for PyTorch.

Start at `PerceptionCoherenceLoss`; the definitions are in `pc_kernels.reference`.
"""

from . import reference
from .agreement import Coherence, coherence
from .installation import FallbackWarning
from .losses import (
    ContrastiveLoss,
    LFCCLoss,
    MultiLayerPerceptionCoherenceLoss,
    PerceptionCoherenceFunction,
    PerceptionCoherenceLoss,
    SoftTargets,
    coherence_loss_from_dissimilarities,
    contrastive_loss,
    perception_coherence_loss,
)
from .pairwise import pairwise_dissimilarity
from .ranks import hard_rank, soft_rank
from .training.gradient_cache import cached_backward
from .training.layer_outputs import LayerOutputs
from .training.low_pass import LowPass
from .training.pooling import pool_features
from .training.queue import FeatureQueue

__version__ = "0.1.0"

__all__ = [
    "Coherence",
    "ContrastiveLoss",
    "FallbackWarning",
    "FeatureQueue",
    "LFCCLoss",
    "LayerOutputs",
    "LowPass",
    "MultiLayerPerceptionCoherenceLoss",
    "PerceptionCoherenceFunction",
    "PerceptionCoherenceLoss",
    "SoftTargets",
    "cached_backward",
    "coherence",
    "coherence_loss_from_dissimilarities",
    "contrastive_loss",
    "hard_rank",
    "pairwise_dissimilarity",
    "perception_coherence_loss",
    "pool_features",
    "reference",
    "soft_rank",
]
