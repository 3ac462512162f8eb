"""Clusters are scored as scikit-learn scores them, whatever they are called."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cgh.evaluate import cluster_scores, kmeans, labelled_share

metrics = pytest.importorskip("sklearn.metrics")


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_equals_every_matching_tried(count: int, clusters: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(clusters, (count,), generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    scores = cluster_scores(found, labels)
    names = range(max(clusters, classes))
    best = max((torch.tensor(p)[found] == labels).sum().item() for p in permutations(names))
    assert scores.accuracy == pytest.approx(100 * best / count)
    assert scores.nmi == pytest.approx(metrics.normalized_mutual_info_score(labels, found))
    assert scores.ami == pytest.approx(metrics.adjusted_mutual_info_score(labels, found))
    assert scores.ari == pytest.approx(metrics.adjusted_rand_score(labels, found))
    renamed = torch.randperm(clusters, generator=generator)[found]
    assert cluster_scores(renamed + 10, labels) == pytest.approx(scores)


def test_kmeans_finds_separated_classes_and_a_seed_fixes_it() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    features = 10 * torch.eye(4)[labels] + torch.randn(60, 4, generator=generator)
    clusters = kmeans(features, clusters=4)
    assert cluster_scores(clusters, labels) == (100.0, *[pytest.approx(1.0)] * 3)
    assert torch.equal(clusters, kmeans(features.requires_grad_(), clusters=4)), "also in training"
    lengths = torch.rand(60, 1, generator=generator) + 0.01
    assert cluster_scores(kmeans(lengths * features, clusters=4), clusters).accuracy == 100, "lengths do not count"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"5 clusters for features of shape \(4, 2\)"):
        kmeans(torch.randn(4, 2), clusters=5)
    with pytest.raises(ValueError, match="finite"):
        kmeans(torch.tensor([[0.0], [float("nan")]]), clusters=1)
    with pytest.raises(ValueError, match=r"\(2,\) and labels \(3,\)"):
        cluster_scores(torch.tensor([0, 1]), torch.tensor([0, 1, 1]))


def test_a_share_of_the_labels_is_balanced_fixed_by_its_seed_and_grows_to_all() -> None:
    labels = torch.arange(300) % 3
    share = labelled_share(labels, 0.1, seed=1)
    assert labels[share].bincount().tolist() == [10, 10, 10]
    assert torch.equal(share, share.unique())
    assert torch.equal(share, labelled_share(labels, 0.1, seed=1))
    assert not torch.equal(share, labelled_share(labels, 0.1, seed=2))
    assert labels[labelled_share(labels, 0.001)].bincount().tolist() == [1, 1, 1]
    assert torch.equal(labelled_share(labels, 1.0), torch.arange(300))
    with pytest.raises(ValueError, match="fraction is 10"):
        labelled_share(labels, 10)


def test_features_are_a_tensor_of_numbers() -> None:
    with pytest.raises(TypeError, match="features are a ndarray; make them a tensor"):
        kmeans(np.eye(3), clusters=2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([], r"shape \(0,\), and are empty"), ([0, -1, -1], "below zero 2 times"), ([[0], [1]], r"shape \(2, 1\); they")],
)
def test_a_share_of_what_is_no_list_of_classes_is_refused(labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labelled_share(torch.tensor(labels, dtype=torch.int64), 0.5)
