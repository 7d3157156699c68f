"""Exact ranking metrics: functions, and classes that take their data batch by batch (accumulate.py)."""

from ..agreement import coherence
from .accumulate import (
    AUC,
    MRR,
    NDCG,
    AveragePrecision,
    CoherenceMetric,
    KendallTau,
    MeanAveragePrecision,
    Metric,
    RecallAtK,
    RetrievalMetric,
    Spearman,
)
from .lists import auc, average_precision, kendall_tau, mrr, ndcg, recall_at_k, spearman
from .retrieval import Retrieval, retrieval

__all__ = [
    "AUC",
    "MRR",
    "NDCG",
    "AveragePrecision",
    "CoherenceMetric",
    "KendallTau",
    "MeanAveragePrecision",
    "Metric",
    "RecallAtK",
    "Retrieval",
    "RetrievalMetric",
    "Spearman",
    "auc",
    "average_precision",
    "coherence",
    "kendall_tau",
    "mrr",
    "ndcg",
    "recall_at_k",
    "retrieval",
    "spearman",
]
