"""k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cgh.contexts import check_finite, check_temperature
from cgh.labels import check_tensor, integer_labels, integers

# Rows that meet in one block of similarities, so that memory does not grow with the sets: 64 MiB in float32.
TEST_ROWS, TRAIN_ROWS = 512, 32_768


@torch.no_grad()
def knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int | Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, tuple[float, float]]:
    """Classify test features by the weighted votes of their nearest training features (Wu et al., 2018).

    A neighbour of cosine similarity `s` votes for its class with `exp(s / temperature)`. Computed in blocks on the
    device of `test_features`; the training features may lie elsewhere, such as in the memory of the host.

    Args:
        train_features: `(M, W)`, of any length: they are scaled to one.
        train_labels: `(M,)`, classes from 0, of any integer type.
        test_features: `(N, W)`.
        test_labels: `(N,)`.
        k: how many neighbours vote; several values cost no more than the largest.
        temperature: of the votes.

    Returns:
        `(top1, top5)` by `k`, in percent of the test set. Below `k = 5` the second counts the top `k` classes.

        Ties are decided by a rule, so that a figure is the same on every device: of equally similar training images the
        earlier in the set is nearer, and of classes with equal votes the lower wins, also where fewer than five have
        any. The reference implementation leaves both to sorts that keep no order.

    Raises:
        ValueError: `k` below one or larger than the training set, shapes that do not fit together, an empty set, labels
            below zero, features that are not finite, or a temperature of zero or below.
        TypeError: features that are no tensor or not floating point, or labels that are not integers.

    Example:
        >>> import torch, cgh
        >>> features, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
        >>> cgh.evaluate.knn(features, labels, features, labels, k=[1, 4])
        {1: (100.0, 100.0), 4: (100.0, 100.0)}
    """
    ks = sorted({*integers(k, "k")})
    check_temperature(temperature)
    train_labels = _check("train", train_features, train_labels)
    test_labels = _check("test", test_features, test_labels)
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"train features have width {train_features.shape[1]}, test features {test_features.shape[1]}."
        )
    if not ks or ks[0] < 1 or ks[-1] > len(train_features):
        raise ValueError(f"k is {ks}; it lies between 1 and the {len(train_features)} training features.")

    device = test_features.device
    # Classes are numbered anew, in their order, so that numbers with gaps take no memory.
    numbers, labels = torch.cat([train_labels.to(device), test_labels.to(device)]).unique(return_inverse=True)
    train_labels, test_labels = labels.split([len(train_labels), len(test_labels)])
    classes = len(numbers)
    hits = torch.zeros(len(ks), 2, dtype=torch.long, device=device)
    for queries, truth in zip(test_features.split(TEST_ROWS), test_labels.split(TEST_ROWS), strict=True):
        similarity, neighbour = _nearest(_unit_length(queries, "test"), train_features, ks[-1])
        # The nearest neighbour's vote counts one: a common factor changes no rank, and nothing overflows.
        votes = torch.exp((similarity - similarity[:, :1]) / temperature)
        labels = train_labels[neighbour]
        scores = votes.new_zeros(len(queries), classes)
        for row, (start, end) in enumerate(pairwise([0, *ks])):
            scores.scatter_add_(1, labels[:, start:end], votes[:, start:end])
            predicted = scores.argsort(dim=1, descending=True, stable=True)[:, : min(5, end)]
            correct = predicted == truth[:, None]
            hits[row] += torch.stack([correct[:, 0].sum(), correct.sum()])
    return {
        k: (100 * top1 / len(test_labels), 100 * top5 / len(test_labels))
        for k, (top1, top5) in zip(ks, hits.tolist(), strict=True)
    }


def _nearest(queries: Tensor, train_features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and indices `(N, k)` of the nearest training features, the nearest first."""
    dtype = torch.promote_types(queries.dtype, train_features.dtype)
    best = queries.new_empty(len(queries), 0, dtype=dtype)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start, block in zip(range(0, len(train_features), TRAIN_ROWS), train_features.split(TRAIN_ROWS), strict=True):
        similarity = queries.to(dtype) @ _unit_length(block.to(queries.device), "train").to(dtype).T
        block_best, block_index = _top(similarity, min(k, len(block)))
        best, order = _top(torch.cat([best, block_best], dim=1), min(k, start + len(block)))
        index = torch.cat([index, block_index + start], dim=1).gather(1, order)
    return best, index


def _top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row and their columns, the largest first, and of equal ones the lower column."""
    best, index = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    contested = (best[:, k:] == best[:, k - 1 : k]).any(dim=1)  # topk takes any of those that equal the last
    best, index = best[:, :k], index[:, :k]
    if contested.any():
        values, columns = similarity[contested].sort(dim=1, descending=True, stable=True)
        best[contested], index[contested] = values[:, :k], columns[:, :k]
    index, order = index.sort(dim=1)
    best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best, index.gather(1, order)


def _unit_length(features: Tensor, name: str) -> Tensor:
    check_finite(features, f"{name}_features")
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


def _check(name: str, features: Tensor, classes: Any) -> Tensor:
    """The labels as int64."""
    check_tensor(features, f"{name}_features")
    labels = integer_labels(classes, f"{name}_labels")
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"{name}_features have shape {tuple(features.shape)} and {name}_labels {tuple(labels.shape)}; "
            "they must be (N, W) and (N,), and not empty."
        )
    if not features.is_floating_point():
        raise TypeError(f"{name}_features are {features.dtype}; features are floating point.")
    if labels.min() < 0:
        raise ValueError(f"{name}_labels hold {int(labels.min())}; classes count from 0.")
    return labels
