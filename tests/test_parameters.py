"""What decays, and how fast each block of a backbone learns."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import cgh
from cgh.interop import build_backbone


def rates(model: nn.Module, backbone: nn.Module, decay: float = 0.5) -> dict[str, float]:
    """The learning rate of each of the backbone's parameters, where the highest is 1."""
    groups = cgh.parameter_groups(model, 1.0, layer_decay=decay)
    by_parameter = {p: group["lr"] for group in groups for p in group["params"]}
    assert by_parameter.keys() == set(model.parameters())
    return {name: by_parameter[p] for name, p in backbone.named_parameters()}


def test_rates_by_the_depth_of_a_resnet() -> None:
    backbone = torchvision.models.resnet18()
    model = cgh.CGH(backbone, dim=8, hidden_dim=16, memory_size=32)
    found = rates(model.student, backbone)
    assert found["conv1.weight"] == found["bn1.bias"] == 0.5**9
    for block in range(8):
        for part in ("conv1.weight", "bn2.bias"):
            assert found[f"layer{block // 2 + 1}.{block % 2}.{part}"] == 0.5 ** (8 - block)
    assert found["layer2.0.downsample.0.weight"] == 0.5**6
    fastest = cgh.parameter_groups(model.student, 1.0, layer_decay=0.5)[-1]
    assert fastest["lr"] == 1.0
    assert set(fastest["params"]) == set(model.student.heads.parameters())


def test_rates_by_the_depth_of_a_vision_transformer() -> None:
    backbone = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3
    )
    found = rates(backbone, backbone)
    first = ("class_token", "conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding")
    assert {found.pop(name) for name in first} == {0.5**5}
    for block in range(4):
        of_block = {name for name in found if name.startswith(f"encoder.layers.encoder_layer_{block}.")}
        assert len(of_block) == 12
        assert {found.pop(name) for name in of_block} == {0.5 ** (4 - block)}
    assert found == dict.fromkeys(["encoder.ln.weight", "encoder.ln.bias", "heads.head.weight", "heads.head.bias"], 1)


@pytest.mark.parametrize("arch", ["resnet50", "vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_rates_are_those_of_timm(arch: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=10)
    groups = pytest.importorskip("timm.optim").param_groups_layer_decay(model, layer_decay=0.5)
    theirs = {p: group["lr_scale"] for group in groups for p in group["params"]}
    for name, rate in rates(model, model).items():
        # The norm after a transformer's last block is a layer of its own in timm; here it learns as the head does.
        assert rate == (1.0 if name.startswith("norm.") else theirs[model.get_parameter(name)]), name


@pytest.mark.parametrize(
    ("arch", "blocks"),
    [("convnext_tiny", 18), ("efficientnet_b0", 16), ("mobilenet_v3_small", 11), ("regnet_y_400mf", 16)],
)
def test_every_block_of_torchvisions_has_a_rate(arch: str, blocks: int) -> None:
    backbone = build_backbone(arch)
    found = set(rates(backbone, backbone).values())
    assert {0.5**depth for depth in range(1, blocks + 2)} == found - {1.0}


def test_what_decays() -> None:
    pytest.importorskip("timm")
    backbone = build_backbone("timm/vit_tiny_patch16_224", image_size=32)
    decaying, spared = cgh.parameter_groups(backbone, 0.1, weight_decay=0.05)
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {p: name for name, p in backbone.named_parameters()}
    assert {names[p].rpartition(".")[0].rpartition(".")[2] for p in decaying["params"]} == {"proj", "qkv", "fc1", "fc2"}
    assert all(names[p].endswith(".weight") for p in decaying["params"])
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.0.norm1.weight", "blocks.0.attn.qkv.bias"} <= {
        names[p] for p in spared["params"]
    }
    (everything,) = cgh.parameter_groups(backbone, 0.1)
    assert everything["params"] == list(backbone.parameters())
    assert everything.keys() == {"params", "lr"}


def test_bad_input() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    for decay in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"layer_decay is .*; it is above 0, and up to 1"):
            cgh.parameter_groups(plain, 0.1, layer_decay=decay)
    with pytest.raises(TypeError, match=r"the model is a list; pass an nn\.Module"):
        cgh.parameter_groups([*plain.parameters()], 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layer_decay is 0\.5, and in a Sequential no blocks follow one another"):
        cgh.parameter_groups(plain, 0.1, layer_decay=0.5)


@pytest.mark.parametrize(
    ("module", "decaying"),
    [
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), {"parametrizations.weight.original1"}),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), {"parametrizations.weight.original"}),
        (nn.LayerNorm((4, 2, 2)), set()),
        (nn.Embedding(5, 4), set()),
        (nn.LSTM(3, 4), {"weight_ih_l0", "weight_hh_l0"}),
        (nn.MultiheadAttention(4, 2), {"in_proj_weight", "out_proj.weight"}),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), {"0.weight"}),
    ],
)
def test_the_weights_of_layers_decay_and_nothing_else(module: nn.Module, decaying: set[str]) -> None:
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = cgh.parameter_groups(module, 1.0, weight_decay=0.1)
    assert {names[x] for group in groups for x in group["params"] if group["weight_decay"]} == decaying
