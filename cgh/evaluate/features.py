"""The features of a whole data set, extracted once by all ranks together, and kept in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from cgh import checkpoint
from cgh.distributed import gather, rank_and_world_size


class LabelledFeatures(NamedTuple):
    """What a model makes of every image of a data set, in its order."""

    features: Tensor
    """The model's outputs `(N, W)`, in float32 and in the memory of the host."""
    labels: Tensor
    """Classes `(N,)`."""


Batches = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def extract_features(
    model: nn.Module,
    dataset: Dataset[tuple[Tensor, Any]],
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
            logits.
        dataset: items are an image, ready for the model, and its class.
        batch_size: images at a time on each rank.
        workers: processes that load images, on each rank.
        device: where the model is.
        autocast: `torch.bfloat16` or `torch.float16` for mixed precision.
        progress: wraps the batches of rank 0, such as `rich.progress.track`.

    Raises:
        ValueError: an empty data set, or outputs that are not `(N, W)`.

    Example:
        >>> import torch, torchvision, cgh
        >>> data = torchvision.datasets.FakeData(10, (3, 32, 32), 4, transform=torchvision.transforms.ToTensor())
        >>> cgh.evaluate.extract_features(cgh.interop.resnet("resnet18"), data).features.shape
        torch.Size([10, 512])
    """
    rank, world_size = rank_and_world_size()
    size = len(dataset)  # type: ignore[arg-type]  # torch's Dataset leaves __len__ to its children
    if not size:
        raise ValueError("the data set is empty: there is nothing to extract.")
    # Shares of equal size, the last ones filled up from the start of the set: every rank makes as many gathers.
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, world_size, rank, shuffle=False)
    batches: Batches = DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=workers, pin_memory=torch.device(device).type == "cuda"
    )
    features: list[Tensor] = []
    labels: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        for images, classes in progress(batches) if progress and rank == 0 else batches:
            with torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
                output = model(images.to(device, non_blocking=True))
            if output.ndim != 2:
                raise ValueError(f"the model gives {tuple(output.shape)}; one feature an image is (N, W).")
            rows = gather(output.float()), gather(classes.to(device)[:, None])[:, 0]
            for kept, part in zip((features, labels), rows, strict=True):
                kept.append(part.cpu() if rank == 0 else part[:0].cpu())
    finally:
        model.train(was_training)
    return LabelledFeatures(torch.cat(features)[:size], torch.cat(labels)[:size])


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
    saved: dict[str, Any] = state.pop("about")
    expected = saved if about is None else about
    different = [
        f"{key} is {saved.get(key)!r} there, {expected.get(key)!r} here"
        for key in {**saved, **expected}
        if saved.get(key) != expected.get(key)
    ]
    if different:
        raise ValueError(f"{path} holds features of something else: {'; '.join(different)}. Extract into another file.")
    return LabelledFeatures(**state), saved
