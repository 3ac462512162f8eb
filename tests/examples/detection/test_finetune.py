"""Torchvision's Faster R-CNN on a backbone of ours: its parts, its training, and what it says of bad input."""

from __future__ import annotations

import csv
import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import cgh
from tests.distributed.processes import spawn
from tests.examples.detection import rectangles

EXAMPLE = Path(__file__).parents[3] / "examples" / "detection"

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")


@pytest.fixture
def detectors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("detectors")


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for package in ("tyro", "rich", "tensorboard", "torchmetrics", "pycocotools", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("finetune_torchvision")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A checkpoint of pre-training, in so far as it matters here."""
    torch.manual_seed(1)
    backbone = cgh.interop.resnet("resnet18")
    state = {f"student.extractor.backbone.{name}": x for name, x in backbone.state_dict().items()}
    path = tmp_path / "pretrained.pt"
    cgh.checkpoint.save({"model": state, "config": {"arch": "resnet18", "small_images": False}}, path)
    return path


def small(tmp_path: Path, **options: Any) -> dict[str, Any]:
    """Options of a run of seconds on rectangles."""
    return {
        "train": (rectangles.voc(tmp_path / "data", "train", 6),),
        "test": (rectangles.voc(tmp_path / "data", "test", 3, seed=100),),
        "folder": tmp_path / "run",
        "detector": "fpn",
        "fpn_channels": 16,
        "steps": 4,
        "batch": 2,
        "sizes": (48, 64),
        "boxes_per_image": 16,
        "proposals": 50,
        "workers": 0,
        "log_steps": 1,
        "pictures": 1,
    } | options


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("small_images", "stride"), [(False, 4), (True, 1)])
def test_the_pyramid_has_all_stages_and_anchors_of_their_size(
    detectors: ModuleType, small_images: bool, stride: int
) -> None:
    model = detectors.fpn(cgh.interop.resnet("resnet18", small_images), num_classes=3, channels=16).eval()
    maps = model.backbone(torch.randn(1, 3, 64, 64))
    strides = [stride * 2**level for level in range(5)]
    assert [tuple(x.shape) for x in maps.values()] == [(1, 16, 64 // s, 64 // s) for s in strides]
    assert model.rpn.anchor_generator.sizes == tuple((8 * s,) for s in strides)
    assert model.roi_heads.box_predictor.cls_score.out_features == 4


def test_c4_proposes_on_layer3_and_its_head_is_layer4(detectors: ModuleType) -> None:
    backbone = cgh.interop.resnet("resnet50").eval()
    model = detectors.c4(backbone, num_classes=20).eval()
    images = torch.randn(1, 3, 64, 64)
    features = cgh.HypercolumnExtractor(backbone, ["layer3"])
    assert torch.equal(model.backbone(images)["0"], features(images).hypercolumn)
    assert model.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),)
    layer4, norm, *_ = model.roi_heads.box_head
    assert layer4 is backbone.layer4
    assert isinstance(norm, torch.nn.BatchNorm2d)
    assert norm.weight.requires_grad
    assert model.roi_heads.box_roi_pool.output_size == (14, 14)
    assert model.roi_heads.box_head(torch.randn(3, 1024, 14, 14)).shape == (3, 2048)
    assert model.roi_heads.box_predictor.cls_score.out_features == 21


def test_stages_go_from_fine_to_coarse(detectors: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"the stages are .*; choose some of .*, in this order"):
        detectors.fpn(cgh.interop.resnet("resnet18"), num_classes=1, stages=("layer3", "layer2"))


def test_scratch_keeps_nothing_of_the_checkpoint(detectors: ModuleType) -> None:
    backbone = cgh.interop.resnet("resnet18")
    before = {name: x.clone() for name, x in backbone.named_parameters() if x.ndim == 4}
    after = detectors.prepare(backbone, "scratch").state_dict()
    assert not any(torch.equal(x, after[name]) for name, x in before.items())


def test_only_a_resnet_will_do(detectors: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"the backbone is a VGG; the detectors need a ResNet of torchvision\."):
        detectors.prepare(torchvision.models.vgg11(), "pretrained")


def test_a_checkpoint_of_another_network_is_refused(finetune: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "vgg.pt"
    torch.save(torchvision.models.squeezenet1_1().state_dict(), path)
    with pytest.raises(ValueError, match=r"fit none of resnet"):
        finetune.finetune(finetune.Config(**small(tmp_path, weights=path)))


@pytest.mark.parametrize("detector", ["fpn", "c4"])
def test_a_frozen_backbone_stays_as_it_is_and_a_pretrained_one_does_not(
    finetune: ModuleType, tmp_path: Path, weights: Path, detector: str
) -> None:
    before = cgh.interop.trained_backbone(weights).state_dict()
    changed = {}
    for backbone in ("frozen", "pretrained"):
        options = small(tmp_path, weights=weights, backbone=backbone, detector=detector, steps=2, pictures=0)
        run = tmp_path / backbone
        finetune.finetune(finetune.Config(**options | {"folder": run, "boxes_per_image": 4, "proposals": 4}))
        after = cgh.checkpoint.load(run / "checkpoint.pt")["model"]
        if detector == "fpn":
            names = {name: f"backbone.body.{name}" for name in before}
        else:
            names = {name: f"backbone.{name}".replace("backbone.layer4", "roi_heads.box_head.0") for name in before}
        pairs = [(x, after[names[name]]) for name, x in before.items() if "num_batches" not in name]
        assert len(pairs) == 100
        changed[backbone] = [not torch.equal(old, new) for old, new in pairs]
    assert not any(changed["frozen"])
    assert all(changed["pretrained"])


def test_a_resumed_run_is_as_one_that_never_stopped(
    finetune: ModuleType, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = small(tmp_path, weights=weights)
    finetune.finetune(finetune.Config(**options))

    asked = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "Stop", lambda: lambda: next(asked))
        assert finetune.finetune(finetune.Config(**options | {"folder": tmp_path / "stopped"})) == {}
    assert cgh.checkpoint.load(tmp_path / "stopped" / "checkpoint.pt")["step"] == 2
    finetune.finetune(finetune.Config(**options | {"folder": tmp_path / "stopped"}))

    never, resumed = (cgh.checkpoint.load(tmp_path / run / "checkpoint.pt") for run in ("run", "stopped"))
    assert never["step"] == resumed["step"] == 4
    for name, x in never["model"].items():
        assert torch.equal(x, resumed["model"][name]), name
    momenta = ([state["momentum_buffer"] for state in run["optimizer"]["state"].values()] for run in (never, resumed))
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    assert rows(tmp_path / "run") == rows(tmp_path / "stopped")


def test_another_recipe_needs_another_folder(finetune: ModuleType, tmp_path: Path, weights: Path) -> None:
    options = small(tmp_path, weights=weights, steps=1, pictures=0)
    finetune.finetune(finetune.Config(**options))
    with pytest.raises(ValueError, match=r"run holds another run: lr was 0.02 and is now 0.5. .* another --"):
        finetune.finetune(finetune.Config(**options | {"lr": 0.5}))


def test_batches_depend_on_the_seed_and_the_step_alone(finetune: ModuleType, tmp_path: Path) -> None:
    config = finetune.Config(**small(tmp_path, backbone="scratch", steps=6, batch=5))
    batches = list(finetune.Batches(10, config, start=0))
    assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == list(range(10))
    assert batches[0] + batches[1] != batches[2] + batches[3]
    assert list(finetune.Batches(10, config, start=4)) == batches[4:]
    others = [list(finetune.Batches(10, replace(config, seed=seed), start=0)) for seed in (1, 2)]
    assert batches != others[0] != others[1] != batches


def test_ranks_share_the_batch_of_one(finetune: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = finetune.Config(**small(tmp_path, backbone="scratch", steps=3, batch=4))
    whole = list(finetune.Batches(7, config, start=0))
    shares = []
    for rank in range(2):
        monkeypatch.setattr(finetune, "rank_and_world_size", lambda rank=rank: (rank, 2))
        shares.append(list(finetune.Batches(7, config, start=0)))
    for batch, a, b in zip(whole, *shares, strict=True):
        assert batch == [a[0], b[0], a[1], b[1]]


def test_the_learning_rate_rises_and_steps_down(finetune: ModuleType, tmp_path: Path) -> None:
    config = finetune.Config(**small(tmp_path, backbone="scratch", steps=24_000, batch=32))
    rates = [finetune.learning_rate(config, step) for step in (0, 49, 100, 17_999, 18_000, 21_999, 22_000)]
    assert rates == pytest.approx([0.04 / 101, 0.04 * 50 / 101, 0.04, 0.04, 0.004, 0.004, 0.0004])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "frozen"}, r"--backbone frozen needs --weights; --backbone scratch needs none"),
        ({"backbone": "scratch", "batch": 0}, r"--batch is 0; it is 1 or more"),
        ({"backbone": "scratch", "sizes": ()}, r"--sizes is \(\); give the shorter side"),
        ({"backbone": "scratch", "device": "cuda"}, r"--device cuda.* but PyTorch .* sees 0 GPU"),
        ({"backbone": "scratch", "arch": "vgg11"}, r"arch is 'vgg11'; torchvision's ResNets are"),
        ({"backbone": "scratch", "arch": "resnet18", "lr": 1e30, "warmup_steps": 0}, r"the loss of step .* lower --lr"),
    ],
)
def test_bad_options(
    finetune: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=message):
        finetune.finetune(finetune.Config(**small(tmp_path, **options)))


@pytest.mark.slow
def test_it_learns_to_detect(finetune: ModuleType, tmp_path: Path, weights: Path) -> None:
    run = tmp_path / "run"
    options = f"--folder {run} --weights {weights} --detector fpn --fpn-channels 16 --steps 90 --batch 8 --lr 0.04"
    options += " --warmup-steps 10 --sizes 64 --boxes-per-image 16 --proposals 50 --workers 0 --evaluate-steps 45"
    options += f" --train {rectangles.coco(tmp_path / 'coco', 40)} --pictures 2"
    options += f" --test {rectangles.voc(tmp_path / 'voc', 'val', 16, seed=200)}"
    finetune.main(options.split())
    half, end = (row for row in rows(run) if row["AP50"])
    assert (half["step"], end["step"]) == ("45", "90")
    assert float(end["AP50"]) > 90
    assert float(end["AP"]) == pytest.approx((float(end["AP/blue"]) + float(end["AP/red"])) / 2, rel=1e-3)
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["000-val0.png", "001-val1.png"]
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    config = json.loads((run / "config.json").read_text())
    assert (config["classes"], config["steps"], config["weight_decay"]) == (["blue", "red"], 90, 1e-4)


class ByColour(nn.Module):
    """Finds the red rectangle exactly and the blue one a little beside."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [
            {
                "boxes": torch.stack([self.box(image[2] > 0.7) + 3, self.box(image[0] > 0.7)]),
                "labels": torch.tensor([1, 2]),
                "scores": torch.tensor([0.9, 0.8]),
            }
            for image in images
        ]

    @staticmethod
    def box(found: Tensor) -> Tensor:
        y, x = found.nonzero().T
        return torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


def measure(source: str) -> dict[str, float]:
    sys.path.insert(0, str(EXAMPLE))
    finetune = importlib.import_module("finetune_torchvision")
    result: dict[str, float] = finetune.evaluate(ByColour(), finetune.read([source]), torch.device("cpu"), workers=0)
    return result


def test_where_nothing_is_to_be_found_there_is_no_precision(finetune: ModuleType, tmp_path: Path) -> None:
    source = rectangles.voc(tmp_path / "data", "test", 2)
    for path in (tmp_path / "data" / "Annotations").iterdir():
        path.write_text(path.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>"))
    assert all(map(math.isnan, measure(source).values()))


@pytest.mark.slow
def test_two_processes_measure_what_one_does(finetune: ModuleType, tmp_path: Path) -> None:
    source = rectangles.voc(tmp_path / "data", "test", 7)
    alone = measure(source)
    assert alone["AP/red"] == pytest.approx(100)
    assert 10 < alone["AP/blue"] < 90
    assert spawn(measure, 2, tmp_path, source) == [alone, alone]
