"""Semi-supervised evaluation: the whole network fine-tuned on a few of the labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from cgh.evaluate.linear import Classifier
from cgh.labels import integer_labels
from cgh.parameters import parameter_groups


def finetune_recipe(
    model: Classifier,
    steps_per_epoch: int,
    trunk_learning_rate: float = 0.005,
    head_learning_rate: float = 0.02,
    milestones: Sequence[int] = (30, 60),
    layer_decay: float = 1.0,
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Return the protocol's optimiser of everything, and its schedule, to be stepped after every batch.

    SGD with momentum 0.9 and no weight decay; both learning rates are divided by ten at each milestone. The paper
    trains for 70 epochs on 1 % or 10 % of the labels, with synchronised batch norm
    (`torch.nn.SyncBatchNorm.convert_sync_batchnorm`, on accelerators).

    Args:
        model: what learns.
        steps_per_epoch: batches in an epoch.
        trunk_learning_rate: the backbone's.
        head_learning_rate: the linear layer's.
        milestones: epochs.
        layer_decay: of the trunk's learning rate from a block to the one before it, as in `cgh.parameter_groups`; the
            protocol has none.

    Raises:
        ValueError: a layer decay outside (0, 1], or a backbone without blocks for it; a backbone of which nothing
            learns.

    Example:
        >>> import cgh
        >>> model = cgh.evaluate.Classifier(cgh.interop.resnet("resnet18"), width=512, classes=10)
        >>> optimizer, schedule = cgh.evaluate.finetune_recipe(model, steps_per_epoch=50)
        >>> schedule.get_last_lr()
        [0.005, 0.02]
    """
    if not any(x.requires_grad for x in model.backbone.parameters()):
        raise ValueError(
            "no parameter of the backbone takes a gradient, as in a teacher, so nothing of it would be fine-tuned: "
            "call model.backbone.requires_grad_(), or evaluate it by cgh.evaluate.LinearProbe."
        )
    trunk = parameter_groups(model.backbone, trunk_learning_rate, layer_decay=layer_decay)
    head = {"params": list(model.classifier.parameters()), "lr": head_learning_rate}
    optimizer = torch.optim.SGD([*trunk, head], momentum=0.9)
    return optimizer, MultiStepLR(optimizer, [epoch * steps_per_epoch for epoch in milestones], gamma=0.1)


def labelled_share(labels: Tensor, fraction: float, seed: int = 0) -> Tensor:
    """Return the indices of a random share of each class, at least one image of each, in rising order.

    For data sets without a published list of the 1 % or 10 %.

    Args:
        labels: classes `(N,)`, of any integer type.
        fraction: above 0, up to 1.
        seed: fixes which.

    Raises:
        ValueError: a fraction outside that range, no labels, labels that are not `(N,)`, or some below zero.
        TypeError: labels that are not integers.

    Example:
        >>> import torch
        >>> from cgh.evaluate import labelled_share
        >>> labels = torch.arange(3).repeat(100)
        >>> labels[labelled_share(labels, 0.02)].bincount()
        tensor([2, 2, 2])
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it is a share of the labels, above 0 and up to 1.")
    labels = integer_labels(labels)
    if labels.ndim != 1 or not len(labels) or labels.min() < 0:
        found = f"below zero {int((labels < 0).sum())} times" if labels.numel() else "empty"
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}" + f", and are {found}" * (labels.ndim == 1) + "; they are (N,), "
            "and classes count from 0: leave images without label out."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator, device="cpu")
        chosen.append(members[order[: max(1, round(fraction * len(members)))]])
    return torch.cat(chosen).sort().values
