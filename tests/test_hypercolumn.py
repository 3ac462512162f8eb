"""The extractor gives what running the backbone by hand gives, in every way that people run networks."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cgh
from cgh.hypercolumn import remove_classifier
from tests.conftest import small_backbone


class ByHand(nn.Module):
    """A ResNet written out, as the truth."""

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.resnet = resnet

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        r = self.resnet
        x = r.layer2(r.layer1(r.maxpool(r.relu(r.bn1(r.conv1(images))))))
        third = r.layer3(x)
        fourth = r.layer4(third)
        small = F.interpolate(third, fourth.shape[-2:], mode="bilinear", align_corners=False)
        return fourth.mean(dim=(2, 3)), torch.cat([small, fourth], dim=1)


class Map(nn.Module):
    """A network without a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


@pytest.fixture
def features() -> cgh.HypercolumnExtractor:
    return cgh.HypercolumnExtractor(small_backbone(), ["layer3", "layer4"]).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64)


def gradient(module: nn.Module, loss: Tensor) -> Tensor:
    module.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_equals_the_network_by_hand(features: cgh.HypercolumnExtractor, images: Tensor) -> None:
    pooled, hypercolumn = ByHand(features.backbone)(images)
    f = features(images)
    torch.testing.assert_close(f.pooled, pooled)
    torch.testing.assert_close(f.hypercolumn, hypercolumn)
    torch.testing.assert_close(features.pooled(images), pooled)


def test_maps_take_the_size_of_the_last_named_layer(images: Tensor) -> None:
    features = cgh.HypercolumnExtractor(small_backbone(), ["layer4", "layer2", "layer3"])
    f = features(images)
    assert f.hypercolumn.shape == (2, 512 + 128 + 256, 4, 4)


def test_compiles_as_one_graph(features: cgh.HypercolumnExtractor, images: Tensor) -> None:
    compiled = torch.compile(features, fullgraph=True, backend="aot_eager")
    expected, f = features(images), compiled(images)
    torch.testing.assert_close(f, expected)
    torch.testing.assert_close(compiled(2 * images), features(2 * images))
    torch.testing.assert_close(
        gradient(features, compiled(images).hypercolumn.sum()), gradient(features, features(images).hypercolumn.sum())
    )


def test_a_copy_captures_into_itself(features: cgh.HypercolumnExtractor, images: Tensor) -> None:
    for twin in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
        torch.testing.assert_close(twin(images), features(images))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin(images).hypercolumn.any()
        assert features(images).hypercolumn.any()


@pytest.mark.parametrize("whole", [True, False])
def test_gradient_checkpointing(features: cgh.HypercolumnExtractor, images: Tensor, whole: bool) -> None:
    expected = gradient(features, features(images).hypercolumn.square().sum())
    if whole:
        f = checkpoint(features, images, use_reentrant=False)
    else:
        layer, forward = features.backbone.layer3, features.backbone.layer3.forward
        layer.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
        f = features(images)
    torch.testing.assert_close(gradient(features, f.hypercolumn.square().sum()), expected)


def test_a_gradient_lost_to_reentrant_checkpointing_is_an_error(images: Tensor) -> None:
    class Checkpointed(ByHand):
        def forward(self, images: Tensor) -> Tensor:
            r = self.resnet
            x = r.layer1(r.maxpool(r.relu(r.bn1(r.conv1(images)))))
            x = checkpoint(lambda x: r.layer4(r.layer3(r.layer2(x))), x, use_reentrant=True)
            return x.mean(dim=(2, 3))

    features = cgh.HypercolumnExtractor(Checkpointed(small_backbone()), ["resnet.layer3"])
    with pytest.raises(ValueError, match=r"'resnet.layer3' .* without gradient.*use_reentrant=False"):
        features(images)


def test_frozen_layers_need_no_gradient(features: cgh.HypercolumnExtractor, images: Tensor) -> None:
    for module in (features.backbone.conv1, features.backbone.bn1, features.backbone.layer1, features.backbone.layer2):
        module.requires_grad_(False)
    features.backbone.layer3.requires_grad_(False)
    features(images).hypercolumn.sum().backward()


def test_channels_last_and_autocast(features: cgh.HypercolumnExtractor, images: Tensor) -> None:
    expected = features(images)
    f = features.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(f, expected)
    assert f.hypercolumn.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        f = features(images)
    assert f.hypercolumn.dtype == torch.bfloat16
    torch.testing.assert_close(f.hypercolumn.float(), expected.hypercolumn, rtol=0.1, atol=0.1)


def test_two_calls_in_one_step(features: cgh.HypercolumnExtractor, images: Tensor) -> None:
    one, two = features(images), features(images.flip(0))
    torch.testing.assert_close(one.hypercolumn, two.hypercolumn.flip(0))
    both = gradient(features, one.hypercolumn.sum() + two.hypercolumn.sum())
    single = gradient(features, features(images).hypercolumn.sum())
    torch.testing.assert_close(both, 2 * single, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("call", ["extractor", "backbone", "failing"])
def test_no_activation_stays_alive(features: cgh.HypercolumnExtractor, images: Tensor, call: str) -> None:
    maps: list[weakref.ref[Tensor]] = []
    features.backbone.layer3.register_forward_hook(lambda m, a, output: maps.append(weakref.ref(output)))
    with torch.no_grad():
        if call == "extractor":
            features(images)
        elif call == "backbone":
            features.backbone(images)
        else:
            hook = features.backbone.layer4.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                features(images)
            hook.remove()
    gc.collect()
    assert [ref() for ref in maps] == [None]


def test_widths_leave_no_trace(images: Tensor) -> None:
    features = cgh.HypercolumnExtractor(small_backbone(), ["layer3", "layer4"])
    features.backbone.layer1.eval()
    before, modes = copy.deepcopy(features.state_dict()), [m.training for m in features.modules()]
    state = torch.get_rng_state()
    assert features.widths() == (512, {"hypercolumn": 768})
    assert modes == [m.training for m in features.modules()]
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(features.state_dict(), before, rtol=0, atol=0)


def test_widths_of_a_grey_backbone() -> None:
    backbone = nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert cgh.HypercolumnExtractor(backbone, ["0"]).widths() == (8, {"hypercolumn": 8})


@pytest.mark.parametrize(
    ("name", "layers", "width"),
    [
        ("resnet18", ["layer3", "layer4"], 512),
        ("convnext_tiny", ["features.5", "features.7"], 768),
        ("efficientnet_b0", ["features.5", "features.8"], 1280),
        ("regnet_y_400mf", ["trunk_output.block3", "trunk_output.block4"], 440),
        ("mobilenet_v3_small", ["features.8", "features.12"], 576),
        ("densenet121", ["features.denseblock3", "features.denseblock4"], 1024),
    ],
)
def test_torchvision_classifiers_are_taken_off(name: str, layers: list[str], width: int) -> None:
    features = cgh.HypercolumnExtractor(torchvision.models.get_model(name), layers)
    assert features.widths((3, 64, 64)).pooled == width


def test_a_subclass_of_a_torchvision_model_counts_as_one() -> None:
    class Mine(torchvision.models.ResNet):
        pass

    backbone = Mine(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    remove_classifier(backbone)
    assert isinstance(backbone.fc, nn.Identity)


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


@pytest.mark.parametrize(
    ("name", "layer", "width"),
    [("resnet18", "layer4", 512), ("squeezenet1_1", "features", 512), ("mobilenet_v3_small", "features", 576)],
)
def test_a_classifier_inside_a_module_of_ones_own_is_no_feature(name: str, layer: str, width: int) -> None:
    network = torchvision.models.get_model(name)
    extractor = cgh.HypercolumnExtractor(Wrapped(network), [f"network.{layer}"])
    with pytest.raises(ValueError, match=r"gives what 'network' in it gives, a \w+ with its classifier on"):
        extractor.widths((3, 64, 64))
    for _ in range(2):  # there is nothing left to take off the second time
        remove_classifier(network)
        assert extractor.widths((3, 64, 64)).pooled == width


def test_a_classifier_that_is_not_run_is_no_matter() -> None:
    class Maps(Wrapped):
        def forward(self, images: Tensor) -> Tensor:
            return self.network.layer1(self.network.bn1(self.network.conv1(images))).mean((2, 3))

    extractor = cgh.HypercolumnExtractor(Maps(torchvision.models.resnet18()), ["network.layer1"])
    assert extractor.widths((3, 64, 64)).pooled == 64


def test_timm_classifiers_are_taken_off(images: Tensor) -> None:
    f = cgh.HypercolumnExtractor(timm.create_model("resnet18"), ["layer3", "layer4"])(images)
    assert (f.pooled.shape, f.hypercolumn.shape) == ((2, 512), (2, 768, 2, 2))


def test_other_modules_keep_theirs() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

    backbone = Mine()
    remove_classifier(backbone)
    assert isinstance(backbone.fc, nn.Linear)


def test_a_missing_layer_lists_close_names() -> None:
    with pytest.raises(ValueError, match=r"ResNet.* no layer 'layer5'; close names: .*layer4"):
        cgh.HypercolumnExtractor(small_backbone(), ["layer5"])


def test_bad_layers() -> None:
    with pytest.raises(TypeError, match=r"string 'layer4'; pass a list of names, such as \['layer4'\]"):
        cgh.HypercolumnExtractor(small_backbone(), "layer4")
    for layers in ([], ["layer4", "layer4"]):
        with pytest.raises(ValueError, match="at least one layer, each once"):
            cgh.HypercolumnExtractor(small_backbone(), layers)


def test_a_layer_that_does_not_run(images: Tensor) -> None:
    backbone = small_backbone()
    backbone.unused = nn.Conv2d(3, 8, 1)
    with pytest.raises(ValueError, match="layer 'unused' did not run"):
        cgh.HypercolumnExtractor(backbone, ["layer3", "unused"])(images)


def test_outputs_that_are_not_maps(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"layer 'fc' gave shape \(2, 512\); .*\(N, C, H, W\)"):
        cgh.HypercolumnExtractor(small_backbone(), ["fc"])(images)
    with pytest.raises(ValueError, match=r"Map\) gave shape \(2, 8, 64, 64\) for 2 images; .*nn.Flatten"):
        cgh.HypercolumnExtractor(Map(), ["conv"])(images)


def test_bad_images(features: cgh.HypercolumnExtractor, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images have shape \(3, 64, 64\); a batch is \(N, 3, H, W\)"):
        features(torch.zeros(3, 64, 64))
    with pytest.raises(TypeError, match="images are torch.uint8; make them floating point"):
        features(images.to(torch.uint8))
    with pytest.raises(ValueError, match=r"batch is empty: .*\(0, 3, 64, 64\)"):
        features(images[:0])


def test_a_backbone_that_cannot_take_the_probe_image() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30 * 30, 8))
    features = cgh.HypercolumnExtractor(backbone, ["0"])
    with pytest.raises(ValueError, match=r"failed on a \(3, 224, 224\) image: .* Pass image_shape="):
        features.widths()
    assert features.widths((3, 32, 32)) == (8, {"hypercolumn": 8})


class SharedPooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(2)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), pool)
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), pool)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images)).mean((2, 3))


def test_stages_that_share_their_last_module_have_maps_of_their_own() -> None:
    model, images = SharedPooling(), torch.randn(2, 3, 16, 16)
    extractor = cgh.HypercolumnExtractor(model, ["first"])
    assert torch.equal(extractor(images).hypercolumn, model.first(images))
    assert [layer.shape for layer in cgh.list_layers(model, 16, depth=1)] == [(8, 8, 8), (16, 4, 4)]
