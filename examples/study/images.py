"""CIFAR-10 and CIFAR-100 as one tensor of bytes, decoded once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from cgh import checkpoint

sys.path.append(str(Path(__file__).parents[1] / "imagenet"))  # where images are found and decoded in the same way
from files import list_folders, list_images, read_image


class Images(NamedTuple):
    """Images and what they show."""

    pixels: Tensor
    """uint8, `(N, 3, S, S)`."""
    labels: Tensor
    """Classes from 0, `(N,)`."""

    def take(self, index: Tensor) -> Images:
        """Return the images at `index`."""
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> Images:
        """Return the images on `device`."""
        return Images(self.pixels.to(device), self.labels.to(device))


def load(root: Path, split: str, size: int, cache: Path) -> Images:
    """Return all images of a split, from `cache` if they were decoded before.

    Args:
        root: a folder with `train/CLASS/*.jpg` and `test/CLASS/*.jpg`, or what torchvision downloads CIFAR into. Only
            the split asked for is opened.
        split: "train" or "test".
        size: side in pixels; other sizes than the images' own are area means.
        cache: folder for the decoded images.

    Raises:
        FileNotFoundError: `root` holds neither.
        ValueError: the images are of different sizes.
    """
    path = cache / f"{split}.pt"
    state = checkpoint.load(path) if path.exists() else {}
    if state.get("root") != str(root.resolve()):
        pixels, labels = _decode(root, split)
        state = {"root": str(root.resolve()), "pixels": pixels, "labels": labels}
        checkpoint.save(state, path)
    pixels = state["pixels"]
    if pixels.shape[-1] != size:
        pixels = torch.cat([F.interpolate(part.float(), (size, size), mode="area") for part in pixels.split(4096)])
        pixels = pixels.round().to(torch.uint8)
    return Images(pixels, state["labels"])


def _decode(root: Path, split: str) -> tuple[Tensor, Tensor]:
    for folder, dataset in (
        ("cifar-10-batches-py", torchvision.datasets.CIFAR10),
        ("cifar-100-python", torchvision.datasets.CIFAR100),
    ):
        if (root / folder).exists():
            data = dataset(str(root), train=split == "train")
            return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)
    if not (root / split).is_dir():
        raise FileNotFoundError(
            f"{root} has no folder {split!r} with a folder of images for each class, and none of torchvision's CIFAR; "
            "give --root the folder that holds one of them."
        )
    classes = list_folders(root / split)
    files = [
        (root / split / name / path, label)
        for label, name in enumerate(classes)
        for path in list_images(root / split / name)
    ]
    if len({label for _, label in files}) < len(classes) or not files:
        raise ValueError(f"{root / split} needs an image in the folder of every class; it has {len(files)} images.")
    pixels = [read_image(path) for path, _ in files]
    if len({image.shape for image in pixels}) > 1:
        raise ValueError(f"{root / split} holds images of different sizes; this study needs one size, such as 32.")
    return torch.stack(pixels), torch.tensor([label for _, label in files])
