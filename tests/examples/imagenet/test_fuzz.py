"""Broken folders, shards and lists end in the errors that are documented, which name the file, and none is changed."""

from __future__ import annotations

import importlib
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import strategies as st

from tests.examples.imagenet.test_data import encoded, make_folder, make_shards
from tests.fuzzing import broken_bytes, feed

EXAMPLES = Path(__file__).parents[3] / "examples" / "imagenet"

pytestmark = [
    pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not here"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
ERRORS = (FileNotFoundError, ValueError)
Record = Callable[[str, object], None]


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("data")


def read_all(data: ModuleType, root: Path, **options: object) -> None:
    images = data.images(data.DataConfig(root, **options), "unlabelled")
    for index in range(len(images)):
        images[index]


def test_broken_shards(data: ModuleType, tmp_path: Path, record_property: Record) -> None:
    make_shards(tmp_path, shards=1, each=2)
    shutil.rmtree(tmp_path / "val")
    file = tmp_path / "train" / "000.tar"
    whole = file.read_bytes()
    headers = st.lists(st.tuples(st.sampled_from(range(0, 4096, 512)), st.integers(0, 511), st.integers(0, 255)))

    def changed(places: list[tuple[int, int, int]]) -> bytes:
        content = bytearray(whole)
        for block, at, value in places:
            content[block + at] = value
        return bytes(content)

    inputs = st.one_of(broken_bytes(whole), headers.map(changed), st.just(whole + whole))
    feed(
        inputs,
        file.write_bytes,
        lambda: read_all(data, tmp_path, dataset="webdataset"),
        tmp_path,
        record_property,
        600,
        ERRORS,
    )


def test_broken_images(data: ModuleType, tmp_path: Path, record_property: Record) -> None:
    make_folder(tmp_path, splits=("train",), classes="a", each=2)
    file = tmp_path / "train" / "a" / "a_1.png"
    inputs = st.one_of(*(broken_bytes(encoded(0, kind)) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF")))
    feed(inputs, file.write_bytes, lambda: read_all(data, tmp_path), tmp_path, record_property, 600, ERRORS)


def test_broken_labels_in_shards(data: ModuleType, tmp_path: Path, record_property: Record) -> None:
    (tmp_path / "train").mkdir()
    file = tmp_path / "train" / "000.tar"
    deep = b"[" * 100_000

    def write(content: tuple[str, bytes]) -> None:
        suffix, label = content
        with tarfile.open(file, "w") as tar:
            for name, part in (("1.png", encoded(1)), (f"1{suffix}", label)):
                member = tarfile.TarInfo(name)
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))

    numbers = st.one_of(st.integers(), st.integers(2**24, 2**70)).map(lambda x: str(x).encode())
    labels = st.one_of(numbers, broken_bytes(b'{"label": 3}'), st.binary(max_size=9), st.just(deep))
    feed(
        st.tuples(st.sampled_from([".cls", ".json"]), labels),
        write,
        lambda: read_all(data, tmp_path, dataset="webdataset"),
        tmp_path,
        record_property,
        500,
        ERRORS,
    )


def test_broken_lists(data: ModuleType, tmp_path: Path, record_property: Record) -> None:
    make_folder(tmp_path, splits=("train",), classes="ab", each=1)
    (tmp_path / "val" / "images").mkdir(parents=True)
    (tmp_path / "val" / "images" / "val_0.png").write_bytes(encoded(5))
    file = tmp_path / "val" / "val_annotations.txt"
    whole = b"val_0.png\ta\t0\t0\t9\t9\n"

    def read() -> None:
        images = data.images(data.DataConfig(tmp_path, dataset="tiny-imagenet"), "val")
        for index in range(len(images)):
            images[index]

    feed(broken_bytes(whole), file.write_bytes, read, tmp_path, record_property, 500, ERRORS)


@pytest.mark.parametrize("cut", [512, 1024])
def test_no_image_of_a_broken_shard_is_dropped_in_silence(data: ModuleType, tmp_path: Path, cut: int) -> None:
    path = make_shards(tmp_path, shards=1, each=2) / "train" / "000.tar"
    whole = path.read_bytes()
    assert len(data.shard_samples(path)) == 2
    with tarfile.open(path) as tar:
        second = tar.getmembers()[2].offset

    path.write_bytes(whole[:second])
    with pytest.raises(ValueError, match=rf"000.tar .* ends after {second} bytes without the zeros .* cut short"):
        data.shard_samples(path)
    path.write_bytes(whole[:second] + b"x" * cut + whole[second + cut :])
    with pytest.raises(ValueError, match=rf"from byte {second} on it holds what is no file of it: a broken header"):
        data.shard_samples(path)
    path.write_bytes(whole + whole)
    with pytest.raises(ValueError, match="archives that were joined, which `tar --ignore-zeros` unpacks"):
        data.shard_samples(path)
