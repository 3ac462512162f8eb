"""k nearest neighbours: the reference's accuracies, and the naive computation's on any shapes."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cgh
from tests import golden


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", golden.load("knn"), ids=lambda case: case["name"])
def test_golden(case: dict[str, Any], dtype: torch.dtype) -> None:
    name, classes = case["name"], case["classes"]
    centres = golden.array(f"{name}/centres", (classes, case["dim"]))
    data = []
    for split in ("train", "test"):
        labels = golden.labels(f"{name}/{split}/labels", case[split], classes)
        noise = golden.array(f"{name}/{split}/noise", (case[split], case["dim"]))
        data += [(centres[labels] + case["noise"] * noise).to(dtype), labels]
    expected = {int(k): tuple(value) for k, value in case["top1_top5"].items()}
    assert cgh.evaluate.knn(*data, k=list(expected), temperature=case["temperature"]) == expected


def by_hand(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, k: int, temperature: float) -> float:
    """Top-1 accuracy in percent, one test feature at a time."""
    hits = 0
    for feature, label in zip(test, truth.tolist(), strict=True):
        similarity = F.cosine_similarity(feature[None], train)
        votes = [0.0] * (int(max(labels.max(), truth.max())) + 1)
        for index in similarity.argsort(descending=True, stable=True)[:k].tolist():
            votes[int(labels[index])] += float(torch.exp(similarity[index] / temperature))
        hits += votes.index(max(votes)) == label
    return 100 * hits / len(test)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.integers(0, 1000), st.floats(0.05, 1))
@settings(max_examples=30, deadline=None)
def test_equals_the_votes_by_hand(rows: int, queries: int, classes: int, seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    train, test = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (rows, queries))
    labels, truth = (torch.randint(classes, (n,), generator=generator) for n in (rows, queries))
    ks = sorted({1, min(3, rows), rows})
    with pytest.MonkeyPatch.context() as patch:  # several blocks, also at these sizes
        module = importlib.import_module("cgh.evaluate.knn")
        patch.setattr(module, "TEST_ROWS", 7)
        patch.setattr(module, "TRAIN_ROWS", 11)
        result = cgh.evaluate.knn(train, labels, test, truth, k=ks, temperature=temperature)
    assert list(result) == ks
    for k in ks:
        assert result[k][0] == pytest.approx(by_hand(train, labels, test, truth, k, temperature))
        assert result[k][1] >= result[k][0]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_ties_go_to_the_earlier_image_and_to_the_lower_class(rows: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    train, test = torch.eye(3)[torch.randint(3, (rows,), generator=generator)], torch.eye(3)  # similarities of 0 and 1
    labels = torch.randint(4, (rows,), generator=generator)
    k = min(k, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("cgh.evaluate.knn"), "TRAIN_ROWS", 7)
        for row in test:
            nearest = sorted(range(rows), key=lambda i: (-float(train[i] @ row), i))[:k]
            votes = torch.zeros(4)
            for i in nearest:
                votes[labels[i]] += torch.exp((train[i] @ row - train[nearest[0]] @ row) / 0.07)
            winner = votes.tolist().index(votes.max())
            for truth in range(4):
                top1, _ = cgh.evaluate.knn(train, labels, row[None], torch.tensor([truth]), k=k)[k]
                assert top1 == (100.0 if truth == winner else 0.0)


def test_scale_and_half_precision_do_not_matter() -> None:
    train, test = torch.randn(200, 8), torch.randn(50, 8)
    labels, truth = torch.randint(5, (200,)), torch.randint(5, (50,))
    expected = cgh.evaluate.knn(train, labels, test, truth, k=[5])
    assert cgh.evaluate.knn(3 * train, labels, 0.1 * test, truth, k=5) == expected
    half = (train.bfloat16(), labels, test.bfloat16(), truth)
    rounded = (train.bfloat16().float(), labels, test.bfloat16().float(), truth)
    assert cgh.evaluate.knn(*half, k=5) == cgh.evaluate.knn(*rounded, k=5)


def test_bad_input() -> None:
    features, labels = torch.randn(10, 4), torch.randint(3, (10,))
    good = (features, labels, features, labels)
    for k in (11, 0, []):
        with pytest.raises(ValueError, match="it lies between 1 and the 10 training features"):
            cgh.evaluate.knn(*good, k=k)
    with pytest.raises(ValueError, match="temperature is 0"):
        cgh.evaluate.knn(*good, k=1, temperature=0)
    with pytest.raises(ValueError, match=r"train_features have shape \(10, 4\) and train_labels \(9,\)"):
        cgh.evaluate.knn(features, labels[:9], features, labels, k=1)
    with pytest.raises(ValueError, match="train features have width 4, test features 3"):
        cgh.evaluate.knn(features, labels, features[:, :3], labels, k=1)
    with pytest.raises(TypeError, match="test_labels are torch.float32"):
        cgh.evaluate.knn(features, labels, features, labels.float(), k=1)
    with pytest.raises(ValueError, match="train_labels hold -1; classes count from 0"):
        cgh.evaluate.knn(features, torch.full((10,), -1), features, labels, k=1)
    with pytest.raises(ValueError, match=r"test_features holds 1 values .* nan in row 2"):
        broken = features.clone()
        broken[2, 1] = float("nan")
        cgh.evaluate.knn(features, labels, broken, labels, k=1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16], ids=str)
def test_labels_of_every_integer_type_give_the_same(dtype: torch.dtype) -> None:
    features, labels = torch.randn(40, 8), torch.arange(40) % 7
    expected = cgh.evaluate.knn(features[:30], labels[:30], features[30:], labels[30:], k=[1, 5])
    for convert in (lambda x: x.to(dtype), lambda x: x.to(dtype).numpy(), lambda x: x.tolist()):
        found = cgh.evaluate.knn(features[:30], convert(labels[:30]), features[30:], convert(labels[30:]), k=[1, 5])
        assert found == expected


def test_counts_of_neighbours_of_every_integer_type_and_classes_with_gaps() -> None:
    features, labels = torch.randn(40, 8), torch.arange(40) % 4
    expected = cgh.evaluate.knn(features, labels, features, labels, k=[1, 2])
    for k in (torch.tensor([1, 2]), np.array([2, 1]), (np.int64(1), torch.tensor(2))):
        assert cgh.evaluate.knn(features, labels, features, labels, k=k) == expected
    assert cgh.evaluate.knn(features, labels == 0, features, labels == 0, k=np.int64(1)) == {1: (100.0, 100.0)}
    assert cgh.evaluate.knn(features, labels * 10**9, features, labels * 10**9, k=[1, 2]) == expected


def test_labels_and_counts_that_are_no_integers() -> None:
    features, labels = torch.randn(4, 8), torch.arange(4)
    with pytest.raises(TypeError, match="train_labels are torch.float32; classes are integers"):
        cgh.evaluate.knn(features, labels.float(), features, labels, k=1)
    with pytest.raises(TypeError, match="test_labels are a list of str"):
        cgh.evaluate.knn(features, labels, features, ["cat"] * 4, k=1)
    with pytest.raises(TypeError, match="k is 1.5; it is an integer"):
        cgh.evaluate.knn(features, labels, features, labels, k=1.5)


def test_features_may_be_of_two_precisions() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(40, 8, generator=generator), torch.arange(40) % 4
    for train, test in (
        (torch.float16, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
    ):
        assert cgh.evaluate.knn(x.to(train), labels, x.to(test), labels, k=1) == {1: (100.0, 100.0)}
