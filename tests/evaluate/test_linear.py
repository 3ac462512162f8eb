"""The linear protocol: only the new layer learns, and as a loop by hand would have it."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cgh
from cgh.evaluate import Classifier, LinearProbe, accuracy, finetune_recipe, linear_recipe
from tests.conftest import small_backbone


def separable(count: int = 120, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    return F.one_hot(labels, 8) + 0.1 * torch.randn(count, 8, generator=generator), labels


def fit(probe: LinearProbe, features: Tensor, labels: Tensor, epochs: int, batch: int) -> None:
    optimizer, schedule = linear_recipe(probe, steps=epochs * len(features) // batch)
    for _ in range(epochs):
        for x, y in zip(features.split(batch), labels.split(batch), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(probe(x), y).backward()
            optimizer.step()
            schedule.step()


def test_separable_features_are_separated() -> None:
    probe = LinearProbe(nn.Identity(), width=8, classes=3)
    features, labels = separable()
    fit(probe, features, labels, epochs=10, batch=24)
    assert accuracy(probe(features), labels, k=[1]) == (100.0,)


def test_equals_momentum_and_cosine_written_out() -> None:
    features, labels = (x.double() if x.is_floating_point() else x for x in separable())
    probe = LinearProbe(nn.Identity(), width=8, classes=3).double()
    weight, bias = (x.detach().clone() for x in probe.classifier.parameters())
    fit(probe, features, labels, epochs=4, batch=24)

    velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    for step in range(20):
        x, y = features[24 * (step % 5) :][:24], labels[24 * (step % 5) :][:24]
        error = (F.softmax(x @ weight.T + bias, dim=1) - F.one_hot(y, 3)) / 24
        rate = 0.3 * (1 + math.cos(math.pi * step / 20)) / 2
        velocity = 0.9 * velocity[0] + error.T @ x, 0.9 * velocity[1] + error.sum(dim=0)
        weight, bias = weight - rate * velocity[0], bias - rate * velocity[1]
    torch.testing.assert_close(probe.classifier.weight.detach(), weight)
    torch.testing.assert_close(probe.classifier.bias.detach(), bias)


def test_the_backbone_stays_as_it_is() -> None:
    backbone = small_backbone()
    backbone.fc = nn.Identity()
    probe = LinearProbe(backbone, width=512, classes=3).train()
    before = copy.deepcopy(backbone.state_dict())
    fit(probe, torch.randn(8, 3, 32, 32), torch.arange(8) % 3, epochs=2, batch=4)
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)


def test_the_new_layer_starts_small() -> None:
    classifier = LinearProbe(nn.Identity(), width=2048, classes=100).classifier
    assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not classifier.bias.any()


def test_fine_tuning_has_a_rate_for_the_trunk_and_one_for_the_head() -> None:
    model = Classifier(nn.Linear(4, 6), width=6, classes=3)
    optimizer, schedule = finetune_recipe(model, steps_per_epoch=2)
    rates = []
    for _ in range(2 * 70):
        rates.append(schedule.get_last_lr())
        optimizer.zero_grad()
        F.cross_entropy(model(torch.eye(4)), torch.arange(4) % 3).backward()
        optimizer.step()
        schedule.step()
    assert all(torch.isfinite(x).all() for x in model.parameters())
    for epoch, factor in ((0, 1), (29, 1), (30, 0.1), (59, 0.1), (60, 0.01), (69, 0.01)):
        for rate in rates[2 * epoch : 2 * epoch + 2]:
            assert rate == pytest.approx([0.005 * factor, 0.02 * factor])


def test_a_trunk_learns_the_more_slowly_the_nearer_it_is_to_the_images() -> None:
    backbone = small_backbone()  # of one block in each of four stages
    backbone.fc = nn.Identity()
    model = Classifier(backbone, width=512, classes=3)
    optimizer, schedule = finetune_recipe(model, steps_per_epoch=1, milestones=[1], layer_decay=0.5)
    assert schedule.get_last_lr() == pytest.approx([*(0.005 * 0.5**depth for depth in range(5, 0, -1)), 0.02])
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([*(0.0005 * 0.5**depth for depth in range(5, 0, -1)), 0.002])


def test_accuracy_counts_the_likeliest_classes() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [2.0, 1.0, 3.0]])
    assert accuracy(logits, torch.tensor([0, 0, 0, 0]), k=[1, 2, 3, 5]) == (25.0, 75.0, 100.0, 100.0)
    with pytest.raises(ValueError, match=r"labels run from 0 to 3; the logits are of classes 0 to 2"):
        accuracy(logits, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"\(4, 3\) and labels \(3,\)"):
        accuracy(logits, torch.tensor([0, 1, 2]))


def test_a_probe_leaves_a_backbone_in_training_as_it_is() -> None:
    backbone = small_backbone().train()
    backbone.fc = nn.Identity()
    backbone.layer1.requires_grad_(False)
    backbone.bn1.eval()
    before = [(m.training, *(p.requires_grad for p in m.parameters(recurse=False))) for m in backbone.modules()]
    for wrapped in (backbone, nn.DataParallel(backbone)):
        probe = LinearProbe(wrapped, width=512, classes=3).train()
        probe(torch.randn(2, 3, 32, 32)).sum().backward()
        after = [(m.training, *(p.requires_grad for p in m.parameters(recurse=False))) for m in backbone.modules()]
        assert after == before
        assert not any(m.training or p.requires_grad for m in probe.backbone.modules() for p in m.parameters())


def test_accuracy_takes_integers_and_refuses_nan() -> None:
    logits = torch.tensor([[3.0, 2.0, -math.inf], [1.0, 2.0, 3.0]])
    for dtype in (torch.uint8, torch.int16, torch.uint16):
        assert accuracy(logits, torch.tensor([0, 1]).to(dtype), k=torch.tensor([1, 2])) == (50.0, 100.0)
    with pytest.raises(ValueError, match="logits hold NaN in 1 of 2 rows"):
        accuracy(torch.tensor([[1.0, math.nan], [1.0, 2.0]]), torch.tensor([1, 1]))
    with pytest.raises(TypeError, match="classes are integers"):
        accuracy(logits, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"k is \[0\]"):
        accuracy(logits, torch.tensor([0, 1]), k=[0])


@pytest.mark.parametrize("logits", [np.eye(2), [[1.0, 0.0]], torch.eye(2) > 0], ids=lambda x: type(x).__name__)
def test_logits_are_a_tensor_of_numbers(logits: Any) -> None:
    with pytest.raises(TypeError, match="logits are .*; make them"):
        accuracy(logits, torch.arange(len(logits)), k=[1])


def test_a_frozen_backbone_is_not_fine_tuned() -> None:
    teacher = cgh.EMATeacher(cgh.interop.build_backbone("resnet18"))
    with pytest.raises(ValueError, match="no parameter of the backbone takes a gradient"):
        finetune_recipe(Classifier(teacher.encoder, 512, 4), steps_per_epoch=5)


def test_a_backbone_gives_a_pooled_feature_of_the_width_that_was_said() -> None:
    extractor = cgh.HypercolumnExtractor(small_backbone(), ["layer3", "layer4"])
    images = torch.randn(2, 3, 64, 64)
    assert LinearProbe(extractor, 512, 3)(images).shape == (2, 3)
    with pytest.raises(
        ValueError, match=r"are \(2, 512\) and the linear layer reads width 64: build it with width=512"
    ):
        LinearProbe(extractor, 64, 3)(images)
    with pytest.raises(ValueError, match="must give a pooled feature"):
        LinearProbe(nn.Conv2d(3, 4, 1), 4, 3)(images)
