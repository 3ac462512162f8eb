"""Classify images by the votes of their nearest neighbours among a network's frozen features.

python examples/imagenet/knn.py --folder runs/imagenet/knn --weights runs/imagenet/checkpoint.pt --root /data/imagenet \
    --features runs/imagenet/features
python examples/imagenet/knn.py --folder runs/imagenet/knn-5 --features runs/imagenet/features --k 5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

import cgh

SPLITS = ("train", "val")


@dataclass(kw_only=True)
class Config(FeatureEvaluation):
    """Classify validation images by k nearest neighbours; the defaults are the paper's protocol for ImageNet."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """How many training images vote; each gives a result."""
    temperature: float = 0.07
    """A neighbour's vote weighs exp(similarity / temperature)."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    config = read_arguments(Config, args)
    device = join(config.device)
    if config.weights:
        backbone = load_backbone(config, device)
        datasets = labelled_images(config, dict.fromkeys(SPLITS, centre_view(config, backbone)))
        if max(config.k) > len(datasets["train"]):
            raise ValueError(f"--k {max(config.k)}, but there are {len(datasets['train'])} training images to vote.")
        features = frozen_features(config, backbone, datasets, device)
    else:
        features = kept_features(config, SPLITS)
    results = {}
    if cgh.distributed.rank_and_world_size()[0] == 0:
        queries, labels = features["val"]
        scores = cgh.evaluate.knn(*features["train"], queries.to(device), labels, config.k, config.temperature)
        results = {f"{k} neighbours": {"top1": top1, "top5": top5} for k, (top1, top5) in scores.items()}
    finish(config, results)


if __name__ == "__main__":
    command(main)
