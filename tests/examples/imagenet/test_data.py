"""The images of every layout, and batches that follow from seed, epoch and step alone."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cgh import views

EXAMPLES = Path(__file__).parents[3] / "examples" / "imagenet"

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not here")


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def picture(seed: int, side: int = 24) -> Image.Image:
    """A small picture that its seed alone decides."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def encoded(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


def make_folder(root: Path, *, splits: tuple[str, ...] = ("train", "val"), classes: str = "abc", each: int = 4) -> Path:
    for split in splits:
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                (folder / f"{name}_{i}.png").write_bytes(encoded(10 * number + i))
    return root


def make_shards(root: Path, shards: int = 3, each: int = 4) -> Path:
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for shard in range(shards):
            with tarfile.open(root / split / f"{shard:03}.tar", "w") as tar:
                for i in range(each):
                    seed = shard * each + i
                    for suffix, content in (("png", encoded(seed)), ("cls", str(seed % 3).encode())):
                        member = tarfile.TarInfo(f"{seed:05}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return root


def load(root: Path, split: str = "train", dataset: str = "folder", **options: Any) -> Any:
    from data import DataConfig, images

    return images(DataConfig(root, dataset, **options), split)


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# Layouts


def test_an_image_folder(tmp_path: Path) -> None:
    data = load(make_folder(tmp_path))
    assert data.classes == ["a", "b", "c"]
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    image, label = data[6]
    assert label == 1
    assert torch.equal(image, pixels(picture(12)))


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_validation_may_be_called_otherwise(tmp_path: Path, val: str) -> None:
    data = load(make_folder(tmp_path, splits=("train", val)), "val")
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_plain_folder_of_classes_or_of_images_is_enough_to_train_on(tmp_path: Path) -> None:
    make_folder(tmp_path, splits=(".",))
    assert len(load(tmp_path)) == len(load(tmp_path, "unlabelled")) == 12
    assert load(tmp_path / "a", "unlabelled").labels.tolist() == [-1] * 4


@pytest.mark.parametrize("index", [12, -13])
def test_images_end(tmp_path: Path, index: int) -> None:
    data = load(make_folder(tmp_path))
    assert len(list(islice(iter(data), 50))) == 12
    assert torch.equal(data[-1][0], data[11][0])
    with pytest.raises(IndexError, match=f"there is no image {index} among 12"):
        data[index]


def test_stl10_folders_have_an_unlabelled_part(tmp_path: Path) -> None:
    make_folder(tmp_path, splits=("train", "test"))
    make_folder(tmp_path, splits=("unlabeled",), classes="x")
    data = load(tmp_path, "unlabelled", "stl10")
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [-1] * 4
    assert len(load(tmp_path, "train", "stl10")) == 12


def test_cifar_as_torchvision_unpacks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: setattr(self, "classes", ["plane", "car"]))
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        rows = [pixels(picture(i, side=32)).flatten().numpy() for i in range(2)]
        (folder / name).write_bytes(pickle.dumps({"data": np.stack(rows), "labels": [0, 1]}))
    data = load(tmp_path, "train", "cifar10")
    assert data.classes == ["plane", "car"]
    assert data.labels.tolist() == [0, 1] * 5
    assert torch.equal(data[1][0], pixels(picture(1, side=32)))
    assert len(load(tmp_path, "val", "cifar10")) == 2


def test_stl10_as_torchvision_unpacks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import STL10

    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("bird\ncat\n")
    for part, count in (("train", 2), ("test", 2), ("unlabeled", 3)):
        # Files hold columns, not rows.
        images = [np.array(picture(i, side=96)).transpose(2, 1, 0).tobytes() for i in range(count)]
        (folder / f"{part}_X.bin").write_bytes(b"".join(images))
        (folder / f"{part}_y.bin").write_bytes(bytes([1, 2]))
    data = load(tmp_path, "unlabelled", "stl10")
    assert data.labels.tolist() == [0, 1, -1, -1, -1]
    assert torch.equal(data[4][0], pixels(picture(2, side=96)))
    assert load(tmp_path, "val", "stl10").classes == ["bird", "cat"]


@pytest.mark.parametrize("sorted_already", [False, True])
def test_tiny_imagenet(tmp_path: Path, sorted_already: bool) -> None:
    for name in "ab":
        images = tmp_path / "train" / name / "images"
        images.mkdir(parents=True)
        (images / f"{name}_0.JPEG").write_bytes(encoded(0, "JPEG"))
        (images.parent / f"{name}_boxes.txt").write_text("")
    if sorted_already:
        make_folder(tmp_path, splits=("val",), classes="ab", each=1)
    else:
        (tmp_path / "val" / "images").mkdir(parents=True)
        (tmp_path / "val" / "images" / "val_0.JPEG").write_bytes(encoded(1))
        (tmp_path / "val" / "images" / "val_1.JPEG").write_bytes(encoded(0))
        (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tb\t0\t0\t1\t1\nval_1.JPEG\ta\t0\t0\t1\t1\n")
    assert load(tmp_path, "train", "tiny-imagenet").labels.tolist() == [0, 1]
    data = load(tmp_path, "val", "tiny-imagenet")
    assert data.labels.tolist() == ([0, 1] if sorted_already else [1, 0])
    assert data.classes == ["a", "b"]


def test_tar_shards(tmp_path: Path) -> None:
    data = load(make_shards(tmp_path), "train", "webdataset")
    assert data.labels.tolist() == [i % 3 for i in range(12)]
    assert data.classes == ["0", "1", "2"]
    for i in (0, 5, 11):
        assert torch.equal(data[i][0], pixels(picture(i)))


def test_the_index_of_shards_is_kept_and_follows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data

    before = load(make_shards(tmp_path), "train", "webdataset")
    assert (tmp_path / "train-index.npz").exists()
    with monkeypatch.context() as patch:
        patch.setattr(data, "shard_samples", None)
        again = load(tmp_path, "train", "webdataset")
    assert all(torch.equal(again[i][0], before[i][0]) for i in range(12))
    (tmp_path / "train" / "000.tar").unlink()
    assert len(load(tmp_path, "train", "webdataset")) == 8


def test_the_index_of_shards_knows_their_names(tmp_path: Path) -> None:
    shards = [make_shard(tmp_path / "train" / f"{i}.tar", {"a.png": encoded(i), "a.cls": b"%d" % i}) for i in range(2)]
    for shard in shards:
        os.utime(shard, (1, 1))
    assert shards[0].stat().st_size == shards[1].stat().st_size
    assert load(tmp_path, "train", "webdataset").labels.tolist() == [0, 1]
    shards[0].rename(tmp_path / "train" / "2.tar")
    data = load(tmp_path, "train", "webdataset")
    assert data.labels.tolist() == [1, 0]
    assert torch.equal(data[0][0], pixels(picture(1)))


def test_shards_are_told_in_any_case(tmp_path: Path) -> None:
    for name in ("Train/0.tar", "Train/1.TAR", "Val-0.tar", "VAL-1.Tar"):
        make_shard(tmp_path / name, {"a.png": None, "a.cls": b"1"})
    assert len(load(tmp_path, "train", "webdataset")) == len(load(tmp_path, "val", "webdataset")) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/0.tar", "train/1.tar.gz"], r"1 of 2 shards are compressed, such as .*train/1.tar.gz: decompress them"),
        (["train-0.tar", "train-1.TGZ"], r"1 of 2 shards are compressed, such as .*train-1.TGZ"),
        (["train/0.tar.zst", "train/1.tbz2"], r"2 of 2 shards are compressed, such as .*train/0.tar.zst"),
        (
            ["train/0.tar", "train/sub/1.tar"],
            r"1 of 2 shards lie in folders inside .*, such as .*/sub/1.tar: move",
        ),
        (["train-0.tar", "val-not-train.tar"], r"1 shards that are named after both train and val: val-not-train.tar"),
        (["train/0.tar", "more-train-1.tar"], r"1 shards in train/ and 1 beside it: more-train-1.tar. Move these into"),
    ],
)
def test_shards_that_would_be_left_out_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        make_shard(tmp_path / name, {"a.png": None, "a.cls": b"1"})
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "train", "webdataset")


def test_what_is_no_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(ValueError, match=r"train-0.tar is no uncompressed tar file of images"):
        load(tmp_path, "train", "webdataset")


def test_shards_as_webdataset_writes_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "my-train-0.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"image{i}", "png": encoded(i), "cls": i, "json": {"ignored": i}})
    data = load(tmp_path, "train", "webdataset")
    assert data.labels.tolist() == [0, 1, 2]
    assert torch.equal(data[2][0], pixels(picture(2)))


def make_shard(path: Path, files: dict[str, bytes | None], links: dict[str, str] | None = None) -> Path:
    """A tar file of these files, an image each where there is no content, and of hard links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, (name, content) in enumerate(files.items()):
            member, content = tarfile.TarInfo(name), encoded(number) if content is None else content
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, target
            tar.addfile(member)
    return path


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"22.05.png": None, "22.05.cls": b"1", "22.06.png": None, "22.06.cls": b"2\n"},
            {"22.05.png": 1, "22.06.png": 2},
        ),
        ({"photo.v2.png": None, "photo.v2.cls": b"1"}, {"photo.v2.png": 1}),
        ({"./train/a.left.png": None, "./train/a.cls": b"3"}, {"./train/a.left.png": 3}),
        ({"x/0.png": None, "x/0.cls": b"0", "y/0.png": None, "y/0.cls": b"1"}, {"x/0.png": 0, "y/0.png": 1}),
        ({"a.PNG": None, "a.json": b'{"label": 3, "caption": "a cat"}'}, {"a.PNG": 3}),
        ({"A.JPG": None, "A.CLS": b"3", "B.JPG": None, "B.JSON": b'{"cls": 2}'}, {"A.JPG": 3, "B.JPG": 2}),
        ({"a.png": None, "a.json": b'{"caption": "a cat"}'}, {"a.png": -1}),
        ({"a.png": None, "__MACOSX/._a.png": b"attributes", "._a.png": b"attributes"}, {"a.png": -1}),
        ({os.fsdecode(b"caf\xe9.png"): None}, {os.fsdecode(b"caf\xe9.png"): -1}),
    ],
)
def test_names_in_shards(tmp_path: Path, files: dict[str, bytes | None], expected: dict[str, int]) -> None:
    make_shard(tmp_path / "train" / "0.tar", files)
    data = load(tmp_path, "unlabelled", "webdataset")
    assert dict(zip(map(os.fsdecode, data.source.names.tolist()), data.labels.tolist(), strict=True)) == expected
    assert torch.equal(data[0][0], pixels(picture(0)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.jpg": None, "a.png": None, "a.cls": b"0"},
            "2 images whose names .* such as a.jpg, a.png: .*--shard-images",
        ),
        ({"a.jpg": None, "a.mask.png": None, "a.cls": b"0"}, "2 images whose names .* a.mask.png"),
        ({"22.05.png": None, "22.06.png": None}, "2 images whose names .* 22.05.png, 22.06.png"),
        ({"a.png": None, "a.cls": b"cat"}, "0.tar:a.cls holds b'cat'; a label is an integer"),
        ({"a.png": None, "a.json": b'{"label": "cat"}'}, "0.tar:a.json holds .*; a label is an integer"),
        ({"a.png": None, "a.json": b"{"}, "0.tar:a.json holds"),
    ],
)
def test_what_cannot_be_told_of_a_shard_is_refused(
    tmp_path: Path, files: dict[str, bytes | None], message: str
) -> None:
    make_shard(tmp_path / "train" / "0.tar", files)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "train", "webdataset")


def test_images_of_shards_without_label_are_no_evaluation(tmp_path: Path) -> None:
    from evaluation import labelled

    make_shard(tmp_path / "train" / "0.tar", {"a.png": None, "a.cls": b"1", "b.png": None})
    with pytest.raises(ValueError, match=r"1 of 2 images have no label, such as b.png"):
        labelled(load(tmp_path, "train", "webdataset"))


def test_the_images_of_a_shard_are_told_from_their_masks_by_a_suffix(tmp_path: Path) -> None:
    files = {"a.jpg": None, "a.png": None, "a.cls": b"4", "b.jpg": None, "b.seg.png": None, "b.v2.jpg": None}
    make_shard(tmp_path / "train" / "0.tar", files)
    for suffix, expected in ((".jpg", {b"a.jpg": 4, b"b.jpg": -1, b"b.v2.jpg": -1}), ("seg.png", {b"b.seg.png": -1})):
        data = load(tmp_path, "train", "webdataset", shard_images=suffix)
        assert dict(zip(data.source.names.tolist(), data.labels.tolist(), strict=True)) == expected


def test_links_in_shards(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "train" / "0.tar", {"a.png": None}, {"b.png": "a.png"})
    data = load(tmp_path, "train", "webdataset")
    assert len(data) == 2
    assert torch.equal(data[1][0], pixels(picture(0)))
    make_shard(shard, {"a.png": None}, {"b.png": "c.png"})
    with pytest.raises(ValueError, match="b.png is a link to c.png, which is not in it"):
        load(tmp_path, "train", "webdataset")


def test_what_tools_keep_beside_shards_is_none(tmp_path: Path) -> None:
    make_shard(tmp_path / "train" / "0.tar", {"a.png": None, "a.cls": b"1"})
    for name in ("._0.tar", ".cache/0.tar", "0.tar.idx", "__MACOSX/._0.tar.gz"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"attributes")
    assert load(tmp_path, "train", "webdataset").labels.tolist() == [1]


def test_a_broken_index_is_written_anew(tmp_path: Path) -> None:
    load(make_shards(tmp_path), "train", "webdataset")
    index = tmp_path / "train-index.npz"
    for content in (index.read_bytes()[:100], b"", b"no index"):
        index.write_bytes(content)
        with pytest.warns(UserWarning, match="train-index.npz cannot be read, so it is written anew"):
            assert len(load(tmp_path, "train", "webdataset")) == 12
        assert len(load(tmp_path, "train", "webdataset")) == 12


# What real folders hold


def make_files(root: Path, *names: str | bytes) -> Path:
    """A folder of images at these paths; a path that ends with a slash is an empty folder."""
    for number, name in enumerate(names):
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.fsencode(name).endswith(b"/"):
            path.mkdir(parents=True)
        else:
            path.write_bytes(encoded(number))
    return root


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (["1.png", "2.bmp", "3.TIF", "more/4.jfif"], [0, -1, -1, -1], ["more"]),
        (["1.png", "2.png", ".ipynb_checkpoints/1-checkpoint.png", "@eaDir/1.png", "._1.png"], [-1, -1], []),
        (["train/a/1.png", "train/b/2.png", "train/.ipynb_checkpoints/1.png", "train/__MACOSX/"], [0, 1], ["a", "b"]),
        (["train/a/1.png", "train/a/.thumbnails/1.png", "train/a/deep/er/2.png", "train/b/.x.png"], [0, 0], ["a", "b"]),
        (["train/a/1.png", "train/2.png", "unlabeled/3.png", "unlabeled/.cache/3.png"], [0, -1, -1], ["a"]),
        ([b"train/caf\xe9/\xff.png", "train/x/雪 2.png"], [0, 1], [os.fsdecode(b"caf\xe9"), "x"]),
        (["Train/a/1.png", "Train/b.c/2.v2.JPEG", "VAL/a/3.png", "VAL/b.c/4.png"], [0, 1], ["a", "b.c"]),
    ],
)
def test_every_image_once_and_no_hidden_folder_a_class(
    tmp_path: Path, names: list[str | bytes], labels: list[int], classes: list[str]
) -> None:
    data = load(make_files(tmp_path, *names), "unlabelled")
    assert (data.labels.tolist(), data.classes) == (labels, sorted(classes))
    seen = {data[i][0].numpy().tobytes() for i in range(len(data))}
    assert len(seen) == len(labels)


def test_the_folders_of_splits_are_told_in_any_case(tmp_path: Path) -> None:
    root = make_files(tmp_path, "Train/a/1.png", "Train/b/2.png", "Test/a/3.png", "Test/b/4.png", "Unlabeled/5.png")
    assert load(root, "val").labels.tolist() == [0, 1]
    assert load(root, "train").labels.tolist() == [0, 1]
    assert load(root, "unlabelled").labels.tolist() == [0, 1, -1]


@pytest.mark.parametrize("name", ["2.heic", "2.HEIF", "2.jxl"])
def test_a_photograph_that_is_not_decoded_is_told_and_not_passed_over(tmp_path: Path, name: str) -> None:
    from files import BadImageError

    root = make_files(tmp_path, "1.png")
    (root / name).write_bytes(b"no format that Pillow knows")
    data = load(root, "unlabelled")
    assert len(data) == 2
    with pytest.raises(BadImageError, match=f"{name} .* cannot be decoded"):
        _ = data[1]


def test_links_are_followed(tmp_path: Path) -> None:
    root = make_files(tmp_path / "data", "train/a/0.png", "unlabeled/1.png")
    make_files(tmp_path / "disk", "2.png", "deep/3.png")
    (root / "train" / "b").symlink_to(tmp_path / "disk")
    (root / "unlabeled" / "part").symlink_to(tmp_path / "disk")
    (root / "train" / "a" / "round").symlink_to(root / "train")  # a circle
    assert load(root, "unlabelled").labels.tolist() == [0, 1, 1, -1, -1, -1]
    assert load(root, "train").classes == ["a", "b"]


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    from files import BadImageError

    root = make_files(tmp_path, "train/a/0.png")
    (root / "train" / "a" / "1.png").symlink_to(tmp_path / "gone.png")
    data = load(root)
    with pytest.raises(BadImageError, match=r"a/1.png cannot be read: .*; it is a link to .*gone.png"):
        data[1]
    with pytest.warns(UserWarning, match="the next image takes its place"):
        assert torch.equal(load(root, skip_bad_images=True)[1][0], data[0][0])
    (root / "train" / "b").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"1 links in .* lead nowhere, such as .*train/b to .*gone: put"):
        load(root)


def test_images_that_cannot_have_a_label_are_counted(tmp_path: Path) -> None:
    make_files(tmp_path, "train/a/0.png", "train/1.png", "train/2.png")
    with pytest.raises(ValueError, match=r"has 2 images beside the folders of the classes, .* such as 1.png: move"):
        load(tmp_path)


# Decoding


@pytest.fixture(params=["fast", "Pillow"])
def decode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    import files

    if request.param == "Pillow":
        monkeypatch.setattr(files, "decode_jpeg", None)
    elif files.decode_jpeg is None:
        pytest.skip("no fast decoder is installed")
    return files.decode


@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "JPEG"), ("L", "JPEG"), ("LA", "PNG"), ("RGBA", "PNG"), ("P", "GIF")]
)
def test_any_colour_space_becomes_rgb(decode: Any, mode: str, kind: str) -> None:
    buffer, smooth = io.BytesIO(), Image.linear_gradient("L").convert("RGB")
    smooth.convert(mode).save(buffer, kind)
    expected = pixels(Image.open(buffer).convert("RGB")).float()
    assert (decode(buffer.getvalue(), "x").float() - expected).abs().max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(decode: Any, kind: str) -> None:
    buffer = io.BytesIO()
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(buffer, kind)
    expected = torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, -1, -1)
    assert torch.equal(decode(buffer.getvalue(), "x"), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stored_turned_or_mirrored_is_upright(decode: Any, orientation: int, kind: str) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:] = (255, 0, 0), (0, 255, 0)  # so that no two ways to hold it are alike
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    tags, buffer = Image.Exif(), io.BytesIO()
    tags[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(buffer, kind, exif=tags)
    difference = decode(buffer.getvalue(), "x").float() - torch.from_numpy(upright).permute(2, 0, 1)
    assert difference.abs().mean() < 8  # the smear of compression


def test_floats_are_refused(decode: Any) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="x .* cannot be decoded: its values are floats of no known range"):
        decode(buffer.getvalue(), "x")


def test_integers_of_32_bits_are_refused(decode: Any) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(16, dtype=np.int32).reshape(4, 4)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="x .* cannot be decoded: its values are of 32 bits and of no known range"):
        decode(buffer.getvalue(), "x")


def test_decoding_warns_of_nothing(recwarn: pytest.WarningsRecorder, decode: Any) -> None:
    decode(encoded(0, "JPEG"), "x")
    palette, buffer = picture(0).convert("P"), io.BytesIO()
    palette.save(buffer, "PNG", transparency=bytes(range(256)))
    assert torch.equal(decode(buffer.getvalue(), "x"), pixels(palette.convert("RGB")))
    assert not recwarn.list


# Subsets


@pytest.mark.parametrize("lines", ["a_1.png\nc_0.png\n", "a/a_1.png\nc/c_0.png", "train/a/a_1.png\n\nc/c_0.png"])
def test_a_list_of_images_is_what_is_trained_on(tmp_path: Path, lines: str) -> None:
    make_folder(tmp_path)
    (tmp_path / "1percent.txt").write_text(lines)
    data = load(tmp_path, subset=tmp_path / "1percent.txt")
    assert data.labels.tolist() == [0, 2]
    assert torch.equal(data[1][0], pixels(picture(20)))
    assert len(load(tmp_path, "val", subset=tmp_path / "1percent.txt")) == 12


@pytest.mark.parametrize("split", ["train", "val", "unlabelled"])
def test_a_list_of_classes_numbers_them_anew(tmp_path: Path, split: str) -> None:
    make_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("c\na\n")
    data = load(tmp_path, split, subset=tmp_path / "classes.txt")
    assert data.classes == ["a", "c"]
    assert data.labels.tolist() == [0] * 4 + [1] * 4


# Bad input


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("folder", "expected train/CLASS/IMAGE and val/CLASS/IMAGE (or valid/, test/); found notes.txt"),
        ("cifar10", "expected cifar-10-batches-py/ as torchvision.datasets.CIFAR10 unpacks it, or train/CLASS/IMAGE"),
        ("webdataset", "expected val/*.tar or *val*.tar; found notes.txt"),
    ],
)
def test_a_wrong_folder_says_what_it_should_hold_and_what_it_holds(tmp_path: Path, dataset: str, expected: str) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path, "val", dataset)
    assert expected in str(error.value)


def test_a_folder_of_data_sets_is_no_data_set(tmp_path: Path) -> None:
    make_folder(tmp_path / "imagenet")
    with pytest.raises(FileNotFoundError, match="found imagenet/"):
        load(tmp_path, "unlabelled")


@pytest.mark.parametrize("split", ["train", "unlabelled"])
@pytest.mark.parametrize("name", ["val", "Test", "validation", "unlabelled"])
def test_a_folder_of_other_images_is_no_class(tmp_path: Path, name: str, split: str) -> None:
    make_files(tmp_path, "cat/1.png", "dog/2.png", f"{name}/cat/3.png", f"{name}/dog/4.png")
    with pytest.raises(ValueError, match=rf"has {name} but no train/, .*: move the classes into .*train"):
        load(tmp_path, split)


def test_one_folder_alone_is_unlabelled(tmp_path: Path) -> None:
    make_files(tmp_path, "train/a/1.png", "Unlabelled/2.png", "unlabeled/3.png")
    with pytest.raises(ValueError, match="has Unlabelled, unlabeled, of which one can be read: move"):
        load(tmp_path, "unlabelled")
    assert len(load(tmp_path, "train")) == 1


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere, which is no folder"):
        load(tmp_path / "nowhere")


def test_an_empty_class(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "train" / "d").mkdir()
    with pytest.raises(FileNotFoundError, match="no valid file for the classes d"):
        load(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found nothing"):
        load(tmp_path)
    with pytest.raises(ValueError, match="has no unlabelled images"):
        load(tmp_path, "unlabelled")


def test_classes_that_differ(tmp_path: Path) -> None:
    make_folder(tmp_path, splits=("train",), classes="abc")
    make_folder(tmp_path, splits=("val",), classes="abd")
    with pytest.raises(ValueError, match=r"different classes: c, d in one of them alone"):
        load(tmp_path, "val")


def test_a_list_of_what_is_not_there(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "list.txt").write_text("a_0.png\nz_9.png\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 lines of .*list.txt are neither .*: z_9.png"):
        load(tmp_path, subset=tmp_path / "list.txt")


@pytest.mark.parametrize("content", [encoded(0, "JPEG")[:-200], b"<html>no image</html>", b""])
def test_a_bad_image_is_named(tmp_path: Path, content: bytes) -> None:
    from files import BadImageError

    path = make_folder(tmp_path) / "train" / "a" / "a_2.png"
    path.write_bytes(content)
    with pytest.raises(BadImageError, match=rf"a_2.png \({len(content)} bytes\) cannot be decoded: \w"):
        load(tmp_path)[2]


def test_a_bad_image_in_a_shard_is_named(tmp_path: Path) -> None:
    from files import BadImageError

    make_shards(tmp_path)
    path = tmp_path / "train" / "000.tar"
    path.write_bytes(path.read_bytes().replace(encoded(2)[:100], bytes(100)))
    with pytest.raises(BadImageError, match=r"000.tar:00002.png"):
        load(tmp_path, "train", "webdataset")[2]


# Batches


def run(
    root: Path, steps: list[tuple[int, int]] | None = None, **options: Any
) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """All batches of two epochs, or from the (epoch, step) on that are given."""
    from data import Batches, DataConfig

    config = DataConfig(root, options.pop("dataset", "folder"), skip_bad_images=options.pop("skip_bad_images", False))
    batches = Batches(config, views.Crops(16, local_sizes=(8,), local_scales=((0.1, 0.4),)), 2, **options)
    return [batch for epoch, start in steps or [(0, 0), (1, 0)] for batch in batches.epoch(epoch, start)]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for (ours, labels), (theirs, their_labels) in zip(one, other, strict=True)
        for a, b in zip((*ours, labels), (*theirs, their_labels), strict=True)
    )


@pytest.mark.parametrize("dataset", ["folder", "webdataset"])
def test_batches_are_the_same_whatever_the_workers_and_the_start(tmp_path: Path, dataset: str) -> None:
    root = make_folder(tmp_path) if dataset == "folder" else make_shards(tmp_path)
    whole = run(root, dataset=dataset)
    (strong, weak, local), labels = whole[0]
    assert len(whole) == 12
    assert strong.shape == weak.shape == (2, 3, 16, 16)
    assert local.shape == (2, 3, 8, 8)
    assert strong.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (2,)
    torch.manual_seed(1)
    assert same(run(root, dataset=dataset, workers=2), whole)
    assert same(run(root, [(0, 4), (1, 0)], dataset=dataset, workers=1), whole[4:])
    assert same(run(root, [(1, 5)], dataset=dataset), whole[11:])
    assert not same(run(root, dataset=dataset, seed=1), whole)
    assert not same(whole[:6], whole[6:])


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    run(make_folder(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("dataset", "workers"), [("folder", 1), ("webdataset", 0)])
def test_the_default_device_is_left_alone(tmp_path: Path, dataset: str, workers: int) -> None:
    root = make_folder(tmp_path) if dataset == "folder" else make_shards(tmp_path)
    whole = run(root, dataset=dataset)
    with torch.device("meta"):  # an accelerator's counterpart: its tensors meet no generator of the CPU
        again = run(root, dataset=dataset, workers=workers)
        assert torch.zeros(()).device.type == "meta"
    assert same(again, whole)


@pytest.mark.parametrize("dataset", ["folder", "webdataset"])
def test_an_epoch_is_dealt_out_to_the_ranks(tmp_path: Path, dataset: str) -> None:
    from data import Batches, DataConfig

    root = make_folder(tmp_path) if dataset == "folder" else make_shards(tmp_path)

    def whole(image: Tensor) -> tuple[Tensor]:
        return (image,)

    def epoch(batch: int, rank: int, world_size: int) -> Tensor:
        batches = Batches(DataConfig(root, dataset), whole, batch, rank=rank, world_size=world_size)
        return torch.stack([step[0] for step, _ in batches.epoch(3)])

    alone = epoch(6, 0, 1)
    assert len(alone.flatten(0, 1).unique(dim=0)) == 12  # every image once
    together = torch.stack([epoch(2, rank, 3) for rank in range(3)], dim=2)  # (step, image, rank, ...)
    assert torch.equal(together.flatten(1, 2), alone)


def test_shards_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data

    monkeypatch.setattr(data, "MIXED_SHARDS", 2)
    make_shards(tmp_path, shards=6)
    batches = data.Batches(data.DataConfig(tmp_path, "webdataset"), views.Crops(8), 4)
    orders = [batches._order(epoch) for epoch in range(2)]
    for order in orders:
        assert order.unique().tolist() == list(range(24))
        for window in batches.images.source.shard[order].split(8):
            assert len(window.unique()) == 2
    assert not torch.equal(*orders)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_bad_image_is_replaced_alike_wherever_one_starts(tmp_path: Path) -> None:
    from data import Batches, DataConfig

    root = make_folder(tmp_path)
    for name in ("a/a_1.png", "a/a_2.png", "c/c_3.png"):
        (root / "train" / name).write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"a_1.png .* cannot be decoded: .*; the next image takes its place"):
        whole = run(root, skip_bad_images=True)
    assert same(run(root, [(0, 3), (1, 0)], skip_bad_images=True, workers=2), whole[3:])
    batches = Batches(DataConfig(root, skip_bad_images=True), views.Crops(8), 12, workers=1)
    (_, labels), *_ = batches.epoch(0)
    assert batches.bad_images == 3
    assert sorted(labels.tolist()) == [0] * 5 + [1] * 4 + [2] * 3


def test_an_epoch_can_be_left_early(tmp_path: Path) -> None:
    from data import Batches, DataConfig

    batches = Batches(DataConfig(make_folder(tmp_path)), views.Crops(8), 2, workers=1)
    first = next(iter(batches.epoch(0)))
    again = list(batches.epoch(0))
    assert len(again) == batches.steps_per_epoch == 6
    assert same([first], again[:1])


def test_a_process_ends_with_an_epoch_under_way(tmp_path: Path) -> None:
    make_folder(tmp_path)
    script = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
from pathlib import Path
from data import Batches, DataConfig
from cgh import views
batches = Batches(DataConfig(Path({str(tmp_path)!r})), views.Crops(8), 2, workers=1).epoch(0)
next(batches)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, timeout=200, capture_output=True, text=True)
    assert done.stderr == ""


def test_fewer_images_than_a_batch(tmp_path: Path) -> None:
    from data import Batches, DataConfig

    with pytest.raises(ValueError, match=r"12 images to pre-train on, less than one batch of 7 on each of 2 ranks"):
        Batches(DataConfig(make_folder(tmp_path)), views.Crops(8), 7, world_size=2)
