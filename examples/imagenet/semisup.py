"""Fine-tune a whole network on a few of the labels.

torchrun --nproc-per-node 8 examples/imagenet/semisup.py --folder runs/imagenet/1percent \
    --weights runs/imagenet/checkpoint.pt --root /data/imagenet --subset 1percent.txt --precision bf16
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from command import command, read_arguments
from evaluation import centre_view, feature_width, finish, labelled_images, load_backbone
from run import join
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Subset
from training import Training, train_classifier

from cgh.evaluate import Classifier, finetune_recipe, labelled_share


@dataclass(kw_only=True)
class Config(Training):
    """Fine-tune a network on few labels; the defaults are the paper's protocol for ImageNet.

    Which labels are known is said by a list (--subset), or drawn (--fraction) where nobody has published one.
    """

    fraction: float = 1.0
    """Share of each class's images whose labels are known, drawn by the seed; 1 for all of them, or all of --subset."""
    epochs: int = 70
    trunk_lr: float = 0.005
    """Learning rate of the network at the start, for a batch of 256; it is scaled by batch / 256."""
    head_lr: float = 0.02
    """Learning rate of the new linear layer; likewise."""
    layer_decay: float = 1.0
    """Of the trunk's learning rate, from a block to the one before it: 0.65 to 0.85 is usual for transformers; 1, the
    paper's, is none."""
    milestones: tuple[int, ...] = (30, 60)
    """Epochs after which both learning rates are divided by ten."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    config = read_arguments(Config, args)
    device = join(config.device)
    backbone = load_backbone(config, device)
    train, val = labelled_images(config, {"train": None, "val": centre_view(config, backbone)}).values()
    known = Subset(train, labelled_share(train.labels, config.fraction, config.seed).tolist())
    torch.manual_seed(config.seed)
    model = Classifier(backbone, feature_width(config, backbone, device), len(train.classes)).to(device)
    if dist.is_initialized() and device.type == "cuda":  # PyTorch has none for the CPU
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def recipe(steps_per_epoch: int) -> tuple[Optimizer, LRScheduler]:
        scale = config.batch / 256
        return finetune_recipe(
            model,
            steps_per_epoch,
            config.trunk_lr * scale,
            config.head_lr * scale,
            config.milestones,
            config.layer_decay,
        )

    results = train_classifier(config, model, model, recipe, known, val, device)
    finish(config, {"labels": len(known), **results})


if __name__ == "__main__":
    command(main)
