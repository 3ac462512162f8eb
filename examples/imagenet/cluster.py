"""Cluster a network's frozen features by k-means, and compare the clusters with the classes.

python examples/imagenet/cluster.py --folder runs/imagenet/cluster --weights runs/imagenet/checkpoint.pt \
    --root /data/imagenet --features runs/imagenet/features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from command import command, read_arguments
from evaluation import (
    FeatureEvaluation,
    centre_view,
    finish,
    frozen_features,
    kept_features,
    labelled_images,
    load_backbone,
)
from run import join
from torch import Tensor

import cgh
from cgh.evaluate import load_features


@dataclass(kw_only=True)
class Config(FeatureEvaluation):
    """Cluster frozen features by k-means: accuracy by the best matching, NMI, AMI and ARI."""

    split: Literal["train", "val"] = "val"
    """The images to cluster."""
    super_classes: Path | None = None
    """Compare with classes of classes: lines of SUPERCLASS CLASS, such as WordNet's wordnet.is_a.txt."""
    clusters: int | None = None
    """How many; by default as many as classes, or as classes of classes."""
    restarts: int = 10
    """Of k-means; the best is taken."""
    seed: int = 0
    """Of its starts."""


def super_classes(path: Path, classes: Sequence[str]) -> Tensor:
    """Return the class of each class `(classes,)`; of several in the file, the first.

    Raises:
        ValueError: a line that is not two names, or classes that the file does not have.
    """
    above: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        names = line.split("\t") if "\t" in line else line.split()
        if len(names) != 2:
            raise ValueError(f"{path}, line {number}: {line!r}; a line is SUPERCLASS CLASS, apart by a tab or a space.")
        above.setdefault(names[1], names[0])
    missing = [name for name in classes if name not in above]
    if missing:
        raise ValueError(f"{path} has no class above {len(missing)} of {len(classes)} classes: {missing[:5]}.")
    numbers = {name: number for number, name in enumerate(sorted({above[name] for name in classes}))}
    return torch.tensor([numbers[above[name]] for name in classes])


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    config = read_arguments(Config, args)
    device = join(config.device)
    if config.weights:
        backbone = load_backbone(config, device)
        datasets = labelled_images(config, {config.split: centre_view(config, backbone)})
        features = frozen_features(config, backbone, datasets, device)
        classes = datasets[config.split].classes
    else:
        features = kept_features(config, [config.split])
        classes = load_features(config.features / f"{config.split}.pt")[1]["classes"]
    results = {}
    if cgh.distributed.rank_and_world_size()[0] == 0:
        images, labels = features[config.split]
        if config.super_classes:
            labels = super_classes(config.super_classes, classes)[labels]
        clusters = cgh.evaluate.kmeans(images, config.clusters or len(labels.unique()), config.seed, config.restarts)
        results = cgh.evaluate.cluster_scores(clusters, labels)._asdict()
    finish(config, results)


if __name__ == "__main__":
    command(main)
