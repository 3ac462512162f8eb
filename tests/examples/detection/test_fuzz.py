"""Broken annotations end in the errors that are documented, which name the file, and no file is changed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import strategies as st

from tests.examples.detection import rectangles
from tests.fuzzing import broken_bytes, broken_tree, feed

EXAMPLE = Path(__file__).parents[3] / "examples" / "detection"

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")
ERRORS = (FileNotFoundError, ValueError)


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("datasets")


def test_broken_coco(datasets: ModuleType, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    source = rectangles.coco(tmp_path / "coco", 3)
    file = Path(source.rpartition(":")[2])
    whole = file.read_bytes()
    deep = b"[" * 100_000
    inputs = st.one_of(
        broken_tree(json.loads(whole)).map(lambda x: json.dumps(x).encode()), broken_bytes(whole), st.just(deep)
    )
    feed(inputs, file.write_bytes, lambda: datasets.read([source]), tmp_path, record_property, 1000, ERRORS)


@pytest.mark.parametrize("broken", ["annotation", "listing"])
def test_broken_voc(
    datasets: ModuleType, tmp_path: Path, record_property: Callable[[str, object], None], broken: str
) -> None:
    source = rectangles.voc(tmp_path, "train", 2)
    file = tmp_path / {"annotation": "Annotations/train1.xml", "listing": "ImageSets/Main/train.txt"}[broken]
    whole = file.read_bytes()
    encodings = st.sampled_from(["utf-7", "utf-32", "latin-1", "nonsense", "cp037"])
    heads = encodings.map(lambda name: f'<?xml version="1.0" encoding="{name}"?>'.encode() + whole)
    feed(
        st.one_of(broken_bytes(whole), heads),
        file.write_bytes,
        lambda: datasets.read([source]),
        tmp_path,
        record_property,
        500,
        ERRORS,
    )


def test_two_images_of_one_number_are_refused(datasets: ModuleType, tmp_path: Path) -> None:
    source = rectangles.coco(tmp_path / "coco", 3)
    file = Path(source.rpartition(":")[2])
    content = json.loads(file.read_text())
    content["images"][1]["id"] = content["images"][0]["id"]
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] != 101]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its 3 images have 2 different ids"):
        datasets.read([source])


def test_numbers_written_as_text_are_numbers(datasets: ModuleType, tmp_path: Path) -> None:
    source = rectangles.coco(tmp_path / "coco", 3)
    file = Path(source.rpartition(":")[2])
    expected = datasets.read([source])
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["id"] = str(image["id"])
    file.write_text(json.dumps(content))
    found = datasets.read([source])
    assert [r.image_id for r in found.records] == [r.image_id for r in expected.records]
    assert all(a.boxes.equal(b.boxes) for a, b in zip(found.records, expected.records, strict=True))
