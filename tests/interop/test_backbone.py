"""A backbone leaves as its own library knows it, and comes back exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

import cgh
from cgh.evaluate import Classifier, LinearProbe
from cgh.interop import backbone_state, load_backbone, save_backbone
from tests.conftest import small_backbone, small_encoder


def timm_model() -> nn.Module:
    return pytest.importorskip("timm").create_model("convnext_atto")


def test_torchvisions_resnet50_takes_the_state_at_once() -> None:
    model = cgh.CGH(torchvision.models.resnet50(), dim=8, hidden_dim=8, memory_size=8, image_shape=(3, 64, 64)).eval()
    fresh = torchvision.models.resnet50().eval()
    fresh.load_state_dict(backbone_state(model, like=torchvision.models.resnet50()))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(fresh(images), torch.zeros(2, 1000)), "a classifier that was never trained predicts nothing"
    fresh.fc = nn.Identity()
    torch.testing.assert_close(fresh(images), model.student.extractor.pooled(images), rtol=0, atol=0)


def test_timm_takes_the_state_at_once() -> None:
    features = cgh.HypercolumnExtractor(timm_model(), ["stages.3"])
    fresh = timm_model()
    fresh.load_state_dict(backbone_state(features, like=fresh))
    bare = pytest.importorskip("timm").create_model("convnext_atto", num_classes=0)
    bare.load_state_dict(backbone_state(features))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(("build", "layer"), [(small_backbone, "layer4"), (timm_model, "stages.3")])
def test_files_round_trip_exactly(build: Callable[[], nn.Module], layer: str, suffix: str, tmp_path: Path) -> None:
    original = cgh.HypercolumnExtractor(build().to(memory_format=torch.channels_last), [layer])
    save_backbone(original, tmp_path / f"backbone{suffix}")
    twin = cgh.HypercolumnExtractor(build(), [layer])
    load_backbone(twin, tmp_path / f"backbone{suffix}")
    torch.testing.assert_close(twin.state_dict(), original.state_dict(), rtol=0, atol=0)


def test_the_state_is_a_copy_of_the_students_backbone() -> None:
    student = small_encoder()
    state = backbone_state(student)
    assert state.keys() == student.extractor.backbone.state_dict().keys()
    state["conv1.weight"].zero_()
    assert student.extractor.backbone.conv1.weight.any()


def test_everything_that_does_not_fit_is_listed_and_nothing_is_copied(tmp_path: Path) -> None:
    student = small_encoder()
    before = backbone_state(student)
    state = before | {"fc.weight": torch.zeros(10, 512), "conv1.weight": torch.zeros(64, 3, 3, 3)}
    del state["bn1.bias"]
    cgh.checkpoint.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not fit") as error:
        load_backbone(student, tmp_path / "other.pt")
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'other.pt'} does not fit the model:",
        "  missing: bn1.bias (64,)",
        "  unexpected: fc.weight (10, 512)",
        "  misshapen: conv1.weight is (64, 3, 3, 3), the model's is (64, 3, 7, 7)",
    ]
    torch.testing.assert_close(backbone_state(student), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"missing: layer1\.1\.conv1\.weight"):
        backbone_state(student, like=torchvision.models.resnet18())


def test_files_that_are_not_safetensors_or_not_there(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00\x00")
    with pytest.raises(ValueError, match="is no safetensors file, or is cut short"):
        load_backbone(small_backbone(), tmp_path / "cut.safetensors")
    for name in ("none.safetensors", "none.pt"):
        with pytest.raises(FileNotFoundError):
            load_backbone(small_backbone(), tmp_path / name)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r'needs safetensors.*pip install "cgh-ssl\[interop\]"'):
        save_backbone(small_encoder(), tmp_path / "backbone.safetensors")


def everything(encoder: cgh.ContextEncoder) -> dict[str, nn.Module]:
    """An encoder, and its backbone, in all that people put around them."""
    backbone = encoder.extractor.backbone
    model = cgh.CGH(encoder.extractor, dim=8, hidden_dim=8, memory_size=8, image_shape=(3, 64, 64))

    class Task(nn.Module):
        def __init__(self, **parts: nn.Module) -> None:
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    return {
        "probe": LinearProbe(backbone, width=512, classes=2),
        "classifier of a wrapped backbone": Classifier(nn.DataParallel(backbone), width=512, classes=2),
        "compiled": torch.compile(encoder, backend="eager"),
        "DataParallel of compiled": nn.DataParallel(torch.compile(model, backend="eager")),
        "compiled DataParallel": torch.compile(nn.DataParallel(backbone), backend="eager"),
        "teacher": cgh.EMATeacher(encoder),
        "teacher of compiled": cgh.EMATeacher(torch.compile(backbone, backend="eager")),
        "average": AveragedModel(encoder),
        "average of compiled": AveragedModel(torch.compile(backbone, backend="eager")),
        "extractor of a compiled backbone": cgh.HypercolumnExtractor(torch.compile(backbone), ["layer4"]),
        "task with a method": Task(model=model, probe=nn.Linear(2, 2)),
        "task with a compiled student, its teacher and a classifier": Task(
            student=torch.compile(encoder, backend="eager"),
            teacher=cgh.EMATeacher(encoder),
            probe=Classifier(backbone, 512, 2),
        ),
        "task with a teacher before the student": Task(teacher=cgh.EMATeacher(encoder), student=encoder),
        "task in a wrapper": nn.DataParallel(Task(inner=Task(model=model))),
    }


@pytest.mark.parametrize("name", list(everything(small_encoder())))
def test_a_backbone_has_its_own_names_in_whatever_holds_it(name: str) -> None:
    encoder = small_encoder()
    expected = backbone_state(encoder)
    model = everything(encoder)[name]
    torch.testing.assert_close(backbone_state(model), expected, rtol=0, atol=0)
    load_backbone(model, {key: torch.zeros_like(x) for key, x in expected.items()})
    assert not any(x.any() for x in backbone_state(model).values())


def test_compiled_parts_of_a_backbone_have_no_names_of_their_own() -> None:
    backbone = small_backbone()
    expected = backbone_state(backbone)
    for name in ("layer2", "layer4"):
        setattr(backbone, name, torch.compile(getattr(backbone, name), backend="eager"))
    torch.testing.assert_close(backbone_state(backbone), expected, rtol=0, atol=0)
    load_backbone(backbone, {key: torch.zeros_like(x) for key, x in expected.items()})
    assert not any(x.any() for x in backbone.state_dict().values())


def test_which_backbone_is_meant_has_to_be_sure(tmp_path: Path) -> None:
    class Task(nn.Module):
        def __init__(self, first: nn.Module, second: nn.Module) -> None:
            super().__init__()
            self.first, self.second = first, second

    with pytest.raises(ValueError, match=r"backbones is meant by a Task is not sure; pass .* one of first, .*second"):
        save_backbone(Task(small_encoder(), small_encoder()), tmp_path / "new" / "backbone.pt")
    with pytest.raises(
        ValueError, match=r"a Task has a backbone .* only in part of it; pass that part, model\.first\."
    ):
        save_backbone(Task(small_backbone(), nn.Linear(2, 2)), tmp_path / "new" / "backbone.pt")
    assert not (tmp_path / "new").exists()
    own = Task(nn.Conv2d(3, 8, 3), nn.Linear(8, 8))  # a backbone of the user's own
    assert backbone_state(own).keys() == own.state_dict().keys()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_is_replaced_when_the_new_one_is_whole(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"backbone{suffix}"
    backbone = small_backbone()
    save_backbone(backbone, path)
    before = path.read_bytes()
    backbone.conv1.weight = nn.Parameter(torch.empty(64, 3, 7, 7, device="meta"))
    with pytest.raises(Exception, match="meta"):
        save_backbone(backbone, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
