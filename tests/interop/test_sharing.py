"""Folders that timm, transformers and this library load alike, and what a hub is sent."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import cgh
from cgh.interop import build_backbone, from_pretrained, pretrained_config, save_pretrained

pytest.importorskip("safetensors")
timm = pytest.importorskip("timm")
ARCHS = ["resnet18", "timm/vit_tiny_patch16_224", "timm/convnext_atto"]


def trained(arch: str, size: int = 32, small_images: bool = False) -> nn.Module:
    torch.manual_seed(0)
    backbone = build_backbone(arch, small_images, size)
    with torch.no_grad():
        backbone(torch.randn(4, 3, size, size))  # statistics that are not those of the start
    return backbone.eval()


@pytest.mark.parametrize("arch", ARCHS)
def test_timm_and_transformers_give_the_same_features(arch: str, tmp_path: Path) -> None:
    backbone = trained(arch)
    save_pretrained(backbone, tmp_path, arch, image_size=32, mean=(0.5, 0.4, 0.3))
    images = torch.randn(2, 3, 32, 32)
    expected = backbone(images)
    torch.testing.assert_close(from_pretrained(tmp_path).eval()(images), expected, rtol=0, atol=0)

    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert not theirs(images).any(), "its default head was not learned"
    assert timm.data.resolve_data_config(model=theirs)["mean"] == [0.5, 0.4, 0.3]
    theirs.reset_classifier(0)
    torch.testing.assert_close(theirs(images), expected, rtol=0, atol=0)

    overlay = {"file": str(tmp_path / "model.safetensors")}
    options = pretrained_config(tmp_path).get("model_args", {})
    name = arch.removeprefix("timm/")
    by_name = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    by_name.reset_classifier(0)
    torch.testing.assert_close(by_name(images), expected, rtol=0, atol=0)

    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoModel.from_pretrained(tmp_path, local_files_only=True).eval()
    torch.testing.assert_close(auto(images).pooler_output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("arch", "small_images"), [("convnext_tiny", False), ("resnet18", True)])
def test_what_timm_has_not_is_for_this_library(arch: str, small_images: bool, tmp_path: Path) -> None:
    backbone = trained(arch, small_images=small_images)
    save_pretrained(backbone, tmp_path, arch, image_size=32)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(from_pretrained(tmp_path).eval()(images), backbone(images), rtol=0, atol=0)
    assert "timm.create_model" not in (tmp_path / "README.md").read_text()


def test_a_model_of_transformers_stays_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, **sizes)).eval()
    save_pretrained(cgh.HypercolumnExtractor(model, ["layers.1"]), tmp_path, image_size=32)
    images = torch.randn(2, 3, 32, 32)
    for loaded in (from_pretrained(tmp_path), transformers.AutoModel.from_pretrained(tmp_path, local_files_only=True)):
        torch.testing.assert_close(loaded.eval()(images).pooler_output, model(images).pooler_output)


@pytest.mark.parametrize("layers", [["layer3", "layer4"], {"shallow": ["layer2"], "deep": ["layer3", "layer4"]}])
def test_the_students_heads_go_along(layers: Any, tmp_path: Path) -> None:
    temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.05}
    model = cgh.CGH(build_backbone("resnet18"), layers, dim=8, hidden_dim=24, memory_size=32, **temperatures)
    save_pretrained(model, tmp_path, heads=True)
    loaded = from_pretrained(tmp_path, heads=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded.eval()(images), model.student.eval()(images), rtol=0, atol=0)
    assert from_pretrained(tmp_path)(images).shape == (2, 512)
    (tmp_path / "bare").mkdir()
    save_pretrained(model, tmp_path / "bare")
    with pytest.raises(ValueError, match="has no heads; save_pretrained"):
        from_pretrained(tmp_path / "bare", heads=True)
    with pytest.raises(ValueError, match="a ResNet has none"):
        save_pretrained(build_backbone("resnet18"), tmp_path, heads=True)


def test_a_folder_that_does_not_fit(tmp_path: Path) -> None:
    save_pretrained(trained("resnet18"), tmp_path)
    with pytest.raises(
        ValueError, match=r"does not fit the model:\s+missing: layer1\.2\.conv1\.weight \(64, 64, 3, 3\)"
    ):
        from_pretrained(tmp_path, arch="resnet34")
    config = pretrained_config(tmp_path)
    config["cgh"]["arch"] = "resnet19"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="arch is 'resnet19'.*close names: .*resnet18"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no architecture"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no config.json; name a folder that save_pretrained wrote"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="misshapen: layer1.0.conv1.weight is"):
        save_pretrained(trained("resnet18"), tmp_path, "resnet50")
    with pytest.raises(ValueError, match="is no ResNet of torchvision; name it: arch='mobilenet_v2'"):
        save_pretrained(nn.Linear(2, 2), tmp_path)
    for mean, std in (([0.5], [0.5]), ([0.5] * 3, [0.0] * 3)):
        with pytest.raises(ValueError, match="each is of three channels in 0 to 1"):
            save_pretrained(trained("resnet18"), tmp_path, mean=mean, std=std)


def test_the_size_is_that_of_the_backbone_and_the_mean_may_be_an_array(tmp_path: Path) -> None:
    save_pretrained(build_backbone("timm/test_vit", image_size=64), tmp_path, mean=torch.zeros(3).numpy())
    about = pretrained_config(tmp_path)["cgh"]
    assert (about["image_size"], about["mean"]) == (64, [0.0] * 3)
    assert from_pretrained(tmp_path)(torch.randn(2, 3, 64, 64)).shape == (2, 64)


class Code:
    def __reduce__(self) -> Any:
        return (print, ("ran",))


def test_weights_that_hold_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(trained("resnet18"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match="is no safetensors file"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a checkpoint of plain data"):
        from_pretrained(tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_timms_own_folders_are_read(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=3).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    images = torch.randn(2, 3, 32, 32)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(from_pretrained(tmp_path).eval()(images), expected)


def test_the_card_says_what_was_trained_and_found(tmp_path: Path) -> None:
    config = {
        "arch": "resnet18",
        "lr": 0.05,
        "layers": ["layer3", "layer4"],
        "folder": "/home/me",
        "data": {"root": "/x"},
    }
    figures = {"knn": {"20 neighbours": {"top1": 61.25}}}
    save_pretrained(trained("resnet18"), tmp_path, config=config, figures=figures)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    for row in ("| knn.20 neighbours.top1 | 61.25 |", "| lr | 0.05 |", "| layers | layer3 layer4 |"):
        assert row in card.splitlines()
    assert "/home/me" not in card
    assert "/x" not in card


@pytest.mark.parametrize(
    "backbone",
    [
        torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]),
        timm.create_model("resnet18", num_classes=0, act_layer=nn.SiLU),
        timm.create_model("resnet18", num_classes=0, global_pool="max"),
    ],
    ids=["dilation", "activation", "pooling"],
)
def test_a_network_whose_tensors_do_not_show_its_options(backbone: nn.Module, tmp_path: Path) -> None:
    if isinstance(backbone, torchvision.models.ResNet):
        cgh.hypercolumn.remove_classifier(backbone)
    with pytest.raises(ValueError, match="gives other features than the backbone, off by"):
        cgh.interop.save_pretrained(backbone, tmp_path)
    assert not list(tmp_path.iterdir())


def test_heads_of_an_earlier_model_go(tmp_path: Path) -> None:
    features = cgh.HypercolumnExtractor(cgh.interop.build_backbone("resnet18"), ["layer4"])
    student = cgh.ContextEncoder(features, dim=4, hidden_dim=8)
    cgh.interop.save_pretrained(student, tmp_path, heads=True)
    cgh.interop.save_pretrained(student, tmp_path)
    assert not (tmp_path / "heads.safetensors").exists()


@pytest.mark.parametrize(("mean", "std"), [((124, 116, 104), (1, 1, 1)), ((0, 0, 0), (float("nan"), 1, 1))])
def test_a_mean_or_deviation_that_images_cannot_have(
    mean: Sequence[float], std: Sequence[float], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="each is of three channels in 0 to 1"):
        cgh.interop.save_pretrained(cgh.interop.build_backbone("resnet18"), tmp_path, mean=mean, std=std)
