"""Backbones by name, the layers that go with each, and the errors of names that no library knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import cgh
from cgh.interop import build_backbone, default_layers
from tests.test_backbones import TABLE

pytest.importorskip("timm")

SIZES = {"timm/swin_tiny_patch4_window7_224": 224, "timm/vit_small_patch14_reg4_dinov2": 56, "maxvit_t": 224}


def documented() -> list[tuple[str, str]]:
    """The rows of the documentation's table, each with the name by which it is built and its layers."""
    rows = re.findall(r"^\| (torchvision|timm) [^|]*\| `(\w+)` \| ([^|]+) \|", TABLE.read_text(), flags=re.MULTILINE)
    prefixes = {"torchvision": "", "timm": "timm/"}
    return [(prefixes[library] + arch, layers) for library, arch, layers in rows]


@pytest.mark.parametrize(("arch", "layers"), documented() if TABLE.exists() else [])
def test_the_layers_are_those_of_the_documentation(arch: str, layers: str) -> None:
    backbone = build_backbone(arch, image_size=SIZES.get(arch, 64))
    assert ", ".join(f"`{layer}`" for layer in default_layers(backbone)) == layers


@pytest.mark.parametrize(
    "arch", ["efficientnet_v2_s", "mobilenet_v2", "mobilenet_v3_large", "densenet121", "googlenet"]
)
def test_the_layers_of_relatives_are_the_last_of_their_strides(arch: str) -> None:
    backbone = build_backbone(arch)
    table = {layer.name: layer for layer in cgh.list_layers(backbone, 64)}
    assert [table[layer].stride for layer in default_layers(backbone)] == [16, 32]


@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet18", "timm/resnet18d"])
def test_the_stem_for_small_images_keeps_their_size(arch: str) -> None:
    features = cgh.HypercolumnExtractor(build_backbone(arch, small_images=True), ["layer1"])
    assert features(torch.randn(2, 3, 32, 32)).hypercolumn.shape == (2, 64, 32, 32)


def test_a_transformer_is_built_for_the_size_of_its_images_and_takes_others() -> None:
    backbone = build_backbone("timm/vit_tiny_patch16_224", image_size=32)
    assert backbone.get_parameter("pos_embed").shape == (1, 5, 192)
    assert backbone(torch.randn(2, 3, 48, 48)).shape == (2, 192), "as multi-crop's views"
    assert build_backbone("vit_b_16", image_size=32).get_parameter("encoder.pos_embedding").shape == (1, 5, 768)


@pytest.mark.parametrize("arch", ["convnext_tiny", "timm/convnext_atto", "timm/vit_tiny_patch16_224"])
def test_blocks_are_left_out_in_the_student_alone(arch: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(arch, image_size=32, drop_path=0.9)
    for name, scale in backbone.named_parameters():
        if "gamma" in name or "layer_scale" in name:
            nn.init.ones_(scale)  # ConvNeXt's blocks start as nearly nothing
    teacher = cgh.EMATeacher(backbone)
    images = torch.randn(2, 3, 32, 32)
    assert backbone.training
    assert teacher.training
    assert not torch.equal(backbone(images), backbone(images))
    torch.testing.assert_close(teacher(images), backbone.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet19", "arch is 'resnet19'.*close names: .*resnet18"),
        ("timm/convnext_ato", "close names: .*timm/convnext_atto"),
        (
            "vit_tiny_patch16_224",
            "no classifier of torchvision, and timm's begin with 'timm/'; close names: timm/vit_tiny_pa",
        ),
        ("timm/resnet5", "which timm does not have; close names: timm/resnet50, "),
        ("timm/swin_t", "which timm does not have; close names: swin_t, "),
        ("vit_tiny", "close names: timm/vit_tiny_patch16_224, "),
        ("ResNet50", "close names: resnet50, "),
        ("", "such names are resnet50"),
        ("squeezenet1_0", "no classifier of torchvision"),
        (
            "timm/test_vit.nothing",
            "no test_vit of the name 'nothing'; the architecture is timm/test_vit, and its weights",
        ),
    ],
)
def test_a_name_that_no_library_knows(arch: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(arch)


def test_options_that_an_architecture_has_not() -> None:
    with pytest.raises(ValueError, match="small_images is a stem for ResNets, and timm/convnext_atto is none"):
        build_backbone("timm/convnext_atto", small_images=True)
    with pytest.raises(ValueError, match="resnet18 takes no such option: .*Leave out drop_path"):
        build_backbone("resnet18", drop_path=0.1)
    with pytest.raises(ValueError, match="vit_b_16 cannot be built for images of 33 pixels: .* patch size"):
        build_backbone("vit_b_16", image_size=33)
    with pytest.raises(ValueError, match="maxvit_t cannot be built for images of 64 pixels: Input size"):
        build_backbone("maxvit_t", image_size=64)
    with pytest.raises(ValueError, match="image_size is 0; it is the side"):
        build_backbone("timm/test_vit", image_size=0)
    for arch in ("convnext_tiny", "timm/test_convnext"):
        with pytest.raises(ValueError, match=r"drop_path is 1\.5; it is a probability"):
            build_backbone(arch, drop_path=1.5)
    with pytest.raises(TypeError, match="arch is a ResNet; pass a name, such as 'resnet50'"):
        build_backbone(build_backbone("resnet18"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no layers are known for a Sequential"):
        default_layers(nn.Sequential())


@pytest.mark.parametrize("arch", ["timm/mvitv2_tiny", "timm/twins_svt_small", "timm/crossvit_tiny_240"])
def test_stages_that_timm_names_wrongly_are_to_be_named(arch: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="no layers are known for a .*list_layers"):
        default_layers(build_backbone(arch))


def test_of_a_stage_that_is_a_list_the_last_block_is_taken() -> None:
    with torch.device("meta"):
        backbone = build_backbone("timm/coat_lite_tiny")
        layers = default_layers(backbone)
        assert layers == ("serial_blocks3.1", "serial_blocks4.1")
        features = cgh.HypercolumnExtractor(backbone, layers, prefix_tokens=1)
        assert features(torch.randn(1, 3, 224, 224)).hypercolumn.shape == (1, 576, 7, 7)


@pytest.mark.parametrize("arch", ["timm/vit_tiny_patch16_224", "timm/convnext_atto", "convnext_tiny"])
def test_a_file_with_a_classifier_gives_the_backbone(arch: str, tmp_path: Path) -> None:
    from cgh.interop.architectures import create

    model = create(arch, image_size=32)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = cgh.interop.trained_backbone(tmp_path / "weights.pth", arch, image_size=32)
    cgh.hypercolumn.remove_classifier(model)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone.eval()(images), model.eval()(images), rtol=0, atol=0)
