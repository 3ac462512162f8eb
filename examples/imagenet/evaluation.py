"""What the evaluations share: the weights they are of, images as they are evaluated, kept features, and results."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torchvision.transforms.v2 as T
import tyro
from data import DataConfig, Images, images
from rich.console import Console
from rich.progress import track
from run import PRECISIONS, write_json
from torch import nn

import cgh
from cgh import views
from cgh.evaluate import LabelledFeatures, extract_features, load_features, save_features


@dataclass(kw_only=True)
class Evaluation:
    """What every evaluation is told."""

    folder: Path
    """The folder for the effective configuration and the results."""
    weights: Path | None = None
    """A checkpoint of pretrain.py or of the reference implementation, or torchvision's or timm's weights."""
    arch: str | None = None
    """torchvision's name of the backbone, or timm's after "timm/"; by default what the file says, or the ResNet that
    its tensors fit."""
    small_images: bool | None = None
    """Whether it is a ResNet with the 3x3 stem for small images; likewise."""
    checkpoint_key: str | None = None
    """The file's entry with the tensors; by default "model", "net" or "state_dict", or the file itself."""
    encoder_key: str | None = None
    """What the names of the backbone's tensors begin with; by default the student's ("encoder_q" in the reference)."""
    data: tyro.conf.OmitArgPrefixes[DataConfig]
    crop_size: int = 224
    """Side of the images that the network sees, in pixels."""
    resize: int | None = None
    """Shorter side before the centre crop; by default crop_size x 256 / 224, or crop_size with the small stem."""
    interpolation: Literal["bicubic", "bilinear"] = "bilinear"
    """How images are resized."""
    batch: int = 256
    """Images at a time, over all ranks."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """What autocast computes the network in."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU where there is one."""
    workers: int = 8
    """Processes that load images, on each rank."""


@dataclass(kw_only=True)
class FeatureEvaluation(Evaluation):
    """What an evaluation of frozen features is told beside."""

    data: tyro.conf.OmitArgPrefixes[DataConfig] = field(default_factory=lambda: DataConfig(Path("data")))
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How images are resized; bicubic as in the reference implementation, which it is not where it trains layers."""
    features: Path | None = None
    """A folder to keep the features in; those that it has already are used. Without --weights it needs to have them."""


def load_backbone(config: Evaluation, device: torch.device) -> nn.Module:
    """Return the network without its classifier."""
    if config.weights is None:
        raise ValueError("--weights is missing: name the file whose network is to be evaluated.")
    backbone = cgh.interop.trained_backbone(
        config.weights, config.arch, config.small_images, config.checkpoint_key, config.encoder_key
    )
    return backbone.to(device)


@torch.no_grad()
def feature_width(config: Evaluation, backbone: nn.Module, device: torch.device) -> int:
    """Return how many numbers the network gives an image.

    Raises:
        ValueError: it cannot take images of this size.
    """
    try:
        return backbone.eval()(torch.zeros(1, 3, config.crop_size, config.crop_size, device=device)).shape[1]
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"the network cannot take images of --crop-size {config.crop_size}: {error}. Name the size that it was "
            "trained on."
        ) from error


def weights_digest(config: Evaluation) -> str:
    """Return what tells the file's content from any other, such as that of the same run an epoch later."""
    return hashlib.sha256(config.weights.read_bytes()).hexdigest()


def batch_per_rank(config: Evaluation) -> int:
    """Return the images of a batch that each rank takes.

    Raises:
        ValueError: they cannot be shared alike.
    """
    _, world_size = cgh.distributed.rank_and_world_size()
    if config.batch < 1 or config.batch % world_size:
        raise ValueError(f"--batch {config.batch} is not divisible over {world_size} ranks; make it a multiple.")
    return config.batch // world_size


def normalise() -> T.Transform:
    """Return what makes bytes into the numbers that the networks were trained on."""
    return T.Compose([T.ToDtype(torch.float32, scale=True), T.Normalize(views.IMAGENET_MEAN, views.IMAGENET_STD)])


def centre_view(config: Evaluation, backbone: nn.Module) -> T.Transform:
    """Return what makes a decoded image into what the network is evaluated on."""
    small = isinstance(getattr(backbone, "maxpool", None), nn.Identity)
    resize = config.resize or (config.crop_size if small else config.crop_size * 256 // 224)
    return T.Compose(
        [T.Resize(resize, T.InterpolationMode(config.interpolation)), T.CenterCrop(config.crop_size), normalise()]
    )


def labelled_images(config: Evaluation, transforms: Mapping[str, Any]) -> dict[str, Images]:
    """Return the images of each split, whose transform is given.

    Raises:
        ValueError: images without label, or two splits number classes differently.
    """
    datasets = {split: labelled(images(config.data, split, transform)) for split, transform in transforms.items()}
    check_classes({split: dataset.classes for split, dataset in datasets.items()})
    return datasets


def labelled(dataset: Images) -> Images:
    """Return the data set, once it is sure that each of its images has a label."""
    if without := (dataset.labels < 0).nonzero()[:, 0].tolist():
        name = os.fsdecode(dataset.source.names[dataset.kept[without[0]]])
        raise ValueError(f"{len(without)} of {len(dataset)} images have no label, such as {name}.")
    return dataset


def check_classes(classes: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError unless all splits number the same classes alike."""
    (first, expected), *others = classes.items()
    for split, found in others:
        if list(found) != list(expected):
            raise ValueError(
                f"the classes of {first} and {split} differ, {len(expected)} and {len(found)}: only in {first} are "
                f"{sorted(set(expected) - set(found))[:5]}, only in {split} {sorted(set(found) - set(expected))[:5]}. "
                "Both need the same classes, in the same order."
            )


def frozen_features(
    config: FeatureEvaluation, backbone: nn.Module, datasets: Mapping[str, Images], device: torch.device
) -> dict[str, LabelledFeatures]:
    """Return the features of each split on rank 0 (the other ranks have none): those that are kept, or new ones."""
    rank, _ = cgh.distributed.rank_and_world_size()
    result = {}
    for split, dataset in datasets.items():
        about = {
            "weights": weights_digest(config),
            "keys": [config.checkpoint_key, config.encoder_key],
            "data": [str(config.data.root), config.data.dataset, str(config.data.subset), len(dataset)],
            "split": split,
            "classes": dataset.classes,
            "view": repr(centre_view(config, backbone)),
            "precision": config.precision,
        }
        path = config.features / f"{split}.pt" if config.features else None
        if path and _rank_0_says(path.exists()):
            if rank == 0:
                result[split], _ = load_features(path, about)
            continue
        result[split] = extract_features(
            backbone,
            dataset,
            batch_per_rank(config),
            config.workers,
            device,
            PRECISIONS[config.precision],
            progress=lambda batches, split=split: track(batches, f"{split} features", console=Console(stderr=True)),
        )
        if path and rank == 0:
            save_features(result[split], path, about)
    return result


def kept_features(config: FeatureEvaluation, splits: Sequence[str]) -> dict[str, LabelledFeatures]:
    """Return the features of each split that an earlier evaluation kept.

    Raises:
        ValueError: no folder is named, or its files are of different weights, views or classes.
    """
    if config.features is None:
        raise ValueError("neither --weights nor --features: name a network, or the folder of features that were kept.")
    loaded = {split: load_features(config.features / f"{split}.pt") for split in splits}
    check_classes({split: about["classes"] for split, (_, about) in loaded.items()})
    (first, of), *others = ((split, about) for split, (_, about) in loaded.items())
    for split, about in others:
        different = [key for key in ("weights", "keys", "view", "precision") if of.get(key) != about.get(key)]
        if different:
            raise ValueError(
                f"{config.features} holds {first} and {split} features of different {', '.join(different)}; extract "
                "both again."
            )
    return {split: features for split, (features, _) in loaded.items()}


def _rank_0_says(answer: bool) -> bool:
    """Return on every rank the answer of rank 0, which alone writes files."""
    answers = [answer]
    if dist.is_initialized():
        dist.broadcast_object_list(answers, src=0)
    return answers[0]


def finish(config: Evaluation, results: Mapping[str, Any]) -> None:
    """Write the effective configuration and rank 0's results into the run's folder, show them, and leave."""
    rank, _ = cgh.distributed.rank_and_world_size()
    if rank == 0:
        write_json(config.folder / "config.json", plain(config))
        write_json(config.folder / "results.json", dict(results))
        print(json.dumps(results, indent=2), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def plain(config: object) -> dict[str, Any]:
    """Return a configuration as plain numbers, strings and lists."""
    return json.loads(json.dumps(asdict(config), default=str))
