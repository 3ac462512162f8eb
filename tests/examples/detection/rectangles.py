"""Detection data that the tests draw: a red and a blue rectangle on grey, in VOC or COCO layout."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

COLOURS = {"blue": (30, 30, 220), "red": (220, 30, 30)}
SIDE = 64

Boxes = dict[str, tuple[int, int, int, int]]  # left, top, right, bottom, from 0, the last pixel not included


def picture(seed: int) -> tuple[Tensor, Boxes]:
    """An image `(3, SIDE, SIDE)`, one rectangle in either half of it, and where they are."""
    draw = random.Random(seed)
    noise = torch.randint(80, 110, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    image, boxes = noise.to(torch.uint8), {}
    for (name, colour), start in zip(COLOURS.items(), draw.sample([0, SIDE // 2], 2), strict=True):
        width, height = draw.randint(14, SIDE // 2 - 4), draw.randint(14, SIDE // 2)
        left, top = start + draw.randint(0, SIDE // 2 - width), draw.randint(0, SIDE - height)
        image[:, top : top + height, left : left + width] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
        boxes[name] = (left, top, left + width, top + height)
    return image, boxes


def voc(root: Path, split: str, images: int, seed: int = 0) -> str:
    """Write images in VOC layout, and return them as a source."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = [f"{split}{index}" for index in range(images)]
    for index, name in enumerate(names):
        image, boxes = picture(seed + index)
        to_pil_image(image).save(root / "JPEGImages" / f"{name}.png")
        annotate(root, name, boxes)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return f"{root}:{split}"


def annotate(root: Path, name: str, boxes: Boxes, side: int = SIDE) -> None:
    """Write the annotation of an image in VOC layout, whose pixels count from 1 and include the last."""
    objects = "".join(
        f"<object><name>{of}</name><bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin>"
        f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for of, (left, top, right, bottom) in boxes.items()
    )
    size = f"<size><width>{side}</width><height>{side}</height><depth>3</depth></size>"
    (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")


def coco(root: Path, images: int, seed: int = 0) -> str:
    """Write images in COCO layout, and return them as a source."""
    root.mkdir(parents=True)
    categories = {name: 10 * number for number, name in enumerate(COLOURS, start=1)}
    entries, annotations = [], []
    for index in range(images):
        image, boxes = picture(seed + index)
        entries.append({"id": index + 100, "file_name": f"{index}.png", "height": SIDE, "width": SIDE})
        to_pil_image(image).save(root / f"{index}.png")
        for name, (left, top, right, bottom) in boxes.items():
            bbox = [left, top, right - left, bottom - top]
            place = {"id": len(annotations), "image_id": index + 100, "category_id": categories[name], "iscrowd": 0}
            annotations.append(place | {"bbox": bbox})
    file = root / "annotations.json"
    named = [{"id": number, "name": name} for name, number in categories.items()]
    file.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": named}))
    return f"{root}:{file}"
