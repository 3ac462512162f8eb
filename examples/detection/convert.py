"""A pre-trained ResNet in detectron2's format, for `train_net.py` or any other trainer of detectron2.

python examples/detection/convert.py runs/imagenet/checkpoint.pt runs/imagenet/backbone.pkl

The checkpoint is one of `examples/imagenet/pretrain.py`, one of the reference implementation, or plain weights under
torchvision's names (the supervised baseline). The classifier, or the head in its place, stays behind.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from cgh.interop import trained_backbone

sys.path.append(str(Path(__file__).parents[1] / "imagenet"))  # whose scripts end in the same way
from command import command

# torchvision's names and detectron2's, which has the norm inside its convolution and counts the stem as stage 1.
NAMES = {
    "layer1": "res2",
    "layer2": "res3",
    "layer3": "res4",
    "layer4": "res5",
    "bn1": "conv1.norm",
    "bn2": "conv2.norm",
    "bn3": "conv3.norm",
    "downsample.0": "shortcut",
    "downsample.1": "shortcut.norm",
}


def detectron2_name(key: str) -> str:
    """Return what detectron2 calls a tensor of torchvision's ResNet.

    Example:
        >>> detectron2_name("bn1.weight"), detectron2_name("layer4.0.downsample.0.weight")
        ('stem.conv1.norm.weight', 'res5.0.shortcut.weight')
    """
    name = key if key.startswith("layer") else f"stem.{key}"
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def detectron2_checkpoint(backbone: nn.Module) -> dict[str, Any]:
    """Return what detectron2 reads from a `.pkl`: the tensors as arrays, by names that it completes itself.

    Args:
        backbone: a ResNet of torchvision (18 to 152) without its classifier.

    Raises:
        ValueError: its first convolution is the 3x3 one for small images, which detectron2's ResNet lacks.
    """
    side = backbone.get_parameter("conv1.weight").shape[-1]
    if side != 7:
        raise ValueError(
            f"the backbone starts with a convolution of {side}x{side}, the one for small images; detectron2's "
            "ResNet has one of 7x7 and a max pool: convert a backbone that was pre-trained without small_images."
        )
    arrays = {detectron2_name(key): x.numpy() for key, x in backbone.state_dict().items()}
    return {"model": arrays, "__author__": "cgh", "matching_heuristics": True}


def convert(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    arch: str | None = None,
    checkpoint_key: str | None = None,
    encoder_key: str | None = None,
) -> None:
    """Write a pre-trained ResNet in detectron2's format.

    Args:
        checkpoint: of a pre-training run, of the reference implementation, or plain weights of torchvision.
        out: the file to write; its name ends in .pkl, by which detectron2 knows the format.
        arch: such as resnet50; by default what the checkpoint says or its tensors fit.
        checkpoint_key: the entry of the checkpoint with the tensors; by default model, net or state_dict.
        encoder_key: what the backbone's names begin with, such as encoder_q; by default the student's.
    """
    if out.suffix != ".pkl":
        raise ValueError(f"the file to write is {out}; detectron2 reads this format from a file called .pkl alone.")
    content = detectron2_checkpoint(
        trained_backbone(checkpoint, arch, checkpoint_key=checkpoint_key, encoder_key=encoder_key)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(pickle.dumps(content))
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    command(lambda: tyro.cli(convert))
