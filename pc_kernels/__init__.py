"""Ranking losses over pairwise dissimilarities, exact and in O(B²): perception coherence for PyTorch.

Start at `PerceptionCoherenceLoss`; the definitions are in `pc_kernels.reference`.
"""

from . import reference
from .gradient_cache import cached_backward
from .layers import MultiLayerPerceptionCoherenceLoss, pool_features
from .losses import (
    PerceptionCoherenceFunction,
    PerceptionCoherenceLoss,
    coherence_loss_from_dissimilarities,
    perception_coherence_loss,
)
from .metrics import Coherence, coherence, pairwise_dissimilarity
from .queue import FeatureQueue
from .ranks import hard_rank, soft_rank

__version__ = "0.1.0"

__all__ = [
    "Coherence",
    "FeatureQueue",
    "MultiLayerPerceptionCoherenceLoss",
    "PerceptionCoherenceFunction",
    "PerceptionCoherenceLoss",
    "cached_backward",
    "coherence",
    "coherence_loss_from_dissimilarities",
    "hard_rank",
    "pairwise_dissimilarity",
    "perception_coherence_loss",
    "pool_features",
    "reference",
    "soft_rank",
]
