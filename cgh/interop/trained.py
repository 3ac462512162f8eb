"""A trained backbone out of any file that holds one: a run's checkpoint, the reference's, torchvision's weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from cgh.hypercolumn import remove_classifier
from cgh.interop.architectures import build_backbone, create, torchvision_names
from cgh.interop.backbone import read
from cgh.interop.matching import check_match, described_by, find_tensors, flatten, starts, under, whole_sets

if TYPE_CHECKING:
    from torchvision.models import ResNet


def resnet(arch: str = "resnet50", small_images: bool = False) -> ResNet:
    """Return `build_backbone` of a ResNet of torchvision, for those who need one and no other.

    Args:
        arch: torchvision's name, such as "resnet18" or "resnet50".
        small_images: as for `build_backbone`.

    Raises:
        ValueError: torchvision has no ResNet of that name.

    Example:
        >>> import torch, cgh
        >>> cgh.interop.resnet("resnet18", small_images=True)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 512])
    """
    if arch not in _resnets():
        raise ValueError(f"arch is {arch!r}; torchvision's ResNets are {', '.join(_resnets())}.")
    return cast("ResNet", build_backbone(arch, small_images))


def trained_backbone(
    path: str | os.PathLike[str],
    arch: str | None = None,
    small_images: bool | None = None,
    checkpoint_key: str | None = None,
    encoder_key: str | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """Return the trained backbone of a file, without classifier: images `(N, 3, H, W)` -> pooled features `(N, W)`.

    The file is a checkpoint of `examples/imagenet/pretrain.py` (whose student's backbone is taken), one of the
    reference implementation, or plain weights under torchvision's or timm's names, in PyTorch's format or as
    `.safetensors`.
    It is read as data; a pickle that would run code is refused. Others' checkpoints are searched too: names may begin
    with those of wrappers, tasks and methods ("module.", "_orig_mod.", "model.", "backbone.", "encoder_q.") in any
    order, and heads and prototypes beside the backbone stay behind.

    Args:
        path: the file.
        arch: as for `build_backbone`; by default what the file says, and if it says nothing, the ResNet of torchvision
            that its tensors fit.
        small_images: as for `build_backbone`; by default what the file says, or its first convolution shows.
        checkpoint_key: the entry with the tensors; by default the whole file is searched.
        encoder_key: what the backbone's names begin with, such as "encoder_q" (the reference's student),
            "encoder_k" (its teacher) or "teacher.encoder.extractor.backbone" (this library's); by default the student.
        image_size: as for `build_backbone`; by default the views' side that the file says, or the architecture's own.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: safetensors is not installed.
        ValueError: the file is no checkpoint or cut short; it has no such entry; several encoders fit, and none is a
            student; its tensors are not those of the architecture, and then every missing, unexpected and misshapen key
            is listed.

    Example:
        >>> import tempfile, torch, torchvision, cgh
        >>> path = tempfile.mkdtemp() + "/resnet18.pth"
        >>> torch.save(torchvision.models.resnet18().state_dict(), path)
        >>> cgh.interop.trained_backbone(path)(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 512])
    """
    content = read(path)
    tensors = flatten(content)
    if checkpoint_key is not None:
        if not isinstance(content.get(checkpoint_key), Mapping):
            entries = [name for name, value in content.items() if isinstance(value, Mapping)]
            raise ValueError(f"{path} has no tensors under {checkpoint_key!r}; its entries with tensors are {entries}.")
        tensors = flatten(content[checkpoint_key])
    if encoder_key is not None:
        tensors = under(tensors, encoder_key, str(path))
    config = content.get("config")
    said = {**content, **(config if isinstance(config, Mapping) else {})}  # the reference has no config, but an "arch"
    if small_images is None:
        stated = said.get("small_images")
        small_images = stated if isinstance(stated, bool) else has_small_stem(tensors)
    arch = arch or said.get("arch") or find_arch(tensors, small_images, path)
    with described_by(str(path)):
        model = create(str(arch), small_images, said.get("crop_size") if image_size is None else image_size)
    classifier = model.state_dict().keys()
    remove_classifier(model)
    expected = model.state_dict()
    # By module, as other methods have a head of their own in its place.
    heads = {key.rpartition(".")[0] + "." for key in classifier - expected.keys()}
    found = find_tensors(tensors, expected, str(path))
    state = {key: x for key, x in found.items() if key in expected or not key.startswith(tuple(heads))}
    # A count that no evaluation reads, and that files from before it existed lack.
    state |= {key: x for key, x in expected.items() if key.endswith("num_batches_tracked") and key not in state}
    check_match(state, expected, str(path))
    model.load_state_dict(state)
    return model


def _resnets() -> list[str]:
    return [name for name in torchvision_names() if name.startswith(("resnet", "resnext", "wide_resnet"))]


def has_small_stem(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a ResNet with its 3x3 stem is there, whose first convolution alone takes three channels."""
    stems = [x for name, x in tensors.items() if name.endswith("conv1.weight") and x.shape[1:2] == (3,)]
    return bool(stems) and stems[0].shape[-1] == 3


def find_arch(tensors: Mapping[str, Tensor], small_images: bool, path: str | os.PathLike[str]) -> str:
    """Return the ResNet of torchvision whose tensors are there, with their names and shapes, whatever is in front.

    Raises:
        ValueError: there is none.
    """

    def shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        left_out = ("fc.", "num_batches_tracked")
        return {name: x.shape for name, x in tensors.items() if not name.startswith(left_out) | name.endswith(left_out)}

    for arch in _resnets():
        with torch.device("meta"):
            expected = resnet(arch, small_images).state_dict()
        if any(shapes(found) == shapes(expected) for found in whole_sets(tensors, expected).values()):
            return arch
    raise ValueError(
        f"{path} does not say its architecture, and its tensors fit none of {', '.join(_resnets())}; name the one that "
        "it should be (arch), to see what differs, or where in the file the backbone is (checkpoint_key, encoder_key): "
        f"its names begin with {starts(tensors)}, such as {[*tensors][:3]}."
    )
