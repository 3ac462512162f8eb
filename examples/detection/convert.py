"""A pre-trained backbone in detectron2's format, for `train_net.py` or any other trainer of detectron2.

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

# What timm's plain vision transformer and detectron2's have in common, by the same names.
VIT = ("patch_embed.proj.", "pos_embed", "blocks.")
VIT_PARTS = ("norm1", "attn", "norm2", "mlp")
VIT_LEFT = {"cls_token", "norm.weight", "norm.bias", "fc_norm.weight", "fc_norm.bias"}


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
        backbone: without its classifier: a ResNet of torchvision or timm with the usual stem, or a plain vision
            transformer of timm, whose class token and last norm detectron2's `ViT` does without.

    Raises:
        ValueError: detectron2 has no such backbone; what it has not is named.
    """
    state = backbone.state_dict()
    if "patch_embed.proj.weight" in state and "blocks.0.attn.qkv.weight" in state:
        kept = {key: x for key, x in state.items() if key.startswith(VIT)}
        others = state.keys() - kept.keys() - VIT_LEFT
        foreign = sorted(
            others | {key for key in kept if key.startswith("blocks.") and key.split(".")[2] not in VIT_PARTS}
        )
        if foreign:
            raise ValueError(f"the transformer has {', '.join(foreign[:5])}, which detectron2's ViT has not.")
    elif "conv1.weight" in state and "layer4.0.conv1.weight" in state:
        side = state["conv1.weight"].shape[-1]
        if side != 7:
            raise ValueError(
                f"the backbone starts with a convolution of {side}x{side}, the one for small images; detectron2's "
                "ResNet has one of 7x7 and a max pool: convert a backbone that was pre-trained without small_images."
            )
        kept = {detectron2_name(key): x for key, x in state.items()}
    else:
        raise ValueError(
            f"detectron2 has no backbone like this {type(backbone).__name__}; it has ResNets with the usual stem, and "
            "timm's plain vision transformers."
        )
    arrays = {key: x.numpy() for key, x in kept.items()}
    return {"model": arrays, "__author__": "cgh", "matching_heuristics": True}


def convert(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    arch: str | None = None,
    checkpoint_key: str | None = None,
    encoder_key: str | None = None,
) -> None:
    """Write a pre-trained backbone in detectron2's format.

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
