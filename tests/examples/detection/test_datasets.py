"""Both layouts say the same, and whatever is wrong with them is said at once."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_pil_image

from tests.examples.detection import rectangles

EXAMPLE = Path(__file__).parents[3] / "examples" / "detection"

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("datasets")


def test_voc_and_coco_say_the_same(datasets: ModuleType, tmp_path: Path) -> None:
    voc = datasets.read([rectangles.voc(tmp_path / "voc", "train", 3)])
    coco = datasets.read([rectangles.coco(tmp_path / "coco", 3)])
    assert voc.classes == coco.classes == ["blue", "red"]
    for index, (a, b) in enumerate(zip(voc.records, coco.records, strict=True)):
        _, boxes = rectangles.picture(index)
        assert a.boxes.tolist() == b.boxes.tolist() == [list(map(float, box)) for box in boxes.values()]
        assert a.labels.tolist() == b.labels.tolist() == [0, 1]
        assert (a.width, a.height) == (b.width, b.height) == (64, 64)
    assert [record.image_id for record in voc.records] == ["train0", "train1", "train2"]
    assert [record.image_id for record in coco.records] == [100, 101, 102]


def test_sources_are_joined(datasets: ModuleType, tmp_path: Path) -> None:
    sources = [rectangles.voc(tmp_path / "07", "trainval", 2), rectangles.voc(tmp_path / "12", "trainval", 3)]
    assert len(datasets.read([*sources, rectangles.coco(tmp_path / "coco", 4)]).records) == 9


def test_classes_by_name_order_the_labels(datasets: ModuleType, tmp_path: Path) -> None:
    found = datasets.read([rectangles.voc(tmp_path, "train", 1)], classes=["red", "blue", "green"])
    assert found.classes == ["red", "blue", "green"]
    assert found.records[0].labels.tolist() == [1, 0]


def test_an_image_without_boxes_is_a_negative(datasets: ModuleType, tmp_path: Path) -> None:
    source = rectangles.voc(tmp_path, "train", 2)
    rectangles.annotate(tmp_path, "train1", {})
    found = datasets.read([source])
    assert found.records[1].boxes.shape == (0, 4)
    assert str(found) == "2 images (1 without boxes), 2 boxes (0 bad ones skipped), 2 classes: blue, red"


def test_crowds_and_difficult_boxes_are_marked(datasets: ModuleType, tmp_path: Path) -> None:
    folder, _, file = rectangles.coco(tmp_path / "coco", 1).rpartition(":")
    content = json.loads(Path(file).read_text())
    content["annotations"][0]["iscrowd"] = 1
    Path(file).write_text(json.dumps(content))
    assert datasets.read([f"{folder}:{file}"]).records[0].crowd.tolist() == [True, False]

    source = rectangles.voc(tmp_path / "voc", "train", 1)
    annotation = tmp_path / "voc" / "Annotations" / "train0.xml"
    annotation.write_text(annotation.read_text().replace("</name>", "</name><difficult>1</difficult>", 1))
    assert datasets.read([source]).records[0].difficult.tolist() == [True, False]


def test_a_pixel_of_rounding_is_cut_off(datasets: ModuleType, tmp_path: Path) -> None:
    source = rectangles.voc(tmp_path, "train", 1)
    rectangles.annotate(tmp_path, "train0", {"red": (-1, 5, 65, 20)})  # as by a tool that counts from 0
    assert datasets.read([source]).records[0].boxes.tolist() == [[0, 5, 64, 20]]


@pytest.mark.parametrize(
    "box",
    [
        (10, 10, 70, 20),
        (-5, 10, 20, 20),
        (20, 10, 21, 11),
        (30, 10, 20, 20),
        (65, 10, 65.5, 20),  # flat at the border
    ],
)
def test_bad_boxes_are_named_or_counted(
    datasets: ModuleType, tmp_path: Path, box: tuple[float, float, float, float]
) -> None:
    source = rectangles.voc(tmp_path, "train", 1)
    rectangles.annotate(tmp_path, "train0", {"red": box, "blue": (1, 1, 20, 20)})
    with pytest.raises(ValueError, match=r"1 boxes .*\n.*train0.xml: red at left .* of 64 x 64\n.*--skip-bad-boxes"):
        datasets.read([source])
    found = datasets.read([source], skip_bad_boxes=True)
    assert found.skipped == 1
    assert found.records[0].boxes.tolist() == [[1, 1, 20, 20]]


def _without_image(root: Path) -> None:
    (root / "JPEGImages" / "train1.png").unlink()


def _empty_image(root: Path) -> None:
    (root / "JPEGImages" / "train1.png").write_bytes(b"")


def _without_annotation(root: Path) -> None:
    (root / "Annotations" / "train1.xml").unlink()


def _cut_short(root: Path) -> None:
    (root / "Annotations" / "train1.xml").write_text("<annotation><object>")


def _without_size(root: Path) -> None:
    (root / "Annotations" / "train1.xml").write_text("<annotation></annotation>")


def _unknown_class(root: Path) -> None:
    rectangles.annotate(root, "train1", {"green": (1, 1, 20, 20)})


def _without_split(root: Path) -> None:
    (root / "ImageSets" / "Main" / "train.txt").rename(root / "ImageSets" / "Main" / "val.txt")


def _neither_layout(root: Path) -> None:
    (root / "JPEGImages").rename(root / "photographs")


def _without_boxes(root: Path) -> None:
    for index in range(2):
        rectangles.annotate(root, f"train{index}", {})


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_without_image, FileNotFoundError, r"train1.xml annotates .*train1.jpg, which is not there; add"),
        (_empty_image, ValueError, r"train1.png is an empty file; put"),
        (_without_annotation, FileNotFoundError, r"train1.xml is not there, but .*train.txt lists it; add"),
        (_cut_short, ValueError, r"train1.xml is no annotation in VOC's format"),
        (_without_size, ValueError, r"train1.xml is no annotation in VOC's format, with the image's size"),
        (_unknown_class, ValueError, r"train1.xml has the class 'green', which is not among blue, red; add"),
        (_without_split, FileNotFoundError, r"train.txt is not there; the splits of .* are: val"),
        (_neither_layout, FileNotFoundError, r"in neither layout.* holds: Annotations/, ImageSets/, photographs/"),
        (_without_boxes, ValueError, r"there is no box in .*:train"),
    ],
)
def test_what_is_wrong_with_voc(
    datasets: ModuleType, tmp_path: Path, spoil: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    source = rectangles.voc(tmp_path, "train", 2)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        datasets.read([source], classes=["blue", "red"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("images", [], r"annotation 0 is of image 100, which is not among its images"),
        ("categories", [{"id": 10, "name": "blue"}], r"annotation 1 has the category 20, which it does not name"),
        ("categories", None, r"it lacks 'categories'"),
    ],
)
def test_what_is_wrong_with_coco(datasets: ModuleType, tmp_path: Path, key: str, value: object, message: str) -> None:
    folder, _, file = rectangles.coco(tmp_path / "coco", 1).rpartition(":")
    content = json.loads(Path(file).read_text())
    content[key] = value
    if value is None:
        del content[key]
    Path(file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        datasets.read([f"{folder}:{file}"])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("folder", ValueError, "'folder' is no source; write ROOT:SPLIT"),
        ("folder:train", FileNotFoundError, "folder is in neither layout.*There is no such folder"),
        ("folder:file.json", FileNotFoundError, "folder is no folder"),
        ("{}:file.json", FileNotFoundError, "file.json is not there; it holds the annotations"),
    ],
)
def test_what_is_no_source(
    datasets: ModuleType, tmp_path: Path, source: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        datasets.read([source.format(tmp_path)])


def test_items_as_torchvision_takes_them(datasets: ModuleType, tmp_path: Path) -> None:
    image, target = datasets.Detections(datasets.read([rectangles.voc(tmp_path, "train", 1)]))[0]
    assert torch.equal(image, rectangles.picture(0)[0])
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].canvas_size == (64, 64)
    assert target["labels"].tolist() == [1, 2]


def test_images_that_differ_from_their_annotation(datasets: ModuleType, tmp_path: Path) -> None:
    source = rectangles.voc(tmp_path, "train", 2)
    rectangles.annotate(tmp_path, "train0", rectangles.picture(0)[1], side=100)
    (tmp_path / "JPEGImages" / "train1.png").write_bytes(b"no picture")
    items = datasets.Detections(datasets.read([source]))
    with pytest.raises(ValueError, match=r"train0.png is 64 x 64 pixels, but its annotation says 100 x 100"):
        items[0]
    with pytest.raises(ValueError, match=r"train1.png \(10 bytes\) cannot be decoded"):
        items[1]


@pytest.mark.parametrize(("orientation", "turn"), [(2, lambda x: x.flip(2)), (3, lambda x: x.flip(1, 2)), (6, None)])
def test_boxes_are_those_of_the_upright_image(
    datasets: ModuleType, tmp_path: Path, orientation: int, turn: Callable[[Tensor], Tensor] | None
) -> None:
    source = rectangles.voc(tmp_path, "train", 1)
    upright, _ = rectangles.picture(0)
    stored = turn(upright) if turn else upright.rot90(1, (1, 2))
    tags = Image.Exif()
    tags[0x0112] = orientation
    to_pil_image(stored).save(tmp_path / "JPEGImages" / "train0.png", exif=tags)
    image, target = datasets.Detections(datasets.read([source]))[0]
    for (left, top, right, bottom), colour in zip(
        target["boxes"].int().tolist(), rectangles.COLOURS.values(), strict=True
    ):
        inside = image[:, top:bottom, left:right]
        assert torch.equal(inside, torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand_as(inside))


def test_an_annotation_of_the_stored_pixels_is_told(datasets: ModuleType, tmp_path: Path) -> None:
    folder, _, file = rectangles.coco(tmp_path / "coco", 1).rpartition(":")
    tags = Image.Exif()
    tags[0x0112] = 8
    Image.new("RGB", (64, 32)).save(Path(folder) / "0.png", exif=tags)
    content = json.loads(Path(file).read_text())
    content["images"][0]["height"] = 32
    content["annotations"] = [content["annotations"][0] | {"bbox": [0, 0, 10, 10]}]
    Path(file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"32 x 64 pixels, but .* 64 x 32; that is how it is stored, before its EXIF"):
        datasets.Detections(datasets.read([f"{folder}:{file}"]))[0]


def test_sixteen_bits_of_grey_stay_grey(datasets: ModuleType, tmp_path: Path) -> None:
    source = rectangles.voc(tmp_path, "train", 1)
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "JPEGImages" / "train0.png")
    image, _ = datasets.Detections(datasets.read([source]))[0]
    assert torch.equal(image, torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, -1, -1))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_encodings_of_annotations(datasets: ModuleType, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "雪 2.png").write_bytes(b"an image")
    (tmp_path / "x.json").write_bytes(json.dumps(one_box("雪 2.png", 64), ensure_ascii=False).encode(encoding))
    assert datasets.read([f"{tmp_path}:{tmp_path / 'x.json'}"]).classes == ["café"]


@pytest.mark.parametrize("side", [0, -1, 2**31, 2**63])
def test_a_size_that_no_image_has(datasets: ModuleType, tmp_path: Path, side: int) -> None:
    (tmp_path / "0.png").write_bytes(b"an image")
    (tmp_path / "x.json").write_text(json.dumps(one_box("0.png", side)))
    with pytest.raises(ValueError, match=rf"x.json is no annotation in COCO's format: an image of 64 x {side} pixels"):
        datasets.read([f"{tmp_path}:{tmp_path / 'x.json'}"])


def one_box(image: str, height: int) -> dict[str, Any]:
    """Annotations of one image."""
    return {
        "images": [{"id": 1, "file_name": image, "height": height, "width": 64}],
        "categories": [{"id": 1, "name": "café"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 30, 20]}],
    }
