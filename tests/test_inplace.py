"""A hypercolumn is made of what its layers gave, or refused where that is gone."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import cgh


class Net(nn.Module):
    """A convolution whose output is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.relu_(self.first(images))).mean(dim=(2, 3))


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_layer_that_is_changed_in_place_is_refused_and_not_offered() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"'first' gave an output that a later layer changed in place.*inplace=False"):
        cgh.HypercolumnExtractor(net, ["first"])(IMAGES)
    assert [layer.name for layer in cgh.list_layers(net, 16)] == ["second"]
    offered = [layer.name for layer in cgh.list_layers(torchvision.models.resnet18(), 64)]
    assert {"layer4", "layer4.1"} <= {*offered}
    assert not {"bn1", "layer4.1.bn1", "layer4.1.bn2"} & {*offered}


def test_compiled_and_in_inference_mode_it_is_the_layers_own_output() -> None:
    net = Net().eval()
    features = cgh.HypercolumnExtractor(net, ["first"])
    expected = net.first(IMAGES)
    compiled = torch.compile(features, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES).hypercolumn, expected)
    with torch.inference_mode():
        torch.testing.assert_close(features(IMAGES.clone()).hypercolumn, expected)
