"""Features are extracted once, in order, whatever the number of processes, and come back from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

import cgh
from cgh.evaluate import LabelledFeatures, extract_features, load_features, save_features
from tests.conftest import small_backbone
from tests.distributed.processes import spawn


def images(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count))


def backbone() -> nn.Module:
    torch.manual_seed(0)
    model = small_backbone()
    model.fc = nn.Identity()
    return model


class Counted(Dataset[tuple[Tensor, Tensor]]):
    """A data set that knows which of its images were read."""

    def __init__(self, count: int) -> None:
        self.data, self.read = images(count), list[int]()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read.append(index)
        return self.data[index]


def test_every_image_once_in_order_by_a_model_in_evaluation_mode() -> None:
    model, data = backbone().train(), Counted(7)
    features, labels = extract_features(model, data, batch_size=3)
    assert data.read == list(range(7))
    assert torch.equal(labels, torch.arange(7))
    assert model.training
    with torch.no_grad():
        torch.testing.assert_close(features, model.eval()(images(7).tensors[0]))


def shares(counts: list[int]) -> list[tuple[Tensor, Tensor, list[int]]]:
    sets = [Counted(count) for count in counts]
    return [(*extract_features(backbone(), data, batch_size=2), data.read) for data in sets]


def test_two_processes_share_the_images_and_equal_one(tmp_path: Path) -> None:
    counts = [1, 4, 7]
    for count, first, second in zip(counts, *spawn(shares, 2, tmp_path, counts), strict=True):
        (features, labels, read), (empty, _, other) = first, second
        expected = extract_features(backbone(), images(count), batch_size=4)
        torch.testing.assert_close(features, expected.features)
        assert torch.equal(labels, expected.labels)
        assert empty.shape == (0, 512)
        assert len(read) == len(other) == (count + 1) // 2
        assert {*read, *other} == set(range(count))


def test_mixed_precision_gives_float32() -> None:
    exact = extract_features(backbone(), images(4)).features
    mixed = extract_features(backbone(), images(4), autocast=torch.bfloat16).features
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.05)


def test_files_say_what_their_features_are_of(tmp_path: Path) -> None:
    path = tmp_path / "features" / "train.pt"
    features = LabelledFeatures(torch.randn(3, 4), torch.tensor([0, 2, 1]))
    about = {"weights": "run/3.pt", "classes": ["cat", "dog"]}
    save_features(features, path, about)
    loaded, saved = load_features(path, about)
    assert saved == about
    torch.testing.assert_close(loaded, features, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"of something else: weights is 'run/3.pt' there, 'run/4.pt' here\. Extract"):
        load_features(path, about | {"weights": "run/4.pt"})
    with pytest.raises(ValueError, match=r"size is None there, 224 here"):
        load_features(path, about | {"size": 224})
    cgh.checkpoint.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"holds \['model'\]; a file of features is"):
        load_features(tmp_path / "other.pt")


def test_nothing_to_extract_or_no_features() -> None:
    with pytest.raises(ValueError, match="empty"):
        extract_features(backbone(), images(0))
    with pytest.raises(ValueError, match=r"\(Identity\) gave shape \(2, 3, 32, 32\) for 2 images"):
        extract_features(nn.Identity(), images(2))


class Giving(nn.Module):
    """Gives a pooled feature in some wrapping."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, images: Tensor) -> Any:
        return self.wrap(images.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: x[:, :, None, None],
        lambda x: SimpleNamespace(pooler_output=x),
        lambda x: SimpleNamespace(pooler_output=x[:, :, None, None]),
        lambda x: cgh.Features(x, {}),
    ],
)
def test_a_pooled_feature_is_found_in_what_a_model_gives(wrap: Callable[[Tensor], Any]) -> None:
    data = images(3)
    expected = torch.stack([image for image, _ in data]).mean(dim=(2, 3))
    torch.testing.assert_close(extract_features(Giving(wrap), data, batch_size=2).features, expected)


@pytest.mark.parametrize("wrap", [lambda x: {"global": x}, lambda x: (x, x), lambda x: SimpleNamespace(logits=x)])
def test_other_outputs_are_refused_with_what_is_accepted(wrap: Callable[[Tensor], Any]) -> None:
    with pytest.raises(
        ValueError, match=r"\(Giving\) gave a \w+ for 2 images; it must .* pooler_output.*extractor.backbone"
    ):
        extract_features(Giving(wrap), images(2))


def test_a_loader_or_a_stream_of_one_gives_its_own_rows() -> None:
    data, model = images(5), Giving(lambda x: x)
    expected = extract_features(model, data, batch_size=2)
    backwards = DataLoader(data, 2, sampler=[4, 3, 2, 1, 0])
    found = extract_features(model, backwards)
    torch.testing.assert_close(found.features, expected.features.flip(0))
    assert torch.equal(found.labels, expected.labels.flip(0))

    class Stream(IterableDataset[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter([data[i] for i in range(len(data))])

    torch.testing.assert_close(extract_features(model, DataLoader(Stream(), 3)), expected)
    with pytest.raises(TypeError, match="a Stream, a stream without a length; pass a DataLoader of it"):
        extract_features(model, Stream())
    with pytest.raises(ValueError, match="the data set is empty"):
        extract_features(model, DataLoader(data, 2, sampler=[]))


@pytest.mark.parametrize("label", [np.int64(1), np.uint8(1), 1, True, torch.tensor(1, dtype=torch.int16)])
def test_a_class_is_an_integer_of_any_type(label: Any) -> None:
    found = extract_features(Giving(lambda x: x), [(torch.zeros(3, 8, 8), label)] * 3)
    assert found.labels.tolist() == [1, 1, 1]
    assert found.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("item", "error"),
    [
        ((torch.zeros(3, 8, 8), "cat"), "labels are a tuple of str|labels are a list of str"),
        ((torch.zeros(3, 8, 8), 0.5), "labels are torch.float64; classes are integers"),
        ((torch.zeros(3, 8, 8), torch.tensor([0, 1])), r"have shape \(2, 2\); each has one class"),
        ({"image": torch.zeros(3, 8, 8), "label": 1}, r"a batch is a dict of \(str, str\); an item is an image"),
        ((torch.zeros(3, 8, 8), 1, 2), r"a batch is a list of \(Tensor, Tensor, Tensor\)"),
        (torch.zeros(3, 8, 8), "a batch is a Tensor"),
    ],
)
def test_items_that_are_no_image_and_class(item: Any, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        extract_features(Giving(lambda x: x), [item] * 2)


class TakingBytes(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) / 255


def test_bytes_go_to_a_model_that_takes_them_alone() -> None:
    items: Any = [(torch.full((3, 8, 8), 255, dtype=torch.uint8), 1)] * 2
    assert extract_features(TakingBytes(), items).features.tolist() == [[1.0] * 3] * 2
    with pytest.raises(TypeError, match=r"images are torch\.uint8, and the model takes none; make them floating"):
        extract_features(nn.Conv2d(3, 4, 8), items)


def test_a_loader_that_drops_images() -> None:
    images = TensorDataset(torch.randn(10, 3, 8, 8), torch.zeros(10, dtype=torch.long))
    with pytest.raises(ValueError, match="drop_last=True"):
        extract_features(nn.Flatten(), DataLoader(images, 4, drop_last=True))
    with pytest.raises(ValueError, match="drop_last=True"):
        sampler = BatchSampler(SequentialSampler(images), 4, drop_last=True)
        extract_features(nn.Flatten(), DataLoader(images, batch_sampler=sampler))
