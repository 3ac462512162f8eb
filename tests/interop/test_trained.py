"""A trained ResNet out of a run's checkpoint, the reference's and torchvision's files."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import cgh
from cgh.interop import reference, resnet, trained_backbone


def small_method(arch: str = "resnet18", small_images: bool = True) -> cgh.CGH:
    backbone = resnet(arch, small_images)
    return cgh.CGH(backbone, dim=8, hidden_dim=16, memory_size=32, image_shape=(3, 32, 32))


def assert_same(loaded: nn.Module, backbone: nn.Module) -> None:
    torch.testing.assert_close(loaded.state_dict(), backbone.state_dict(), rtol=0, atol=0)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.eval()(images), backbone.eval()(images), rtol=0, atol=0)


def test_a_runs_checkpoint_says_its_architecture(tmp_path: Path) -> None:
    model = small_method()
    config = {"arch": "resnet18", "small_images": True, "layers": ["layer3", "layer4"], "dim": 8}
    cgh.checkpoint.save({"model": model.state_dict(), "epoch": 3, "config": config}, tmp_path / "checkpoint.pt")
    assert_same(trained_backbone(tmp_path / "checkpoint.pt"), model.student.extractor.backbone)
    teacher = trained_backbone(tmp_path / "checkpoint.pt", encoder_key="teacher.encoder.extractor.backbone")
    assert_same(teacher, model.teacher.encoder.extractor.backbone)


@pytest.mark.parametrize(
    ("entry", "module", "small_images"), [("net", "module.", False), ("state_dict", "", True), (None, "module.", True)]
)
def test_the_references_checkpoints(entry: str | None, module: str, small_images: bool, tmp_path: Path) -> None:
    model = small_method(small_images=small_images)
    tensors = {f"{module}{key}": x for key, x in reference.state_dict(model).items()}
    torch.save({"arch": "resnet18", "epoch": 1, entry: tensors} if entry else tensors, tmp_path / "ckpt.pth.tar")
    assert_same(trained_backbone(tmp_path / "ckpt.pth.tar"), model.student.extractor.backbone)
    keys = {"checkpoint_key": entry, "encoder_key": "encoder_k"}
    assert_same(trained_backbone(tmp_path / "ckpt.pth.tar", **keys), model.teacher.encoder.extractor.backbone)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvisions_weights_fit_one_architecture(arch: str, suffix: str, tmp_path: Path) -> None:
    model = torchvision.models.get_model(arch)
    state = model.state_dict()
    if suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "weights.safetensors")
    else:  # as torchvision's older files: no count of batches
        state = {key: x for key, x in state.items() if not key.endswith("num_batches_tracked")}
        torch.save(state, tmp_path / "weights.pth")
    model.fc = nn.Identity()
    assert_same(trained_backbone(tmp_path / f"weights{suffix}"), model)


def test_every_tensor_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = resnet("resnet18").state_dict()
    state["extra"] = state.pop("bn1.bias")
    torch.save(state, path)
    with pytest.raises(ValueError, match="does not fit") as error:
        trained_backbone(path, "resnet18", small_images=True)
    assert str(error.value).splitlines() == [
        f"{path} does not fit the model:",
        "  missing: bn1.bias (64,)",
        "  unexpected: extra (64,)",
        "  misshapen: conv1.weight is (64, 3, 7, 7), the model's is (64, 3, 3, 3)",
    ]
    with pytest.raises(ValueError, match=r"missing: layer1\.2\.conv1\.weight \(64, 64, 3, 3\)"):
        trained_backbone(path, "resnet34")
    with pytest.raises(ValueError, match="fit none of resnet101, .* name the one that it should be"):
        trained_backbone(path)


def test_keys_and_names_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pth"
    torch.save({"net": reference.state_dict(small_method()), "optimizer": {}}, path)
    with pytest.raises(ValueError, match=r"no tensors under 'model'; its entries with tensors are \['net', 'opti"):
        trained_backbone(path, checkpoint_key="model")
    with pytest.raises(ValueError, match=r"begin with 'encoder\.'; they begin with \['center', 'center_hyper', 'enc"):
        trained_backbone(path, encoder_key="encoder")
    with pytest.raises(ValueError, match="'resnet19'; torchvision's ResNets are resnet101, "):
        resnet("resnet19")
    with pytest.raises(FileNotFoundError):
        trained_backbone(tmp_path / "nothing.pth")


PREFIXES = [
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model._orig_mod.module.student.extractor.backbone.",
    "_orig_mod.student._orig_mod.extractor.backbone.",
    "model.student.extractor.backbone.",
    "module.backbone.",
    "encoder.",
    "module.encoder_q.",
    "model._fsdp_wrapped_module.backbone.",
    "trunk.network.",
]


@pytest.mark.parametrize(
    ("prefix", "entry"), [*zip(PREFIXES, [None, "model", "state_dict", "state"] * 3, strict=False)]
)
def test_a_backbone_is_found_behind_any_prefix(prefix: str, entry: str | None, tmp_path: Path) -> None:
    model = resnet("resnet18")
    tensors = {prefix + key: x for key, x in model.state_dict().items()}
    beside = prefix.rpartition(".")[0].rpartition(".")[0]
    tensors |= {f"{beside}.projection_head.0.weight".lstrip("."): torch.ones(2, 2), f"{prefix}fc.weight": torch.ones(2)}
    content = {entry: tensors, "epoch": 3, "best": np.float64(60), "args": Namespace(lr=1)} if entry else tensors
    torch.save(content, tmp_path / "file.pth")
    assert_same(trained_backbone(tmp_path / "file.pth", arch="resnet18"), model)
    if entry is None:
        assert_same(trained_backbone(tmp_path / "file.pth"), model)


def test_of_student_and_teacher_one_has_to_be_named(tmp_path: Path) -> None:
    student, teacher = resnet("resnet18"), resnet("resnet18")
    content = {
        "student": {f"module.backbone.{key}": x for key, x in student.state_dict().items()},
        "teacher": {f"backbone.{key}": x for key, x in teacher.state_dict().items()},
        "epoch": 3,
    }
    torch.save(content, tmp_path / "dino.pth")
    with pytest.raises(ValueError, match=r"several encoders .*encoder_key='student.backbone' or 'teacher.backbone'"):
        trained_backbone(tmp_path / "dino.pth")
    assert_same(trained_backbone(tmp_path / "dino.pth", encoder_key="student.backbone"), student)
    assert_same(trained_backbone(tmp_path / "dino.pth", encoder_key="teacher"), teacher)
    assert_same(trained_backbone(tmp_path / "dino.pth", checkpoint_key="teacher"), teacher)


def test_of_one_model_in_two_entries_the_entry_has_to_be_named(tmp_path: Path) -> None:
    model, averaged = resnet("resnet18"), resnet("resnet18")
    torch.save({"model": model.state_dict(), "state_dict": averaged.state_dict()}, tmp_path / "both.pth")
    with pytest.raises(ValueError, match=r"fit, model\., state_dict\.; .*: checkpoint_key='model' or 'state_dict'\."):
        trained_backbone(tmp_path / "both.pth")
    assert_same(trained_backbone(tmp_path / "both.pth", checkpoint_key="state_dict"), averaged)


def test_a_file_of_other_names_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"model": {"backbone.0.weight": torch.ones(2), "head.weight": torch.ones(2)}}, tmp_path / "file.pth")
    with pytest.raises(
        ValueError, match=r"no tensor with a name of the model's.* begin with \['backbone', 'head'\], such as"
    ):
        trained_backbone(tmp_path / "file.pth", arch="resnet18")
    with pytest.raises(ValueError, match=r"its names begin with \['backbone', 'head'\], such as \['model.backbone.0"):
        trained_backbone(tmp_path / "file.pth")
