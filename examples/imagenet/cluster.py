"""Cluster a network's frozen features by k-means, and compare the clusters with the classes.

python examples/imagenet/cluster.py --folder runs/imagenet/cluster --weights runs/imagenet/checkpoint.pt \
    --root /data/imagenet --features runs/imagenet/features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro
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

import cgh


@dataclass(kw_only=True)
class Config(FeatureEvaluation):
    """Cluster frozen features by k-means: accuracy by the best matching, NMI and ARI."""

    split: Literal["train", "val"] = "val"
    """The images to cluster."""
    clusters: int | None = None
    """How many; by default as many as classes."""
    restarts: int = 10
    """Of k-means; the best is taken."""
    seed: int = 0
    """Of its starts."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    config = tyro.cli(Config, args=args)
    device = join(config.device)
    if config.weights:
        backbone = load_backbone(config, device)
        datasets = labelled_images(config, {config.split: centre_view(config, backbone)})
        features = frozen_features(config, backbone, datasets, device)
    else:
        features = kept_features(config, [config.split])
    results = {}
    if cgh.distributed.rank_and_world_size()[0] == 0:
        images, labels = features[config.split]
        clusters = cgh.evaluate.kmeans(images, config.clusters or len(labels.unique()), config.seed, config.restarts)
        results = cgh.evaluate.cluster_scores(clusters, labels)._asdict()
    finish(config, results)


if __name__ == "__main__":
    main()
