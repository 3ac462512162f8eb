"""The features of a whole data set, extracted once by all ranks together, and kept in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from cgh import checkpoint
from cgh.distributed import gather, rank_and_world_size
from cgh.hypercolumn import pooled_output
from cgh.labels import integer_labels
from cgh.method import CGH
from cgh.modes import evaluating
from cgh.wrappers import unwrap


class LabelledFeatures(NamedTuple):
    """What a model makes of every image of a data set, in its order."""

    features: Tensor
    """The model's outputs `(N, W)`, in float32 and in the memory of the host."""
    labels: Tensor
    """Classes `(N,)`."""

    @override
    def __repr__(self) -> str:
        """Return the shapes."""
        return f"LabelledFeatures(features {tuple(self.features.shape)}, labels {tuple(self.labels.shape)})"


Batches = Iterable[tuple[Tensor, Any]]


@torch.no_grad()
def extract_features(
    model: nn.Module,
    dataset: Dataset[tuple[Tensor, Any]] | DataLoader[tuple[Tensor, Any]],
    batch_size: int = 256,
    workers: int = 0,
    device: str | torch.device = "cpu",
    autocast: torch.dtype | None = None,
    progress: Callable[[Batches], Batches] | None = None,
) -> LabelledFeatures:
    """Run `model` in evaluation mode over every image of `dataset`, once.

    Under `torchrun` each rank takes its share, and rank 0 gets all rows; the others get none, `(0, W)`, so that the
    host keeps them once. The model's mode is put back afterwards.

    Args:
        model: images `(N, 3, H, W)` -> `(N, W)`, on `device`. Its outputs may be pooled features, or a classifier's
            logits; of a Hugging Face model, `pooler_output` is taken, and of a `cgh.HypercolumnExtractor`, `pooled`.
        dataset: items are an image, ready for the model, and its class, an integer of any type. In a single process it
            may be a DataLoader of such items, as for a stream, with the batches and the order of its own.
        batch_size: images at a time on each rank.
        workers: processes that load images, on each rank.
        device: where the model is.
        autocast: `torch.bfloat16` or `torch.float16` for mixed precision.
        progress: wraps the batches of rank 0, such as `rich.progress.track`.

    Raises:
        ValueError: an empty data set, outputs that are not `(N, W)`, labels that are not one an image, or a DataLoader
            on several ranks, or one that drops images.
        TypeError: a model of two views, a stream without DataLoader, items that are not an image and its class, or
            classes that are not integers.

    Example:
        >>> import torch, torchvision, cgh
        >>> data = torchvision.datasets.FakeData(10, (3, 32, 32), 4, transform=torchvision.transforms.ToTensor())
        >>> cgh.evaluate.extract_features(cgh.interop.resnet("resnet18"), data).features.shape
        torch.Size([10, 512])
    """
    if isinstance(unwrap(model), CGH):
        raise TypeError("the model is a CGH, which takes two views; pass its backbone: model.student.extractor.")
    rank, _ = rank_and_world_size()
    batches, size = _batches(dataset, batch_size, workers, torch.device(device))
    features: list[Tensor] = []
    labels: list[Tensor] = []
    with evaluating(model):
        for batch in progress(batches) if progress and rank == 0 else batches:
            images, classes = _labelled(batch)
            try:
                with torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
                    output = pooled_output(model(images.to(device, non_blocking=True)), len(images), model)
            except RuntimeError as error:
                if images.is_floating_point():
                    raise
                raise TypeError(  # a model may take bytes, but most do not
                    f"images are {images.dtype}, and the model takes none; make them floating point, such as "
                    "images.float() / 255, and normalise."
                ) from error
            rows = gather(output.float()), gather(classes.to(device)[:, None])[:, 0]
            for kept, part in zip((features, labels), rows, strict=True):
                kept.append(part.cpu() if rank == 0 else part[:0].cpu())
    if not features:
        raise ValueError("the data set is empty: there is nothing to extract.")
    return LabelledFeatures(torch.cat(features)[:size], torch.cat(labels)[:size])


def _batches(
    dataset: Dataset[tuple[Tensor, Any]] | DataLoader[tuple[Tensor, Any]],
    batch_size: int,
    workers: int,
    device: torch.device,
) -> tuple[Batches, int | None]:
    """This rank's batches, and how many images all ranks have together, where that is known."""
    rank, world_size = rank_and_world_size()
    if isinstance(dataset, DataLoader):
        if world_size > 1:
            raise ValueError(
                f"on {world_size} ranks a DataLoader does not say which images are whose; pass its data set."
            )
        if dataset.drop_last or getattr(dataset.batch_sampler, "drop_last", False):
            raise ValueError("the DataLoader has drop_last=True, and every image is wanted; make one without.")
        return dataset, None
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"the data set is a {type(dataset).__name__}, a stream without a length; pass a DataLoader of it, in a "
            "single process, or a data set with __len__ and __getitem__."
        )
    size = len(dataset)
    if not size:
        raise ValueError("the data set is empty: there is nothing to extract.")
    # Shares of equal size, the last ones filled up from the start of the set: every rank makes as many gathers.
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, world_size, rank, shuffle=False)
    pinned = device.type == "cuda"
    return DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers, pin_memory=pinned), size


def _labelled(batch: Any) -> tuple[Tensor, Tensor]:
    """The images and the classes of a batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        inside = ", ".join(type(x).__name__ for x in batch) if isinstance(batch, (tuple, list, dict)) else ""
        raise TypeError(
            f"a batch is a {type(batch).__name__} of ({inside}); an item is an image, a tensor ready for the model, "
            "and its class, an integer."
        )
    images, classes = batch[0], integer_labels(batch[1])
    if classes.shape != (len(images),):
        raise ValueError(f"the labels of {len(images)} images have shape {tuple(classes.shape)}; each has one class.")
    return images, classes


def save_features(features: LabelledFeatures, path: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
    """Write features to a file, whole or not at all.

    Args:
        features: what `extract_features` returned on rank 0.
        path: its folder is made if missing.
        about: what they are of, in plain data: the weights, the data set, the size of its images, its classes.

    Example:
        >>> import tempfile, torch
        >>> from cgh.evaluate import LabelledFeatures, load_features, save_features
        >>> path = tempfile.mkdtemp() + "/features.pt"
        >>> save_features(LabelledFeatures(torch.ones(2, 4), torch.tensor([0, 1])), path, {"weights": "run/3.pt"})
        >>> load_features(path)[0].labels, load_features(path)[1]
        (tensor([0, 1]), {'weights': 'run/3.pt'})
    """
    checkpoint.save({**features._asdict(), "about": dict(about)}, path)


def load_features(
    path: str | os.PathLike[str], about: Mapping[str, Any] | None = None
) -> tuple[LabelledFeatures, dict[str, Any]]:
    """Return what `save_features` wrote.

    Args:
        path: the file.
        about: what they have to be of; unchecked by default.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no features, is cut short, or holds features of something else than `about` says.
    """
    state = checkpoint.load(path)
    if state.keys() != {*LabelledFeatures._fields, "about"}:
        raise ValueError(f"{path} holds {sorted(map(str, state))[:5]}; a file of features is what save_features wrote.")
    saved = state.pop("about")
    if not isinstance(saved, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        kinds = {key: type(x).__name__ for key, x in {**state, "about": saved}.items()}
        raise ValueError(f"{path} holds {kinds}; features and labels are tensors, and what they are of a dictionary.")
    expected = {} if about is None else about
    different = [
        f"{key} is {saved.get(key)!r} there, {expected.get(key)!r} here"
        for key in {**saved, **expected}
        if about is not None and saved.get(key) != expected.get(key)
    ]
    if different:
        raise ValueError(f"{path} holds features of something else: {'; '.join(different)}. Extract into another file.")
    return LabelledFeatures(**state), saved
