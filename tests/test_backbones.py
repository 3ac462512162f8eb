"""The whole method trains on each family of the table in docs/backbones.md, and the layers named there are right."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

import cgh

TABLE = Path(__file__).parents[1] / "docs" / "backbones.md"


class Family(NamedTuple):
    build: Callable[[], nn.Module]
    layers: list[str]
    channels: int
    stride: int
    size: int = 64
    options: dict[str, Any] = {}  # noqa: RUF012  # a tuple's default, never written to


def tv(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, **options)


def in_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, **options)


def hf(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{name}Config")(**options)
        return getattr(transformers, f"{name}Model")(config)

    return build


def small_swin() -> nn.Module:
    options = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": [2, 2]}
    return torchvision.models.SwinTransformer(patch_size=[4, 4], **options)


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(64, 16, num_layers=12, num_heads=2, hidden_dim=32, mlp_dim=64)


def small_maxvit() -> nn.Module:
    return torchvision.models.MaxVit((64, 64), 8, 2, [8, 8, 16, 24], [1, 1, 1, 1], 8, 0.0)


STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
TOKENS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES = {
    "torchvision ResNet": Family(tv("resnet18"), ["layer3", "layer4"], 768, 32),
    "torchvision ConvNeXt": Family(tv("convnext_tiny"), ["features.5", "features.7"], 1152, 32),
    "torchvision EfficientNet": Family(tv("efficientnet_b0"), ["features.5", "features.8"], 1392, 32),
    "torchvision RegNet": Family(tv("regnet_y_400mf"), ["trunk_output.block3", "trunk_output.block4"], 648, 32),
    "torchvision MobileNetV3": Family(tv("mobilenet_v3_small"), ["features.8", "features.12"], 624, 32),
    "torchvision Swin": Family(small_swin, ["features.5", "features.7"], 192, 32),
    "torchvision MaxVit": Family(small_maxvit, ["blocks.2", "blocks.3"], 40, 32),
    "torchvision GoogLeNet": Family(
        tv("googlenet", weights=None, init_weights=False), ["inception4e", "inception5b"], 1856, 32
    ),
    "torchvision ViT": Family(small_vit, ["encoder.layers.encoder_layer_7", "encoder.layers.encoder_layer_11"], 64, 16),
    "timm ResNet": Family(in_timm("resnet18"), ["layer3", "layer4"], 768, 32),
    "timm ConvNeXt": Family(in_timm("convnext_atto"), ["stages.2", "stages.3"], 480, 32),
    "timm EfficientNet": Family(in_timm("efficientnet_b0"), ["blocks.4", "blocks.6"], 432, 32),
    "timm RegNet": Family(in_timm("regnety_002"), ["s3", "s4"], 520, 32),
    "timm MobileNetV3": Family(in_timm("mobilenetv3_small_050"), ["blocks.3", "blocks.5"], 312, 32),
    "timm Swin": Family(
        in_timm("swin_tiny_patch4_window7_224", img_size=64, window_size=2), ["layers.2", "layers.3"], 1152, 32
    ),
    "timm ViT": Family(in_timm("vit_tiny_patch16_224", img_size=64), ["blocks.7", "blocks.11"], 384, 16),
    "timm DINOv2 with registers": Family(
        in_timm("vit_small_patch14_reg4_dinov2", img_size=56), ["blocks.7", "blocks.11"], 768, 14, 56
    ),
    "Hugging Face ResNet": Family(
        hf("ResNet", embedding_size=8, layer_type="basic", **STAGES), ["encoder.stages.2", "encoder.stages.3"], 56, 32
    ),
    "Hugging Face ConvNeXt": Family(hf("ConvNext", **STAGES), ["encoder.stages.2", "encoder.stages.3"], 56, 32),
    "Hugging Face RegNet": Family(
        hf("RegNet", embedding_size=8, groups_width=8, **STAGES), ["encoder.stages.2", "encoder.stages.3"], 56, 32
    ),
    "Hugging Face Swin": Family(
        hf("Swin", embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], image_size=64, window_size=2),
        ["encoder.layers.1", "encoder.layers.3"],
        192,
        32,
        options={"layouts": "NLC"},
    ),
    "Hugging Face ViT": Family(hf("ViT", image_size=64, **TOKENS), ["layers.2", "layers.3"], 64, 16),
    "Hugging Face DeiT": Family(hf("DeiT", image_size=64, **TOKENS), ["layers.2", "layers.3"], 64, 16),
    "Hugging Face DINOv2 with registers": Family(
        hf("Dinov2WithRegisters", image_size=56, patch_size=14, hidden_size=32, num_attention_heads=2),
        ["encoder.layer.7", "encoder.layer.11"],
        64,
        14,
        56,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_method(name: str) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    extractor = cgh.HypercolumnExtractor(family.build(), family.layers, **family.options)
    strong, weak = torch.randn(2, 4, 3, family.size, family.size)
    side = family.size // family.stride
    assert extractor(strong).hypercolumn.shape == (4, family.channels, side, side)

    model = cgh.CGH(extractor, dim=16, hidden_dim=32, memory_size=32, image_shape=(3, family.size, family.size))
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    first = next(iter(model.student.extractor.backbone.parameters()))
    before = first.detach().clone()
    output = model(strong, weak)
    output.loss.backward()
    optimizer.step()
    model.update(output)
    assert torch.isfinite(output.loss)
    assert not torch.equal(first, before), "the loss reaches the first layer"
    assert model.memory.pointer == 4


@pytest.mark.skipif(not TABLE.exists(), reason="the documentation is not here")
def test_the_documentation_has_every_family_with_its_layers() -> None:
    rows = dict(re.findall(r"^\| ([^|]+?) \|[^|]*\| (`[^|]+`) \|", TABLE.read_text(), flags=re.MULTILINE))
    assert rows == {name: ", ".join(f"`{layer}`" for layer in f.layers) for name, f in FAMILIES.items()}


class Tokens(nn.Module):
    """A transformer's shapes without its arithmetic: patches of 8 pixels in a row, after `prefix` tokens."""

    def __init__(self, prefix: int, declared: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, kernel_size=8, stride=8)
        self.tokens = nn.Identity()
        self.prefix = prefix
        if declared:
            self.cls_token = nn.Parameter(torch.zeros(1, prefix, 8))

    def forward(self, images: Tensor) -> Tensor:
        grid = self.patches(images).flatten(2).transpose(1, 2)
        tokens = self.tokens(torch.cat([grid.new_full((len(grid), self.prefix, 8), 1e6), grid], dim=1))
        return tokens[:, self.prefix :].mean(1)


@pytest.mark.parametrize("size", [(32, 32), (16, 40), (40, 16)])
@pytest.mark.parametrize(("declared", "options"), [(True, {}), (False, {"prefix_tokens": 5})])
def test_tokens_become_the_grid_that_they_came_from(
    size: tuple[int, int], declared: bool, options: dict[str, int]
) -> None:
    backbone = Tokens(prefix=5, declared=declared)
    images = torch.randn(2, 3, *size)
    features = cgh.HypercolumnExtractor(backbone, ["tokens"], **options)
    torch.testing.assert_close(features(images).hypercolumn, backbone.patches(images))


def test_tokens_without_a_known_prefix_are_never_guessed() -> None:
    # Nine tokens are a 3 x 3 grid, and also a 2 x 2 grid after five register tokens.
    features = cgh.HypercolumnExtractor(Tokens(prefix=5, declared=False), ["tokens"])
    with pytest.raises(ValueError, match=r"gave shape \(2, 9, 8\): 9 tokens.*Pass prefix_tokens="):
        features(torch.randn(2, 3, 16, 16))


def test_tokens_that_form_no_grid_of_the_images_are_refused() -> None:
    features = cgh.HypercolumnExtractor(Tokens(prefix=5, declared=False), ["tokens"], prefix_tokens=1)
    with pytest.raises(ValueError, match=r"21 tokens, less 1 prefix tokens, .* 32 x 32 images"):
        features(torch.randn(2, 3, 32, 32))


class ChannelsLast(nn.Module):
    """A map `(N, H, W, C)` beside the same map `(N, C, H, W)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, kernel_size=4, stride=4)
        self.last = nn.LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images).permute(0, 2, 3, 1)).mean((1, 2))


@pytest.mark.parametrize("size", [(16, 16), (16, 28), (30, 17)])
def test_channels_last_is_recognised(size: tuple[int, int]) -> None:
    backbone = ChannelsLast(channels=10)
    images = torch.randn(2, 3, *size)
    first = backbone.first(images)
    expected = nn.functional.layer_norm(first.permute(0, 2, 3, 1), (10,)).permute(0, 3, 1, 2)
    hypercolumn = cgh.HypercolumnExtractor(backbone, ["first", "last"])(images).hypercolumn
    torch.testing.assert_close(hypercolumn, torch.cat([first, expected], dim=1))


def test_a_map_that_may_be_either_has_to_be_named() -> None:
    images = torch.randn(2, 3, 32, 32)  # eight channels on a map of 8 x 8
    backbone = ChannelsLast(channels=8)
    with pytest.raises(ValueError, match=r"gave shape \(2, 8, 8, 8\) .* layouts=\{'last': 'NCHW'\} or 'NHWC'"):
        cgh.HypercolumnExtractor(backbone, ["last"])(images)
    hypercolumn = cgh.HypercolumnExtractor(backbone, ["last"], layouts={"last": "NHWC"})(images).hypercolumn
    torch.testing.assert_close(hypercolumn.mean((2, 3)), backbone(images))
    # A convolution takes and gives (N, C, H, W), whatever its sides.
    torch.testing.assert_close(
        cgh.HypercolumnExtractor(backbone, ["first"])(images).hypercolumn, backbone.first(images)
    )


@pytest.mark.parametrize("layouts", [{"layer3": "NHWC"}, {"layer4": "CHW"}, "nchw"])
def test_layouts_of_unknown_layers_or_names_are_refused(layouts: Any) -> None:
    with pytest.raises(ValueError, match="layouts says"):
        cgh.HypercolumnExtractor(torchvision.models.resnet18(), ["layer4"], layouts=layouts)


def test_a_layer_that_gives_neither_map_nor_tokens_is_refused() -> None:
    features = cgh.HypercolumnExtractor(small_vit(), ["heads"])
    for size in (64.0, 0, (64, 64, 3)):
        with pytest.raises(ValueError, match=r"image_size is .*; give one side, or \(height, width\)"):
            cgh.list_layers(nn.Conv2d(3, 8, 3), size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layer 'heads' gave shape \(2, 32\);.*list_layers"):
        features(torch.randn(2, 3, 64, 64))


def test_a_model_output_without_a_pooled_feature_is_refused() -> None:
    model = FAMILIES["Hugging Face ViT"].build()
    model.pooler = None
    with pytest.raises(ValueError, match="it must give a pooled feature"):
        cgh.HypercolumnExtractor(model, ["layers.3"])(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("name", ["torchvision Swin", "torchvision ViT"])
def test_copies_pickles_and_compiles(name: str) -> None:
    family = FAMILIES[name]
    extractor = cgh.HypercolumnExtractor(family.build(), family.layers).eval()
    images = torch.randn(2, 3, family.size, family.size)
    expected = extractor(images)
    for twin in (
        copy.deepcopy(extractor),
        pickle.loads(pickle.dumps(extractor)),
        torch.compile(extractor, fullgraph=True, backend="eager"),
    ):
        torch.testing.assert_close(twin(images).hypercolumn, expected.hypercolumn)
    assert not extractor._slots


def test_several_hypercolumns_from_one_pass() -> None:
    backbone = torchvision.models.resnet18().eval()
    layers = {"shallow": ["layer1", "layer2"], "deep": ["layer2", "layer4"]}
    images = torch.randn(2, 3, 64, 64)
    features = cgh.HypercolumnExtractor(backbone, layers)(images)
    for name, names in layers.items():
        alone = cgh.HypercolumnExtractor(copy.deepcopy(backbone), names)(images)
        torch.testing.assert_close(features.hypercolumns[name], alone.hypercolumn)
        torch.testing.assert_close(features.pooled, alone.pooled)
    with pytest.raises(ValueError, match=r"several hypercolumns, \['shallow', 'deep'\]"):
        _ = features.hypercolumn


def test_a_hypercolumn_may_not_take_the_name_of_the_pooled_feature() -> None:
    with pytest.raises(ValueError, match="none 'global'"):
        cgh.HypercolumnExtractor(torchvision.models.resnet18(), {"global": ["layer4"]})


def test_layers_of_an_extractor_are_not_named_twice() -> None:
    extractor = cgh.HypercolumnExtractor(torchvision.models.resnet18(), ["layer4"])
    with pytest.raises(ValueError, match=r"the extractor has its own: \['layer4'\]"):
        cgh.CGH(extractor, ["layer3"])


@pytest.mark.parametrize("name", FAMILIES)
def test_list_layers_has_what_the_extractor_takes(name: str) -> None:
    family = FAMILIES[name]
    rows = {row.name: row for row in cgh.list_layers(family.build(), family.size)}
    last = rows[family.layers[-1]]
    if family.options:
        assert last.layout is None, "what the list is not sure of is what the user names"
    else:
        assert last.stride == family.stride
        assert sum(rows[layer].shape[0] for layer in family.layers) == family.channels


def test_list_layers_leaves_the_model_as_it_was() -> None:
    model = torchvision.models.resnet18().train()
    model.layer1.eval()
    table = cgh.list_layers(model, (64, 96), depth=1)
    assert str(table).splitlines()[-2].split() == ["layer4", "512", "x", "2", "x", "3", "32", "NCHW"]
    assert model.training
    assert not model.layer1.training
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"VisionTransformer failed on an image of 32 x 32"):
        cgh.list_layers(small_vit(), 32)


@pytest.mark.parametrize(("name", "layers"), [("resnet18", ["layer3", "layer4"]), ("convnext_atto", ["stages.3"])])
def test_timms_gradient_checkpointing_changes_no_feature_and_no_gradient(name: str, layers: list[str]) -> None:
    timm = pytest.importorskip("timm")
    images, results = torch.randn(4, 3, 64, 64), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = timm.create_model(name)
        backbone.set_grad_checkpointing(checkpointing)
        features = cgh.HypercolumnExtractor(backbone, layers)(images)
        (features.pooled.square().sum() + features.hypercolumn.square().mean()).backward()
        gradients = {key: p.grad for key, p in backbone.named_parameters() if p.grad is not None}
        results.append((features, gradients))
    (plain, gradients), (checkpointed, others) = results
    torch.testing.assert_close(checkpointed.pooled, plain.pooled)
    torch.testing.assert_close(checkpointed.hypercolumn, plain.hypercolumn)
    assert gradients.keys() == others.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())
