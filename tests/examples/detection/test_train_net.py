"""The paper's recipes, and the trainer's errors; with detectron2 installed, whole runs of it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from torchvision.transforms.v2.functional import to_pil_image

EXAMPLE = Path(__file__).parents[3] / "examples" / "detection"
CONFIGS = EXAMPLE / "configs"
MASKS = ["coco_c4_1x", "coco_c4_2x", "coco_fpn_1x", "coco_fpn_2x"]
RECIPES = ["voc_c4_24k", *MASKS, *(f"{name}_boxes" for name in MASKS)]

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")
needs_detectron2 = pytest.mark.skipif(not importlib.util.find_spec("detectron2"), reason="detectron2 is not installed")


def merged(name: str) -> dict[str, Any]:
    """A recipe and, under it, what it builds on."""

    def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
        inner = {k: merge(below[k], v) for k, v in above.items() if isinstance(v, dict) and k in below}
        return below | above | inner

    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load((CONFIGS / name).read_text())
    base = content.pop("_BASE_", None)
    return merge(merged(base), content) if base else content


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_the_protocol_asks_of_every_recipe(recipe: str) -> None:
    config = merged(f"{recipe}.yaml")
    model = config["MODEL"]
    assert model["RESNETS"]["NORM"] == "SyncBN"
    assert model["BACKBONE"]["FREEZE_AT"] == 0
    assert model["RESNETS"]["STRIDE_IN_1X1"] is False
    assert config["INPUT"]["FORMAT"] == "RGB"
    assert [round(x / 255, 3) for x in model["PIXEL_MEAN"]] == [0.485, 0.456, 0.406]
    assert [round(x / 255, 3) for x in model["PIXEL_STD"]] == [0.229, 0.224, 0.225]
    assert config["TEST"]["PRECISE_BN"]["ENABLED"] is True
    assert config["SOLVER"]["IMS_PER_BATCH"] == 16
    assert config["SOLVER"]["BASE_LR"] == 0.02
    assert config["SOLVER"]["AMP"]["ENABLED"] is True
    assert model.get("MASK_ON", False) is (recipe in MASKS)
    if "_c4_" in recipe:
        assert model["ROI_HEADS"]["NAME"] == "Res5NormROIHeads"
    else:
        assert model["FPN"]["NORM"] == "SyncBN"
        layers = [model["ROI_BOX_HEAD"][key] for key in ("NUM_CONV", "NUM_FC", "NORM")]
        assert layers == ([0, 2, ""] if recipe.endswith("boxes") else [4, 1, "SyncBN"])


@pytest.mark.parametrize(
    ("recipe", "iterations", "steps", "train"),
    [
        ("voc_c4_24k", 24_000, [18_000, 22_000], ["voc_2007_trainval", "voc_2012_trainval"]),
        ("coco_c4_1x", 90_000, [60_000, 80_000], ["coco_2017_train"]),
        ("coco_c4_2x", 180_000, [120_000, 160_000], ["coco_2017_train"]),
        ("coco_fpn_1x", 90_000, [60_000, 80_000], ["coco_2017_train"]),
        ("coco_fpn_2x", 180_000, [120_000, 160_000], ["coco_2017_train"]),
        ("coco_c4_1x_boxes", 90_000, [60_000, 80_000], ["coco_2017_train"]),
        ("coco_c4_2x_boxes", 180_000, [120_000, 160_000], ["coco_2017_train"]),
        ("coco_fpn_1x_boxes", 90_000, [60_000, 80_000], ["coco_2017_train"]),
        ("coco_fpn_2x_boxes", 180_000, [120_000, 160_000], ["coco_2017_train"]),
    ],
)
def test_schedules_and_data(recipe: str, iterations: int, steps: list[int], train: list[str]) -> None:
    config = merged(f"{recipe}.yaml")
    assert config["SOLVER"]["MAX_ITER"] == iterations
    assert config["SOLVER"]["STEPS"] == steps
    assert config["DATASETS"]["TRAIN"] == train
    assert config["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == (20 if "voc" in recipe else 80)


def test_without_detectron2_it_says_what_to_install_and_what_does_without() -> None:
    # None in the place of a module is how Python is told that there is none.
    code = "import runpy, sys; sys.modules['detectron2'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", code, str(EXAMPLE / "train_net.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(EXAMPLE)}, cwd=EXAMPLE.parents[1]
    )
    assert done.returncode == 1
    assert "github.com/facebookresearch/detectron2" in done.stderr
    assert "finetune_torchvision.py" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """Six images of one bright square each, in both layouts; VOC's annotations lack every optional field."""
    root = tmp_path / "squares"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    names = [f"image{i}" for i in range(6)]
    coco: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "a b"}]}
    for i, name in enumerate(names):
        x, y = 10 * i + 5, 60 - 8 * i
        image = torch.full((3, 96, 128), 40, dtype=torch.uint8)
        image[:, y : y + 30, x : x + 30] = 220
        to_pil_image(image).save(root / f"JPEGImages/{name}.jpg", quality=75)
        box = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + 30}.0</xmax><ymax>{y + 30}</ymax>"
        (root / f"Annotations/{name}.xml").write_text(
            f"<annotation><size><width>128</width><height>96</height></size>"
            f"<object><name>a b</name><bndbox>{box}</bndbox></object></annotation>"
        )
        coco["images"].append({"id": i + 1, "file_name": f"{name}.jpg", "height": 96, "width": 128})
        coco["annotations"].append(
            {"id": i + 1, "image_id": i + 1, "category_id": 7, "bbox": [x, y, 30, 30], "area": 900, "iscrowd": 0}
        )
    (root / "ImageSets/Main/all.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "boxes.json").write_text(json.dumps(coco))
    return root


@pytest.fixture
def train_net(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    module = importlib.import_module("train_net")
    yield module
    for name in [
        name for name in module.DatasetCatalog.list() if name.startswith(("train", "squares_", "JPEGImages_"))
    ]:
        module.DatasetCatalog.remove(name)
        module.MetadataCatalog.remove(name)


@pytest.fixture
def weights(train_net: ModuleType, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pt")
    importlib.import_module("convert").convert(tmp_path / "resnet18.pt", tmp_path / "resnet18.pkl")
    return tmp_path / "resnet18.pkl"


def configuration(train_net: ModuleType, squares: Path, recipe: str = "voc_c4_24k", **switches: Any) -> tuple[Any, Any]:
    sources = {"train": (f"{squares}:all",), "test": (f"{squares}:all", f"{squares}/JPEGImages:{squares}/boxes.json")}
    switches = {"depth": 18, "folder": squares.parent / "run", **sources, **switches}
    config = train_net.Config(CONFIGS / f"{recipe}.yaml", **switches)
    cfg = train_net.configure(config)
    return config, cfg


@needs_detectron2
@pytest.mark.parametrize("metric", [2007, 2012])
def test_the_truth_as_prediction_has_an_average_precision_of_100(
    train_net: ModuleType, squares: Path, metric: int
) -> None:
    from detectron2.structures import Boxes, Instances

    config, cfg = configuration(train_net, squares, backbone="scratch", voc_metric=metric)
    train_net.register(config, cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
    for name in cfg.DATASETS.TEST:
        evaluator = train_net.Trainer.build_evaluator(cfg, name)
        evaluator.reset()
        for record in train_net.DatasetCatalog.get(name):
            truth = Instances((96, 128))
            truth.pred_boxes = Boxes(torch.tensor([x["bbox"] for x in record["annotations"]]))
            truth.pred_classes = torch.tensor([x["category_id"] for x in record["annotations"]])
            truth.scores = torch.ones(len(truth.pred_classes))
            evaluator.process([record], [{"instances": truth}])
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


@needs_detectron2
@pytest.mark.parametrize("recipe", ["voc_c4_24k", "coco_fpn_1x_boxes"])
def test_one_switch_keeps_trains_or_drops_the_weights(
    train_net: ModuleType, squares: Path, weights: Path, recipe: str
) -> None:
    first = {}
    for backbone in ("pretrained", "frozen", "scratch"):
        _, cfg = configuration(train_net, squares, recipe, backbone=backbone, weights=weights)
        model = train_net.Trainer.build_model(cfg)
        train_net.DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        resnet = {k: x for k, x in model.named_parameters() if ".res" in k or ".stem." in k}
        resnet = {k: x for k, x in resnet.items() if "res5.norm" not in k}
        assert {x.requires_grad for x in resnet.values()} == {backbone != "frozen"}
        first[backbone] = {k: x.detach().clone() for k, x in resnet.items() if "conv1.weight" in k}
        assert all(x.requires_grad for k, x in model.named_parameters() if k not in resnet)
    plain = torch.load(weights.with_suffix(".pt"))
    for backbone, tensors in first.items():
        for key, name in {
            "stem.conv1": "conv1",
            "res4.0.conv1": "layer3.0.conv1",
            "res5.1.conv1": "layer4.1.conv1",
        }.items():
            tensor = next(x for k, x in tensors.items() if k.endswith(f"{key}.weight"))
            assert torch.equal(tensor, plain[f"{name}.weight"]) == (backbone != "scratch")


@needs_detectron2
def test_the_c4_head_is_res5_and_a_norm(train_net: ModuleType, squares: Path, weights: Path) -> None:
    _, cfg = configuration(train_net, squares, weights=weights)
    model = train_net.Trainer.build_model(cfg).eval()
    train_net.DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    norm = model.roi_heads.res5.norm
    torch.nn.init.constant_(norm.running_mean, 0.3)
    torch.nn.init.constant_(norm.bias, 2.0)
    resnet = torchvision.models.resnet18().eval()
    resnet.load_state_dict(torch.load(weights.with_suffix(".pt")))
    maps = torch.rand(3, 256, 14, 14)
    with torch.no_grad():
        torch.testing.assert_close(model.roi_heads.res5(maps), norm(resnet.layer4(maps)))
        assert norm(maps.repeat(1, 2, 1, 1)).mean() == pytest.approx(2 + 0.5 - 0.3, abs=0.01)


@needs_detectron2
def test_synchronised_norms_make_way_on_the_cpu(
    train_net: ModuleType, squares: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_net.logger, "propagate", True)
    monkeypatch.setattr(train_net.logging.getLogger("detectron2"), "propagate", True)
    _, cfg = configuration(train_net, squares, "coco_fpn_1x_boxes", backbone="scratch")
    assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM, cfg.MODEL.DEVICE) == ("BN", "BN", "cpu")
    assert "Synchronised batch norms cannot run on the CPU" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _, cfg = configuration(train_net, squares, "coco_fpn_1x_boxes", backbone="scratch")
    assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM, cfg.MODEL.DEVICE) == ("SyncBN", "SyncBN", "cuda")


@needs_detectron2
def test_bad_switches_are_told(train_net: ModuleType, squares: Path, weights: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe .*voc_c4_24k\.yaml"):
        configuration(train_net, squares, "voc_c4_30k", weights=weights)
    with pytest.raises(ValueError, match=r"frozen needs the --weights"):
        configuration(train_net, squares, backbone="frozen")
    with pytest.raises(ValueError, match=r"resnet18\.pt is not in detectron2's format"):
        configuration(train_net, squares, weights=weights.with_suffix(".pt"))
    with pytest.raises(ValueError, match=r"--depth 34, does not fit the model:\n  missing: res2\.2\.conv1\.weight"):
        configuration(train_net, squares, weights=weights, depth=34)
    with pytest.raises(ValueError, match=r"both --train and --test"):
        train_net.register(*configuration(train_net, squares, weights=weights, test=()))
    with pytest.raises(FileNotFoundError, match=r"voc_2007_trainval is not there.*DETECTRON2_DATASETS"):
        train_net.register(*configuration(train_net, squares, weights=weights, train=(), test=()))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        train_net.main(train_net.Config(CONFIGS / "voc_c4_24k.yaml", folder=squares, resume=True))
    (squares / "last_checkpoint").touch()
    with pytest.raises(FileExistsError, match="--resume, or name another --folder"):
        train_net.main(train_net.Config(CONFIGS / "voc_c4_24k.yaml", folder=squares))


@needs_detectron2
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["voc_c4_24k", "coco_fpn_1x_boxes"])
def test_a_run_stopped_resumed_and_evaluated(train_net: ModuleType, squares: Path, weights: Path, recipe: str) -> None:
    def run(iterations: int, *more: str) -> str:
        sources = [
            "--train",
            f"{squares}:all",
            "--test",
            f"{squares}:all",
            f"{squares}/JPEGImages:{squares}/boxes.json",
        ]
        options = {
            "SOLVER.MAX_ITER": iterations,
            "SOLVER.IMS_PER_BATCH": 2,
            "INPUT.MIN_SIZE_TRAIN": [96],
            "INPUT.MIN_SIZE_TEST": 96,
            "TEST.PRECISE_BN.NUM_ITER": 2,
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
            "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
            "DATALOADER.NUM_WORKERS": 0,
        }
        words = [sys.executable, str(EXAMPLE / "train_net.py"), str(CONFIGS / f"{recipe}.yaml"), "--depth", "18", *more]
        words += ["--weights", str(weights), "--folder", str(squares.parent / "run"), *sources, "--pictures", "2"]
        words += ["--options", *(str(word) for pair in options.items() for word in pair)]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    assert "Starting training from iteration 0" in run(2)
    log = run(4, "--resume")
    assert "Starting training from iteration 2" in log
    assert log.count("copypaste: Task: bbox") == 2
    assert run(4, "--eval-only").count("copypaste: Task: bbox") == 2
    assert len(list((squares.parent / "run" / "pictures").glob("*.png"))) == 2
