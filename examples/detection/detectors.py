"""Faster R-CNN of torchvision's parts on a pre-trained ResNet: with a feature pyramid, or as C4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn
from torchvision.models import ResNet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

Stage = Literal["layer1", "layer2", "layer3", "layer4"]
STAGES: tuple[Stage, ...] = get_args(Stage)
RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors

Training = Literal["pretrained", "frozen", "scratch"]


def prepare(backbone: nn.Module, training: Training) -> ResNet:
    """Return `backbone` as the detector is to start with it.

    Args:
        backbone: a torchvision ResNet.
        training: "pretrained", as it is, and all of it learns; "frozen", as it is, and it stays so to the bit, its
            batch norms too; "scratch", with fresh weights in place of its own.

    Raises:
        TypeError: it is no torchvision ResNet.
    """
    if not isinstance(backbone, ResNet):
        raise TypeError(f"the backbone is a {type(backbone).__name__}; the detectors need a ResNet of torchvision.")
    if training == "scratch":
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision starts it
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
    elif training == "frozen":
        _freeze_norms(backbone)
        backbone.requires_grad_(False)
    return backbone


def _freeze_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            _freeze_norms(child)


def fpn(
    backbone: ResNet, num_classes: int, stages: Sequence[str] = STAGES, channels: int = 256, **options: Any
) -> FasterRCNN:
    """Return Faster R-CNN on a feature pyramid (Lin et al. 2017), with trainable batch norms in the pyramid too.

    Args:
        backbone: a torchvision ResNet, usual or for small images.
        num_classes: classes, without the background.
        stages: those that the pyramid stands on, fine to coarse; without the finest it is much faster, and blinder to
            small objects.
        channels: of each level.
        **options: of `torchvision.models.detection.FasterRCNN`.

    Raises:
        ValueError: no stages, or not from fine to coarse.
    """
    if not stages or list(stages) != sorted(set(stages)):
        raise ValueError(f"the stages are {list(stages)}; choose some of {list(STAGES)}, in this order.")
    strides = _strides(backbone, stages)
    strides.append(2 * strides[-1])  # of the level that the pyramid adds
    pyramid = BackboneWithFPN(
        backbone,
        return_layers={stage: str(level) for level, stage in enumerate(stages)},
        in_channels_list=[_width(backbone, stage) for stage in stages],
        out_channels=channels,
        norm_layer=nn.BatchNorm2d,
    )
    return FasterRCNN(
        pyramid,
        num_classes + 1,
        rpn_anchor_generator=AnchorGenerator(tuple((8 * stride,) for stride in strides), (RATIOS,) * len(strides)),
        box_roi_pool=MultiScaleRoIAlign([str(level) for level in range(len(stages))], output_size=7, sampling_ratio=2),
        **options,
    )


def c4(backbone: ResNet, num_classes: int, **options: Any) -> FasterRCNN:
    """Return Faster R-CNN on `layer3`, with `layer4` as the head of each box: the C4 of He et al. (2020) in detection.

    The map of `layer3` (res4) proposes. Each proposal is cut out of it as 14 x 14 and goes through `layer4` (res5), one
    more batch norm, since nothing set the scale of self-supervised features, and an average over positions.

    Args:
        backbone: a torchvision ResNet, usual or for small images.
        num_classes: classes, without the background.
        **options: of `torchvision.models.detection.FasterRCNN`.
    """
    (stride,) = _strides(backbone, ["layer3"])
    width = _width(backbone, "layer4")
    body = IntermediateLayerGetter(backbone, {"layer3": "0"})
    body.out_channels = _width(backbone, "layer3")
    proposals = {"rpn_pre_nms_top_n_train": 12_000, "rpn_pre_nms_top_n_test": 6_000}  # detectron2's for C4
    return FasterRCNN(
        body,
        rpn_anchor_generator=AnchorGenerator((tuple(scale * stride for scale in (2, 4, 8, 16, 32)),), (RATIOS,)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0),
        box_head=nn.Sequential(backbone.layer4, nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        box_predictor=FastRCNNPredictor(width, num_classes + 1),
        **proposals | options,
    )


@torch.no_grad()
def _strides(backbone: ResNet, stages: Sequence[str]) -> list[int]:
    """Pixels of the image to one position of each stage's map: 4 to 32, or 1 to 8 in a ResNet for small images."""
    side = 64
    getter = IntermediateLayerGetter(backbone, {stage: stage for stage in stages})
    training = backbone.training
    maps = getter.eval()(torch.zeros(1, 3, side, side))
    getter.train(training)
    return [side // maps[stage].shape[-1] for stage in stages]


def _width(backbone: ResNet, stage: str) -> int:
    """Channels of a stage's map."""
    block = getattr(backbone, stage)[-1]
    return int(block.conv3.out_channels if hasattr(block, "conv3") else block.conv2.out_channels)
