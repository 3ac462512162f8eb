"""Detection data in VOC or COCO layout, several folders joined, checked before anything is trained on it.

A source is one string:

| layout | source | what lies there |
| --- | --- | --- |
| VOC | `ROOT:SPLIT` | `ROOT/Annotations/ID.xml`, `ROOT/ImageSets/Main/SPLIT.txt`, `ROOT/JPEGImages/ID.jpg` |
| COCO | `IMAGES:FILE.json` | the images' folder, and the annotations of them |

so VOC 07+12 is `read(["VOC2007:trainval", "VOC2012:trainval"])`. An image without boxes stays, as a negative. Boxes and
sizes are those of the upright image, where a photograph is stored turned or mirrored (EXIF).
"""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

sys.path.append(str(Path(__file__).parents[1] / "imagenet"))  # where images are found and decoded in the same way
from files import SUFFIXES, read_image

ROUNDING = 1.0  # pixels: COCO's boxes are rounded, and some tools count VOC's pixels from 0
LONGEST_SIDE = 2**31 - 1  # pixels, that any image format can say


@dataclass(frozen=True)
class Record:
    """An image and its `n` boxes."""

    image: Path
    image_id: int | str
    """COCO's number, or VOC's name without suffix."""
    height: int
    width: int
    boxes: Tensor
    """`(n, 4)` float: left, top, right, bottom, in pixels from the corner; the whole image is `0, 0, width, height`."""
    labels: Tensor
    """`(n,)` int: index into the classes."""
    crowd: Tensor
    """`(n,)` bool: one box around many objects (COCO); not trained on, ignored in evaluation."""
    difficult: Tensor
    """`(n,)` bool: hard to tell (VOC); trained on, ignored in evaluation."""


@dataclass(frozen=True)
class Annotations:
    """All records of some sources, and what their labels mean."""

    records: list[Record]
    classes: list[str]
    skipped: int
    """Boxes left out because they were outside their image or had no area."""

    def __str__(self) -> str:
        boxes = sum(len(record.boxes) for record in self.records)
        empty = sum(len(record.boxes) == 0 for record in self.records)
        return (
            f"{len(self.records)} images ({empty} without boxes), {boxes} boxes ({self.skipped} bad ones skipped), "
            f"{len(self.classes)} classes: {', '.join(self.classes)}"
        )


class _Object(NamedTuple):
    name: str
    box: tuple[float, float, float, float]
    crowd: bool = False
    difficult: bool = False


class _Entry(NamedTuple):
    file: Path
    image: Path
    image_id: int | str
    height: int
    width: int
    objects: list[_Object]


def read(sources: Sequence[str], classes: Sequence[str] | None = None, skip_bad_boxes: bool = False) -> Annotations:
    """Return the annotations of all sources together.

    Args:
        sources: `ROOT:SPLIT` (VOC) or `IMAGES:FILE.json` (COCO).
        classes: their names, in the order of the labels; by default those that COCO's file lists, in the order of
            their numbers, or those that occur in VOC's files, sorted.
        skip_bad_boxes: leave out and count the boxes that are outside their image or have no area.

    Raises:
        FileNotFoundError: a folder in neither layout, a split, an annotation or an image that is not there.
        ValueError: a file that cannot be read as annotations, an empty image file, a class that is not among
            `classes`, a bad box without `skip_bad_boxes`, or no box at all.
    """
    entries: list[_Entry] = []
    found: dict[str, None] = {}
    for source in sources:
        folder, colon, what = source.rpartition(":")
        if not colon or not folder or not what:
            raise ValueError(f"{source!r} is no source; write ROOT:SPLIT for VOC layout, IMAGES:FILE.json for COCO's.")
        some, names = _read_coco(Path(folder), Path(what)) if what.endswith(".json") else _read_voc(Path(folder), what)
        entries += some
        found |= dict.fromkeys(names)
    names = list(classes or found)
    labels = {name: label for label, name in enumerate(names)}
    bad: list[str] = []
    records = [_check(entry, labels, bad) for entry in entries]
    if bad and not skip_bad_boxes:
        listed = "\n  ".join(bad[:10] + ["..."] * (len(bad) > 10))
        raise ValueError(
            f"{len(bad)} boxes are outside their image or have no area:\n  {listed}\n"
            "Correct them, or leave them out: --skip-bad-boxes."
        )
    if not any(len(record.boxes) for record in records):
        raise ValueError(f"there is no box in {', '.join(sources)}: nothing to learn or to measure.")
    return Annotations(records, names, skipped=len(bad))


def _check(entry: _Entry, labels: dict[str, int], bad: list[str]) -> Record:
    """The record of an entry, with its bad boxes described in `bad` and left out."""
    if not os.path.isfile(entry.image):  # noqa: PTH113 (False for names that no file can have, too)
        raise FileNotFoundError(
            f"{entry.file} annotates {entry.image}, which is not there; add the image, or take its annotation out."
        )
    if entry.image.stat().st_size == 0:
        raise ValueError(f"{entry.image} is an empty file; put the image back, or take it out of {entry.file}.")
    # Clipped in the precision that detectors read: a box that becomes flat by it has no area either, and stops them.
    limits = torch.tensor([entry.width, entry.height, entry.width, entry.height])
    boxes = torch.tensor([thing.box for thing in entry.objects], dtype=torch.float32).reshape(-1, 4)
    boxes = boxes.clamp(min=torch.zeros(4)).minimum(limits)
    solid = (boxes[:, :2] < boxes[:, 2:]).all(1).tolist()
    kept = []
    for index, thing in enumerate(entry.objects):
        if thing.name not in labels:
            raise ValueError(
                f"{entry.file} has the class {thing.name!r}, which is not among {', '.join(labels)}; "
                "add it to --classes, or correct the file."
            )
        left, top, right, bottom = thing.box
        inside = min(left, top) >= -ROUNDING and right <= entry.width + ROUNDING and bottom <= entry.height + ROUNDING
        if inside and solid[index]:
            kept.append(index)
        else:
            bad.append(
                f"{entry.file}: {thing.name} at left {left:g}, top {top:g}, right {right:g}, bottom {bottom:g} "
                f"in {entry.image.name} of {entry.width} x {entry.height}"
            )
    good = [entry.objects[index] for index in kept]
    return Record(
        entry.image,
        entry.image_id,
        entry.height,
        entry.width,
        boxes[kept],
        labels=torch.tensor([labels[thing.name] for thing in good], dtype=torch.int64),
        crowd=torch.tensor([thing.crowd for thing in good], dtype=torch.bool),
        difficult=torch.tensor([thing.difficult for thing in good], dtype=torch.bool),
    )


def _read_voc(root: Path, split: str) -> tuple[list[_Entry], list[str]]:
    parts = [root / "Annotations", root / "ImageSets" / "Main", root / "JPEGImages"]
    if not all(part.is_dir() for part in parts):
        raise FileNotFoundError(
            f"{root} is in neither layout. VOC's holds Annotations/, ImageSets/Main/ and JPEGImages/; COCO's is a "
            f"folder of images with a JSON file of annotations, written {root}:FILE.json. {_contents(root)}"
        )
    annotations, sets, images = parts
    listing = sets / f"{split}.txt"
    if not listing.is_file():
        splits = ", ".join(sorted(path.stem for path in sets.glob("*.txt"))) or "none"
        raise FileNotFoundError(f"{listing} is not there; the splits of {root} are: {splits}.")
    lines = (line.split() for line in os.fsdecode(listing.read_bytes()).splitlines())
    entries = [_voc_entry(annotations / f"{words[0]}.xml", images, listing) for words in lines if words]
    return entries, sorted({thing.name for entry in entries for thing in entry.objects})


def _voc_entry(file: Path, images: Path, listing: Path) -> _Entry:
    try:
        tree = ET.parse(file).getroot()  # noqa: S314 (the user's own files)
        objects = [
            _Object(
                thing.findtext("name", "").strip(),
                _voc_box(*(float(thing.findtext(f"bndbox/{x}", "")) for x in ("xmin", "ymin", "xmax", "ymax"))),
                difficult=thing.findtext("difficult", "0").strip() == "1",
            )
            for thing in tree.iter("object")
        ]
        height, width = (int(tree.findtext(f"size/{side}", "")) for side in ("height", "width"))
        _check_size(height, width)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is not there, but {listing} lists it; add it, or take its line out.") from None
    except (ET.ParseError, LookupError, OSError, ValueError) as error:
        raise ValueError(
            f"{file} is no annotation in VOC's format, with the image's size, and a name and a bndbox for each object: "
            f"{error}."
        ) from error
    names = (file.stem + spelled for suffix in SUFFIXES for spelled in (suffix, suffix.upper()))
    image = next((path for name in names if (path := images / name).is_file()), None)
    return _Entry(file, image or images / f"{file.stem}.jpg", file.stem, height, width, objects)


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1 or max(height, width) > LONGEST_SIDE:
        raise ValueError(f"an image of {width} x {height} pixels")


def _voc_box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
    # VOC counts pixels from 1 and the last belongs to the box. But where first and last are one, nothing was drawn.
    return (left - 1, top - 1, right, bottom) if left < right and top < bottom else (left, top, right, bottom)


def _read_coco(images: Path, file: Path) -> tuple[list[_Entry], list[str]]:
    if not images.is_dir():
        raise FileNotFoundError(f"{images} is no folder; COCO's layout is a folder of images with {file.name}.")
    try:
        data = json.loads(file.read_bytes())
        categories = {int(x["id"]): str(x["name"]) for x in sorted(data["categories"], key=lambda x: int(x["id"]))}
        objects: dict[int, list[_Object]] = {int(x["id"]): [] for x in data["images"]}
        if len(objects) < len(data["images"]):
            raise ValueError(f"its {len(data['images'])} images have {len(objects)} different ids")
        for x in data["annotations"]:
            image, category = int(x["image_id"]), int(x["category_id"])
            if image not in objects:
                raise ValueError(f"annotation {x['id']} is of image {image}, which is not among its images")
            if category not in categories:
                raise ValueError(f"annotation {x['id']} has the category {category}, which it does not name")
            left, top, width, height = map(float, x["bbox"])
            box = (left, top, left + width, top + height)
            objects[image].append(_Object(categories[category], box, crowd=bool(x.get("iscrowd", 0))))
        entries = []
        for x in data["images"]:
            number, height, width = (int(x[key]) for key in ("id", "height", "width"))
            _check_size(height, width)
            entries.append(_Entry(file, images / x["file_name"], number, height, width, objects[number]))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file} is not there; it holds the annotations of {images} in COCO's format."
        ) from None
    except KeyError as error:
        raise ValueError(f"{file} is no annotation in COCO's format: it lacks {error}.") from error
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no annotation in COCO's format: {error}.") from error
    return entries, list(categories.values())


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return "There is no such folder."
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return f"It holds: {', '.join(names[:10]) or 'nothing'}{', ...' if len(names) > 10 else ''}."


class Detections(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images with their boxes as torchvision's detectors and transforms take them.

    An item is `(image, target)`: the image uint8 `(3, H, W)`, the target with the boxes as `tv_tensors.BoundingBoxes`
    `(n, 4)` (left, top, right, bottom), the labels `(n,)` from 1 on (0 is the background), and `crowd` and `difficult`.

    Raises:
        ValueError: on access, an image that cannot be decoded, or is upright not of the size that its annotation gives.
    """

    def __init__(self, annotations: Annotations) -> None:
        self.records = annotations.records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        record = self.records[index]
        image = tv_tensors.Image(read_image(record.image))
        size = (record.height, record.width)
        if image.shape[1:] != size:
            with Image.open(record.image) as file:
                stored = (file.height, file.width)
            raise ValueError(
                f"{record.image} is {image.shape[2]} x {image.shape[1]} pixels, but its annotation says "
                f"{record.width} x {record.height}; "
                + (
                    "that is how it is stored, before its EXIF orientation turns it upright. Take the tag out, if the "
                    "boxes are right on the stored pixels, or give size and boxes of the upright image."
                    if stored == size
                    else "correct the annotation, boxes included."
                )
            )
        boxes = tv_tensors.BoundingBoxes(record.boxes, format="XYXY", canvas_size=size)
        target = {"boxes": boxes, "labels": record.labels + 1, "crowd": record.crowd, "difficult": record.difficult}
        return image, target
