"""Faster and Mask R-CNN on a pre-trained backbone by detectron2, as the paper transfers to VOC and COCO.

python examples/detection/convert.py runs/imagenet/checkpoint.pt runs/imagenet/backbone.pkl
python examples/detection/train_net.py examples/detection/configs/voc_c4_24k.yaml \
    --weights runs/imagenet/backbone.pkl --num-gpus 8

The configurations name detectron2's own VOC and COCO, which it looks for under $DETECTRON2_DATASETS. Any other data in
VOC or COCO layout takes their place by its folders (see `datasets.py`):

    --train BCCD:trainval --test BCCD:test --classes RBC WBC Platelets
"""

from __future__ import annotations

import itertools
import logging
import pickle
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from datasets import Annotations, read, read_image
from torch import nn

from cgh import plot
from cgh.interop.matching import check_match

sys.path.append(str(Path(__file__).parents[1] / "imagenet"))  # whose scripts end in the same way
from command import command

try:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import CfgNode, get_cfg
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.engine import DefaultTrainer, default_setup, launch
    from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
    from detectron2.layers import ShapeSpec, get_norm
    from detectron2.modeling.backbone import ResNet, build_resnet_backbone
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
    from detectron2.structures import BoxMode
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger
except ModuleNotFoundError as error:
    sys.exit(
        f"train_net.py needs detectron2 ({error}). Install it from its repository, as its INSTALL.md says:\n"
        '  pip install --no-build-isolation "git+https://github.com/facebookresearch/detectron2"\n'
        "finetune_torchvision.py, in the same folder, trains such detectors without it."
    )

logger = logging.getLogger("detectron2.train_net")


@dataclass(frozen=True)
class Config:
    """Train and evaluate Faster R-CNN in detectron2."""

    recipe: tyro.conf.Positional[Path]
    """One of configs/, or any other configuration of detectron2."""
    weights: Path | None = None
    """The pre-trained backbone that convert.py wrote."""
    backbone: Literal["pretrained", "frozen", "scratch"] = "pretrained"
    """Train on from the weights, keep them as they are, or start at random without them."""
    depth: Literal[18, 34, 50, 101, 152] = 50
    """The ResNet's."""
    train: tuple[str, ...] = ()
    """Sources to train on, ROOT:SPLIT (VOC layout) or IMAGES:FILE.json (COCO); by default the recipe's."""
    test: tuple[str, ...] = ()
    """Sources to evaluate on, each by its layout's metrics."""
    classes: tuple[str, ...] = ()
    """Their names; by default those in the training data."""
    skip_bad_boxes: bool = False
    """Leave out boxes that are outside their image or have no area."""
    voc_metric: Literal[2007, 2012] = 2012
    """Average precision in VOC layout: at eleven points as in 2007, or the area under the curve."""
    folder: Path = Path("runs/detection")
    """Of the log, the checkpoints, TensorBoard's events and the pictures."""
    pictures: int = 8
    """Test images to draw with the predictions over the ground truth."""
    seed: int = 0
    """Of the fresh weights, the order of the images and every draw."""
    resume: bool = False
    """Go on from the last checkpoint in the folder."""
    eval_only: bool = False
    """Evaluate that checkpoint, without training."""
    num_gpus: int = 1
    """Per machine. Without a GPU the CPU is used."""
    num_machines: int = 1
    """Each started by hand, with its own --machine-rank."""
    machine_rank: int = 0
    """This machine's number, from 0."""
    dist_url: str = "auto"
    """The first machine's address and a free port, tcp://HOST:PORT, where there are several."""
    options: tuple[str, ...] = ()
    """Anything else of detectron2's configuration: SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.0025"""


# detectron2 has no types, so its classes are of any type as bases.
@ROI_HEADS_REGISTRY.register()
class Res5NormROIHeads(Res5ROIHeads):  # type: ignore[misc]  # a base without types
    """The C4 head: res5 of a ResNet of any depth on each region's map, then the extra norm."""

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Module, int]:
        resnet = whole_resnet(cfg)
        channels = resnet.output_shape()["res5"].channels
        resnet.res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return resnet.res5, channels


class Trainer(DefaultTrainer):  # type: ignore[misc]  # a base without types
    """detectron2's trainer, evaluating each data set by the metrics of its layout."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        if MetadataCatalog.get(dataset_name).evaluator_type == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR, "inference")), allow_cached_coco=False)


def whole_resnet(cfg: CfgNode) -> ResNet:
    """Return the configured ResNet up to res5, wherever the detector puts its parts."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def configure(config: Config) -> CfgNode:
    """Return detectron2's configuration for the recipe, the switches and the device.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: the switches contradict each other or what is there.
    """
    if not config.recipe.is_file():
        folder = Path(__file__).with_name("configs")
        recipes = ", ".join(sorted(path.name for path in folder.glob("*_*.yaml") if not path.name.startswith("base")))
        raise FileNotFoundError(f"there is no recipe {config.recipe}; {folder} holds {recipes}.")
    cfg = get_cfg()
    cfg.merge_from_file(str(config.recipe))
    cfg.MODEL.RESNETS.DEPTH = config.depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if config.depth < 50 else 256
    cfg.MODEL.WEIGHTS = str(config.weights or "")
    cfg.OUTPUT_DIR = str(config.folder)
    cfg.SEED = config.seed
    cfg.merge_from_list(list(config.options))
    if config.backbone == "scratch":
        cfg.MODEL.WEIGHTS = ""
    elif not cfg.MODEL.WEIGHTS and not config.eval_only:
        raise ValueError(f"--backbone {config.backbone} needs the --weights that convert.py wrote.")
    elif config.weights:
        check_weights(cfg)
    if config.backbone == "frozen":
        cfg.MODEL.BACKBONE.FREEZE_AT = 5  # the stem and all four stages
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        logger.warning("PyTorch sees no GPU: training on the CPU.")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu":
        cfg.SOLVER.AMP.ENABLED = False  # detectron2 has mixed precision on GPUs alone
        if plain_norms(cfg):
            logger.warning("Synchronised batch norms cannot run on the CPU: plain ones take their place.")
    return cfg


def check_weights(cfg: CfgNode) -> None:
    """Check that the backbone's file fits, which detectron2 would only warn about, and go on at random.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is of another format or another ResNet; all that differs is listed.
    """
    path = Path(cfg.MODEL.WEIGHTS)
    if path.suffix != ".pkl":
        raise ValueError(f"--weights {path} is not in detectron2's format; write a .pkl of it by convert.py.")
    arrays = pickle.loads(path.read_bytes())["model"]  # noqa: S301 (detectron2 reads it the same way)
    saved = {key: torch.as_tensor(x) for key, x in arrays.items()}
    check_match(saved, whole_resnet(cfg).state_dict(), f"{path}, as a ResNet of --depth {cfg.MODEL.RESNETS.DEPTH},")


def plain_norms(node: CfgNode) -> bool:
    """Put a plain batch norm wherever a synchronised one is configured; say whether there was one."""
    found = False
    for key, value in node.items():
        if isinstance(value, CfgNode):
            found |= plain_norms(value)
        elif value == "SyncBN":
            node[key] = "BN"
            found = True
    return found


def register(config: Config, cfg: CfgNode) -> None:
    """Give detectron2 the data that the switches name, and the detector as many outputs as it has classes.

    Raises:
        FileNotFoundError: the recipe's data is not where detectron2 looks for it; or as `datasets.read`.
        ValueError: only one of train and test is named; or as `datasets.read`.
    """
    if not config.train and not config.test:
        for name in [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]:
            check_own_data(name)
        return
    if cfg.MODEL.MASK_ON:
        raise ValueError(
            f"--train and --test are read as boxes, but {config.recipe} learns masks; take its ..._boxes.yaml."
        )
    if not config.train or not config.test:
        raise ValueError("name both --train and --test, or neither for the recipe's own data.")
    train = read(config.train, config.classes or None, config.skip_bad_boxes)
    logger.info("Training data: %s", train)
    _register("train", train, "coco")
    names = []
    for source in config.test:
        folder, _, what = source.rpartition(":")
        test = read([source], train.classes, config.skip_bad_boxes)
        logger.info("Test data %s: %s", source, test)
        names.append(f"{Path(folder).name}_{Path(what).stem}")
        if what.endswith(".json"):
            _register(names[-1], test, "coco")
        else:
            # The evaluator reads the files itself, and wants optional fields and whole numbers in them.
            copy = config.folder / "voc" / names[-1]
            if comm.is_main_process():
                write_voc(test, copy)
            _register(names[-1], test, "pascal_voc", dirname=str(copy), split="test", year=config.voc_metric)
    cfg.DATASETS.TRAIN = ("train",)
    cfg.DATASETS.TEST = tuple(names)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(train.classes)


def check_own_data(name: str) -> None:
    """Check that one of detectron2's own data sets is there.

    Raises:
        FileNotFoundError: it is not.
    """
    metadata = MetadataCatalog.get(name).as_dict()
    for path in (metadata[key] for key in ("dirname", "json_file", "image_root") if key in metadata):
        if not Path(path).exists():
            raise FileNotFoundError(
                f"{name} is not there: no {path}. Set DETECTRON2_DATASETS to the folder of VOC2007, VOC2012 and coco, "
                "or name other folders by --train and --test."
            )


def _register(name: str, annotations: Annotations, evaluator_type: str, **metadata: Any) -> None:
    DatasetCatalog.register(name, lambda: detectron2_dicts(annotations))
    MetadataCatalog.get(name).set(thing_classes=annotations.classes, evaluator_type=evaluator_type, **metadata)


def detectron2_dicts(annotations: Annotations) -> list[dict[str, Any]]:
    """Return the records as detectron2 takes them."""
    return [
        {
            "file_name": str(record.image),
            "image_id": record.image_id if isinstance(record.image_id, int) else index,
            "height": record.height,
            "width": record.width,
            "annotations": [
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "iscrowd": int(crowd)}
                for box, label, crowd in zip(
                    record.boxes.tolist(), record.labels.tolist(), record.crowd.tolist(), strict=True
                )
            ],
        }
        for index, record in enumerate(annotations.records)
    ]


def write_voc(annotations: Annotations, root: Path) -> None:
    """Write the boxes in VOC layout, every field there, the images called by their position; the split is "test"."""
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index, record in enumerate(annotations.records):
        image = ET.Element("annotation")
        for box, label, difficult in zip(record.boxes, record.labels, record.difficult, strict=True):
            thing = ET.SubElement(image, "object")
            fields = {"name": annotations.classes[label], "pose": "Unspecified", "truncated": 0}
            for key, value in (fields | {"difficult": int(difficult)}).items():
                ET.SubElement(thing, key).text = str(value)
            left, top, right, bottom = box.round().int().tolist()
            corners = ET.SubElement(thing, "bndbox")
            for key, value in {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}.items():
                ET.SubElement(corners, key).text = str(value)
        ET.ElementTree(image).write(root / "Annotations" / f"{index}.xml")
    (root / "ImageSets/Main/test.txt").write_text("".join(f"{i}\n" for i in range(len(annotations.records))))


@torch.no_grad()
def save_pictures(cfg: CfgNode, model: nn.Module, count: int) -> None:
    """Draw the predictions over the ground truth for the first images of the first test set."""
    folder = Path(cfg.OUTPUT_DIR, "pictures")
    name = cfg.DATASETS.TEST[0]
    classes = MetadataCatalog.get(name).thing_classes
    records = DatasetCatalog.get(name)
    model.eval()
    pairs = zip(records, Trainer.build_test_loader(cfg, name), strict=False)
    for index, (record, inputs) in enumerate(itertools.islice(pairs, count)):
        found = model(inputs)[0]["instances"].to("cpu")
        truth = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in record["annotations"]]
        labels = torch.tensor([x["category_id"] for x in record["annotations"]], dtype=torch.int64)
        picture = plot.detections(
            read_image(Path(record["file_name"])),
            (found.pred_boxes.tensor, found.pred_classes, found.scores),
            (torch.tensor(truth).reshape(-1, 4), labels),
            classes,
        )
        plot.save(picture, folder / f"{index:03}-{Path(record['file_name']).stem}.png")
    logger.info("Predictions over the ground truth: %s", folder)


def train_and_evaluate(config: Config) -> None:
    """Train and evaluate, in one process of as many as there are GPUs."""
    setup_logger(str(config.folder), distributed_rank=comm.get_rank())
    cfg = configure(config)
    register(config, cfg)
    cfg.freeze()
    default_setup(cfg, config)
    if config.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=True)
        Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=config.resume)
        trainer.train()
        model = trainer.model
    if config.pictures and comm.is_main_process():
        save_pictures(cfg, model, config.pictures)


def main(config: Config) -> None:
    """Start the processes.

    Raises:
        FileNotFoundError: there is nothing to evaluate or to resume.
        FileExistsError: the folder holds another run.
        ValueError: there are fewer GPUs.
    """
    there = (config.folder / "last_checkpoint").is_file()
    if there and not config.resume and not config.eval_only:
        raise FileExistsError(f"{config.folder} holds a run; go on with it by --resume, or name another --folder.")
    if not there and (config.resume or config.eval_only):
        raise FileNotFoundError(f"{config.folder} holds no checkpoint of a run.")
    gpus = torch.cuda.device_count()
    if config.num_gpus > max(gpus, 1):
        raise ValueError(f"--num-gpus is {config.num_gpus}, but PyTorch sees {gpus}; on the CPU there is one process.")
    launch(
        train_and_evaluate, config.num_gpus, config.num_machines, config.machine_rank, config.dist_url, args=(config,)
    )


if __name__ == "__main__":
    command(lambda: main(tyro.cli(Config)))
