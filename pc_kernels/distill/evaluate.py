"""How good are features? A linear probe and kNN, by scikit-learn, and coherence with the teacher."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from pc_kernels import coherence

from .data import Dataset, Split
from .models import Encoder

NEIGHBOURS = 5
COHERENCE_IMAGES = 2000  # coherence compares all pairs: at most this many held-out images
VALIDATION_IMAGES = 5000  # `validate` looks for neighbours among at most this many training images


class Metrics(NamedTuple):
    """Linear-probe and kNN accuracy, agreement and Spearman's correlation with the teacher.

    Accuracies and agreement lie in [0, 1], Spearman's correlation in [-1, 1]. By chance, agreement
    is 0.5 and the correlation 0.
    """

    probe: float
    knn: float
    agreement: float
    spearman: float


@torch.no_grad()
def embed(encoder: Encoder, images: Tensor, batch_size: int = 1024) -> Tensor:
    """Features [N, width] of images [N, C, H, W], in evaluation mode, on the CPU."""
    training = encoder.training
    encoder.eval()
    features = torch.cat([encoder(batch).cpu() for batch in images.split(batch_size)])
    encoder.train(training)
    return features


def evaluate(encoder: Encoder, teacher: Encoder, train: Split, held_out: Split) -> Metrics:
    """All metrics on held-out images; probe and kNN are fitted to the training images' features."""
    fit_to, features = embed(encoder, train.images), embed(encoder, held_out.images)
    sample = slice(COHERENCE_IMAGES)
    alike = coherence(features[sample], embed(teacher, held_out.images[sample]))
    return Metrics(
        probe_accuracy(fit_to, train.labels, features, held_out.labels),
        knn_accuracy(fit_to, train.labels, features, held_out.labels),
        float(alike.agreement),
        float(alike.spearman),
    )


def validate(encoder: Encoder, teacher: Encoder, data: Dataset) -> dict[str, float]:
    """The cheap part of the metrics on the validation split, for training curves."""
    bank = slice(VALIDATION_IMAGES)
    fit_to, features = embed(encoder, data.train.images[bank]), embed(encoder, data.val.images)
    sample = slice(COHERENCE_IMAGES)
    alike = coherence(features[sample], embed(teacher, data.val.images[sample]))
    knn = knn_accuracy(fit_to, data.train.labels[bank], features, data.val.labels)
    return {"knn": knn, "agreement": float(alike.agreement)}


def probe_accuracy(fit_to: Tensor, fit_labels: Tensor, features: Tensor, labels: Tensor) -> float:
    """Accuracy of a logistic regression on standardised features [N, D]."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(fit_to.numpy(), fit_labels.cpu().numpy())
    return float(probe.score(features.numpy(), labels.cpu().numpy()))


def knn_accuracy(fit_to: Tensor, fit_labels: Tensor, features: Tensor, labels: Tensor) -> float:
    """Accuracy of the 5 nearest neighbours, Euclidean, on the features [N, D] as they are."""
    knn = KNeighborsClassifier(min(NEIGHBOURS, len(fit_labels)))
    knn.fit(fit_to.numpy(), fit_labels.cpu().numpy())
    return float(knn.score(features.numpy(), labels.cpu().numpy()))
