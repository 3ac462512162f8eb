"""The images of every layout, and batches that follow from seed, epoch and step alone."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tarfile
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


@pytest.mark.parametrize("val", ["val", "test"])
def test_validation_may_be_called_test(tmp_path: Path, val: str) -> None:
    data = load(make_folder(tmp_path, splits=("train", val)), "val")
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_plain_folder_of_classes_or_of_images_is_enough_to_train_on(tmp_path: Path) -> None:
    make_folder(tmp_path, splits=(".",))
    assert len(load(tmp_path)) == len(load(tmp_path, "unlabelled")) == 12
    assert load(tmp_path / "a", "unlabelled").labels.tolist() == [-1] * 4


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
        patch.setattr(data.Shards, "_samples", None)
        again = load(tmp_path, "train", "webdataset")
    assert all(torch.equal(again[i][0], before[i][0]) for i in range(12))
    (tmp_path / "train" / "000.tar").unlink()
    assert len(load(tmp_path, "train", "webdataset")) == 8


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


@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "JPEG"), ("L", "JPEG"), ("LA", "PNG"), ("RGBA", "PNG"), ("P", "GIF")]
)
def test_any_colour_space_becomes_rgb(mode: str, kind: str) -> None:
    from data import decode

    buffer, smooth = io.BytesIO(), Image.linear_gradient("L").convert("RGB")
    smooth.convert(mode).save(buffer, kind)
    expected = pixels(Image.open(buffer).convert("RGB")).float()
    assert (decode(buffer.getvalue(), "x").float() - expected).abs().max() <= 2


def test_sixteen_bits_become_eight() -> None:
    from data import decode

    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16)).save(buffer, "PNG")
    assert torch.equal(decode(buffer.getvalue(), "x"), torch.full((3, 4, 4), 255, dtype=torch.uint8))


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
        ("folder", "expected train/CLASS/IMAGE and val/CLASS/IMAGE (or test/); found notes.txt"),
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
    from data import BadImageError

    path = make_folder(tmp_path) / "train" / "a" / "a_2.png"
    path.write_bytes(content)
    with pytest.raises(BadImageError, match=rf"a_2.png \({len(content)} bytes\) cannot be decoded: \w"):
        load(tmp_path)[2]


def test_a_bad_image_in_a_shard_is_named(tmp_path: Path) -> None:
    from data import BadImageError

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


@pytest.mark.slow
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
    subprocess.run([sys.executable, "-c", script], check=True, timeout=200)


def test_fewer_images_than_a_batch(tmp_path: Path) -> None:
    from data import Batches, DataConfig

    with pytest.raises(ValueError, match=r"12 images to pre-train on, less than one batch of 7 on each of 2 ranks"):
        Batches(DataConfig(make_folder(tmp_path)), views.Crops(8), 7, world_size=2)
