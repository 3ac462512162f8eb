"""Looking at a model leaves every module in the mode that it was in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision import datasets
from torchvision.transforms import ToTensor
from typing_extensions import Self

import cgh
from cgh.modes import evaluating
from tests.conftest import small_backbone

DATA = datasets.FakeData(4, (3, 32, 32), 2, transform=ToTensor())


@pytest.mark.parametrize(
    "look",
    [
        lambda net: cgh.evaluate.extract_features(net, DATA, batch_size=2),
        lambda net: cgh.list_layers(net, 64),
        lambda net: cgh.HypercolumnExtractor(net, ["layer4"]).widths((3, 64, 64)),
    ],
    ids=["extract_features", "list_layers", "widths"],
)
@pytest.mark.parametrize("training", [True, False])
def test_frozen_norms_stay_frozen(look: Callable[[nn.Module], object], training: bool) -> None:
    net = small_backbone().train(training)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(not training)
    before = [m.training for m in net.modules()]
    look(net)
    assert [m.training for m in net.modules()] == before


def test_modes_come_back_after_an_error() -> None:
    net = nn.Sequential(nn.Dropout().eval(), nn.Dropout())
    with pytest.raises(ZeroDivisionError), evaluating(net):
        assert not net[1].training
        raise ZeroDivisionError
    assert [m.training for m in net.modules()] == [True, False, True]


def test_what_a_models_own_eval_did_is_undone_by_its_own_train() -> None:
    class Merging(nn.Module):
        """Merges weights in evaluation mode, as adapters do."""

        merged = False

        def train(self, mode: bool = True) -> Self:
            self.merged = not mode
            return super().train(mode)

    net = nn.Sequential(Merging(), nn.Dropout().eval())
    with evaluating(net):
        assert net[0].merged
    assert not net[0].merged
    assert not net[1].training


def test_a_compiled_model_gets_its_modes_back() -> None:
    net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with evaluating(torch.compile(net, backend="eager")):
        assert not net[0].training
    assert [m.training for m in net.modules()] == [True, True, False]


def test_a_function_has_no_mode() -> None:
    extractor = cgh.HypercolumnExtractor(small_backbone(), ["layer4"])
    with pytest.raises(TypeError, match=r"the model is a method; pass an nn.Module, such as model.student.extractor"):
        cgh.evaluate.extract_features(extractor.pooled, DATA)  # type: ignore[arg-type]  # what is tested
