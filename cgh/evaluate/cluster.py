"""Clustering of frozen features, and how well the clusters agree with the classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cgh.contexts import check_finite
from cgh.extras import require
from cgh.labels import check_tensor, integer_labels


class ClusterScores(NamedTuple):
    """How well clusters agree with classes; what clusters are called makes no difference."""

    accuracy: float
    """Percent of the images that lie in their class's cluster, where clusters and classes are matched one to one as
    well as can be (Kuhn, 1955)."""
    nmi: float
    """Normalised mutual information, 0 to 1."""
    ami: float
    """Adjusted mutual information (Vinh et al., 2010), 1 where they are the same, 0 as by chance."""
    ari: float
    """Adjusted Rand index (Hubert and Arabie, 1985), 1 where they are the same, 0 as by chance."""


def kmeans(features: Tensor, clusters: int, seed: int = 0, restarts: int = 10) -> Tensor:
    """Return the cluster `(N,)` of each row by k-means, the best of several restarts (scikit-learn's).

    Rows are scaled to unit length first, so that what counts is the cosine between images, as for their neighbours, and
    not how large their features are.

    Args:
        features: `(N, W)`, of any length.
        clusters: how many.
        seed: fixes the starts.
        restarts: how many.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: features that are no tensor of numbers.
        ValueError: another shape, features that are not finite, or more clusters than rows.

    Example:
        >>> import torch, cgh
        >>> clusters = cgh.evaluate.kmeans(torch.eye(2).repeat(3, 1), clusters=2)
        >>> cgh.evaluate.cluster_scores(clusters, torch.tensor([1, 0, 1, 0, 1, 0]))
        ClusterScores(accuracy=100.0, nmi=1.0, ami=1.0, ari=1.0)
    """
    check_tensor(features, "features")
    if features.ndim != 2 or not 1 <= clusters <= len(features):
        raise ValueError(
            f"there are {clusters} clusters for features of shape {tuple(features.shape)}; features are (N, W), and "
            "clusters between 1 and N."
        )
    check_finite(features, "features")
    estimator = require("sklearn.cluster", extra="examples").KMeans(clusters, n_init=restarts, random_state=seed)
    return torch.from_numpy(estimator.fit_predict(F.normalize(features.detach().float(), dim=1).cpu().numpy())).long()


def cluster_scores(clusters: Tensor, labels: Tensor) -> ClusterScores:
    """Compare clusters `(N,)` with classes `(N,)`.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: shapes that differ, or nothing to compare.
    """
    clusters, labels = integer_labels(clusters, "clusters"), integer_labels(labels)
    if clusters.ndim != 1 or clusters.shape != labels.shape or not len(labels):
        raise ValueError(
            f"clusters have shape {tuple(clusters.shape)} and labels {tuple(labels.shape)}; both are (N,), not empty."
        )
    metrics = require("sklearn.metrics", extra="examples")
    assignment = require("scipy.optimize", extra="examples").linear_sum_assignment
    found, truth = clusters.cpu().numpy(), labels.cpu().numpy()
    table = metrics.cluster.contingency_matrix(truth, found)
    matched = table[assignment(table, maximize=True)].sum()
    return ClusterScores(
        accuracy=100 * float(matched) / len(labels),
        nmi=float(metrics.normalized_mutual_info_score(truth, found)),
        ami=float(metrics.adjusted_mutual_info_score(truth, found)),
        ari=float(metrics.adjusted_rand_score(truth, found)),
    )
