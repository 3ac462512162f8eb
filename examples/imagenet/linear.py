"""Train a linear classifier on a frozen network, as it sees random crops.

torchrun --nproc-per-node 8 examples/imagenet/linear.py --folder runs/imagenet/linear \
    --weights runs/imagenet/checkpoint.pt --root /data/imagenet --precision bf16
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from command import command, read_arguments
from evaluation import centre_view, feature_width, finish, labelled_images, load_backbone
from run import join
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from training import Training, train_classifier

from cgh.evaluate import LinearProbe, linear_recipe


@dataclass(kw_only=True)
class Config(Training):
    """Train a linear classifier on a frozen network; the defaults are the paper's protocol for ImageNet."""

    epochs: int = 100
    lr: float = 0.3
    """Learning rate at the start, for a batch of 256; it is scaled by batch / 256."""
    nesterov: bool = False
    """Momentum of Nesterov's kind."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    config = read_arguments(Config, args)
    device = join(config.device)
    backbone = load_backbone(config, device)
    train, val = labelled_images(config, {"train": None, "val": centre_view(config, backbone)}).values()
    torch.manual_seed(config.seed)
    probe = LinearProbe(backbone, feature_width(config, backbone, device), len(train.classes)).to(device)

    def recipe(steps_per_epoch: int) -> tuple[Optimizer, LRScheduler]:
        return linear_recipe(probe, config.epochs * steps_per_epoch, config.lr * config.batch / 256, config.nesterov)

    finish(config, train_classifier(config, probe, probe.classifier, recipe, train, val, device))


if __name__ == "__main__":
    command(main)
