"""Backbones in detectron2's format: the right names, and in detectron2 the right maps."""

from __future__ import annotations

import importlib
import json
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import cgh
from cgh import checkpoint
from cgh.interop import reference

EXAMPLE = Path(__file__).parents[3] / "examples" / "detection"
GOLDEN = Path(__file__).parents[2] / "golden" / "detectron2_names_resnet50.json"

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("tyro")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("convert")


def trained(arch: str) -> nn.Module:
    """A ResNet with statistics and norms that are not those of the start, so that a mix-up shows."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(arch)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.2, 0.5)  # small, or 50 blocks would add up to infinity
            for x in (norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(x, 0.5, 1.5)
    return model.eval()


def test_every_name_is_detectron2s(convert: ModuleType) -> None:
    names = json.loads(GOLDEN.read_text())
    keys = [key for key in torchvision.models.resnet50().state_dict() if not key.startswith("fc.")]
    assert {key: convert.detectron2_name(key) for key in keys} == names


def test_the_file_holds_the_tensors_of_the_checkpoint(convert: ModuleType, tmp_path: Path) -> None:
    model = trained("resnet18")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    convert.convert(tmp_path / "weights.pth", tmp_path / "new" / "backbone.pkl")
    content = pickle.loads((tmp_path / "new" / "backbone.pkl").read_bytes())
    assert sorted(content) == ["__author__", "matching_heuristics", "model"]
    assert content["matching_heuristics"] is True
    state = {key: x for key, x in model.state_dict().items() if not key.startswith("fc.")}
    assert len(content["model"]) == len(state)
    for key, x in state.items():
        np.testing.assert_array_equal(content["model"][convert.detectron2_name(key)], x.numpy())
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "backbone.pkl"]


def test_a_run_the_reference_and_plain_weights_give_one_student(convert: ModuleType, tmp_path: Path) -> None:
    backbone = trained("resnet18")
    torch.save(backbone.state_dict(), tmp_path / "plain.pt")
    model = cgh.CGH(backbone, dim=8, hidden_dim=16, memory_size=16, image_shape=(3, 32, 32))
    for x in model.teacher.parameters():
        x.data += 1
    checkpoint.save({"model": model.state_dict(), "config": {"arch": "resnet18"}}, tmp_path / "run.pt")
    checkpoint.save({"net": reference.state_dict(model)}, tmp_path / "reference.pt")
    for name in ("plain", "run", "reference"):
        convert.convert(tmp_path / f"{name}.pt", tmp_path / f"{name}.pkl", arch="resnet18")
    files = [(tmp_path / f"{name}.pkl").read_bytes() for name in ("plain", "run", "reference")]
    assert files[0] == files[1] == files[2]


def test_the_stem_of_small_images_is_refused(convert: ModuleType, tmp_path: Path) -> None:
    checkpoint.save(cgh.interop.resnet("resnet18", small_images=True).state_dict(), tmp_path / "cifar.pt")
    with pytest.raises(ValueError, match=r"convolution of 3x3, .* without small_images"):
        convert.convert(tmp_path / "cifar.pt", tmp_path / "out.pkl")
    assert not (tmp_path / "out.pkl").exists()


def test_what_is_no_resnet_is_refused(convert: ModuleType, tmp_path: Path) -> None:
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "mobile.pt")
    with pytest.raises(ValueError, match=r"mobile\.pt .* fit none of resnet101, "):
        convert.convert(tmp_path / "mobile.pt", tmp_path / "out.pkl")


def test_the_ending_is_detectron2s(convert: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out\.pth; detectron2 reads this format from a file called \.pkl"):
        convert.convert(tmp_path / "plain.pt", tmp_path / "out.pth")


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_detectron2_computes_torchvisions_maps(convert: ModuleType, tmp_path: Path, arch: str) -> None:
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_resnet_backbone

    model = trained(arch)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    convert.convert(tmp_path / "weights.pth", tmp_path / "backbone.pkl")
    cfg = get_cfg()
    cfg.merge_from_file(str(EXAMPLE / "configs" / "base_c4.yaml"))
    resnet = cfg.MODEL.RESNETS
    resnet.DEPTH, resnet.NORM, resnet.OUT_FEATURES = int(arch.removeprefix("resnet")), "BN", ["res4", "res5"]
    resnet.RES2_OUT_CHANNELS = 64 if resnet.DEPTH < 50 else 256
    theirs = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    DetectionCheckpointer(theirs).load(str(tmp_path / "backbone.pkl"))
    ours = create_feature_extractor(model, {"layer3": "res4", "layer4": "res5"})
    image = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        expected, maps = ours(image), theirs(image)
    for name in ("res4", "res5"):
        assert expected[name].std() > 0
        torch.testing.assert_close(maps[name], expected[name], rtol=1e-5, atol=1e-5 * expected[name].abs().max().item())


def test_a_plain_vision_transformer_keeps_its_names(convert: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    backbone = cgh.interop.build_backbone("timm/vit_tiny_patch16_224")
    torch.save(backbone.state_dict(), tmp_path / "vit.pth")
    convert.convert(tmp_path / "vit.pth", tmp_path / "vit.pkl", arch="timm/vit_tiny_patch16_224")
    model = pickle.loads((tmp_path / "vit.pkl").read_bytes())["model"]
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    names = {f"blocks.{n}.{part}.{kind}" for n in range(12) for part in block for kind in ("weight", "bias")}
    assert model.keys() == names | {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    np.testing.assert_array_equal(model["blocks.3.attn.qkv.weight"], backbone.blocks[3].attn.qkv.weight.detach())


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("timm/convnext_atto", "detectron2 has no backbone like this ConvNeXt"),
        ("timm/vit_small_patch14_reg4_dinov2", r"the transformer has blocks\.0\.ls1\.gamma, "),
        ("timm/resnet18d", "ResNets with the usual stem"),
    ],
)
def test_backbones_that_detectron2_has_not(arch: str, message: str, convert: ModuleType) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message):
        convert.detectron2_checkpoint(cgh.interop.build_backbone(arch))
