"""How good are features? Probe, nearest neighbours, retrieval, and coherence with the teacher."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from pc_kernels import coherence, hard_rank

from .data import Dataset
from .networks import Encoder

NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07  # as in Wu et al. 2018, arXiv 1805.01978, section 3.4
PROBE_STEPS = 300
COHERENCE_ROWS = 1000  # coherence compares all pairs: at most this many held-out rows
CURVE_BANK, CURVE_ROWS = 2000, 500  # training and validation rows that a curve is measured on


class Metrics(NamedTuple):
    """What features are worth, on held-out inputs; by chance, agreement is 0.5 and Spearman 0.

    Attributes:
        probe: accuracy of a logistic regression on the training rows' standardised features.
        knn: accuracy of the 20 nearest training rows, each voting with exp(cosine/0.07).
        map_r: mean average precision at R among the held-out rows themselves.
        recall_1: how often the nearest other held-out row is of the same class.
        agreement: share of pairs of references ordered as by the teacher, 0 to 1.
        spearman: rank correlation with the teacher's distances, −1 to 1.
        similarity: rank correlation of all pairs' cosines with the teacher's, −1 to 1: what benchmarks of
            semantic textual similarity measure, with the teacher's cosines for people's scores.
    """

    probe: float
    knn: float
    map_r: float
    recall_1: float
    agreement: float
    spearman: float
    similarity: float


@torch.no_grad()
def embed(network: Encoder, inputs: Tensor, batch_size: int = 500) -> Tensor:
    """Features [N, width] of inputs [N, ...], in evaluation mode, on the CPU."""
    training = network.training
    network.eval()
    features = torch.cat([network(batch).cpu() for batch in inputs.split(batch_size)])
    network.train(training)
    return features


def evaluate(features: dict[str, Tensor], data: Dataset) -> dict[str, Metrics]:
    """All metrics on `val` and `test`; probe and neighbours know the training rows' features.

    Args:
        features: [N, D] of each split, on the CPU.
        data: what they are features of, with the teacher's.
    """
    train_labels = data.train.labels.cpu()
    probe = fit_probe(features["train"], train_labels)
    metrics = {}
    for name in ("val", "test"):
        split, rows = data.splits[name], features[name]
        labels = split.labels.cpu()
        known = split.teacher[:COHERENCE_ROWS].cpu()
        alike = coherence(rows[:COHERENCE_ROWS], known)
        bank, queries = _directions(features["train"], rows)
        metrics[name] = Metrics(
            float(probe.score(rows.numpy(), labels.numpy())),
            knn_accuracy(bank, train_labels, queries, labels),
            *retrieval(queries, labels),
            float(alike.agreement),
            float(alike.spearman),
            similarity(queries[:COHERENCE_ROWS], functional.normalize(known)),
        )
    return metrics


def validate(network: Encoder, data: Dataset) -> dict[str, float]:
    """The cheap part of the metrics on validation rows, for training curves."""
    train, val = data.train, data.val
    bank = embed(network, train.inputs[:CURVE_BANK])
    rows = embed(network, val.inputs[:CURVE_ROWS])
    alike = coherence(rows, val.teacher[:CURVE_ROWS].cpu())
    labels = val.labels[:CURVE_ROWS].cpu()
    bank, rows = _directions(bank, rows)
    knn = knn_accuracy(bank, train.labels[:CURVE_BANK].cpu(), rows, labels)
    return {"knn": knn, "agreement": float(alike.agreement)}


def fit_probe(features: Tensor, labels: Tensor) -> Pipeline:
    """A logistic regression on standardised features [N, D]."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=PROBE_STEPS, tol=1e-3))
    return probe.fit(features.numpy(), labels.numpy())


def probe_layer(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """The same as a linear layer on the features themselves, [D] -> [classes]."""
    scaler, regression = (step for _, step in fit_probe(features, labels).steps)
    weight, bias = regression.coef_ / scaler.scale_, regression.intercept_
    if classes == 2:  # scikit-learn keeps the second class's logit alone
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    layer = nn.Linear(features.shape[1], classes)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias - weight @ scaler.mean_))
    return layer


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> float:
    """Accuracy of the vote of the nearest rows of a bank [M, D], of unit vectors [N, D]."""
    near, place = (queries @ bank.T).topk(min(NEIGHBOURS, len(bank)), dim=1)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[place], ((near - 1) / KNN_TEMPERATURE).exp())
    return float((votes.argmax(1) == labels).float().mean())


def retrieval(queries: Tensor, labels: Tensor) -> tuple[float, float]:
    """(mAP@R, Recall@1) of unit vectors [N, D], each a query for the others.

    Musgrave et al., ECCV 2020, arXiv 2003.08505, section 3.2: with R others of a query's class,
    mAP@R is the mean over queries of Σ_{i≤R} precision at i, where the i-th is of the class, over R.
    Queries that are alone in their class do not count.
    """
    same_class = (labels[:, None] == labels[None]).sum(1) - 1
    counted = same_class > 0
    if not counted.any():
        return float("nan"), float("nan")
    similar = (queries @ queries.T).fill_diagonal_(-torch.inf)
    place = similar.topk(min(int(same_class.max()), len(labels) - 1), dim=1).indices
    hit = (labels[place] == labels[:, None]).double()
    rank = torch.arange(1, hit.shape[1] + 1)
    precision = hit.cumsum(1) / rank
    within = rank <= same_class[:, None]
    average = (precision * hit * within).sum(1) / same_class
    return float(average[counted].mean()), float(hit[counted, 0].mean())


def similarity(queries: Tensor, known: Tensor) -> float:
    """Spearman's correlation of the cosines of all pairs of unit vectors [N, Ds] and [N, Dt]."""
    pairs = torch.triu_indices(len(queries), len(queries), 1)
    cosines = [(x @ x.T)[pairs[0], pairs[1]] for x in (queries, known)]
    return float(torch.stack([hard_rank(x).double() for x in cosines]).corrcoef()[0, 1])


def _directions(bank: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of both, seen from the bank's mean, so that cosines tell inputs apart."""
    centre = bank.mean(0)
    return functional.normalize(bank - centre), functional.normalize(rows - centre)
