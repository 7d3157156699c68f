"""Ranking losses over pairwise dissimilarities, exact and in O(B²): perception coherence for PyTorch.

Start at `PerceptionCoherenceLoss`; the definitions are in `pc_kernels.reference`.
"""

from . import reference
from .losses import (
    PerceptionCoherenceFunction,
    PerceptionCoherenceLoss,
    coherence_loss_from_dissimilarities,
    perception_coherence_loss,
)
from .metrics import Coherence, coherence, pairwise_dissimilarity
from .ranks import hard_rank, soft_rank

__version__ = "0.1.0"

__all__ = [
    "Coherence",
    "PerceptionCoherenceFunction",
    "PerceptionCoherenceLoss",
    "coherence",
    "coherence_loss_from_dissimilarities",
    "hard_rank",
    "pairwise_dissimilarity",
    "perception_coherence_loss",
    "reference",
    "soft_rank",
]
