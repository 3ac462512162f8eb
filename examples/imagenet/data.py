"""The images, from a folder, CIFAR, STL-10, Tiny ImageNet or tar shards, and the batches of views of a training run.

The batches of an epoch follow from the seed, and the views of an image from the seed, the epoch and its index: nothing
is drawn from a state that a run would have to save. So they are the same wherever a run stopped and whatever the number
of workers.
"""

from __future__ import annotations

import atexit
import multiprocessing
import re
import signal
import tarfile
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as TF
from webdataset.tariterators import group_by_keys

Split = Literal["train", "unlabelled", "val"]

FORMATS = (".jpg", ".jpeg", ".png", ".webp", ".gif")  # what torchvision decodes
FOLDERS = "train/CLASS/IMAGE and val/CLASS/IMAGE (or test/)"
TORCHVISION = {
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python"),
    "stl10": (datasets.STL10, "stl10_binary"),
}
MIXED_SHARDS = 16  # shards that are shuffled together, so that reading keeps to a few files at a time


@dataclass
class DataConfig:
    """Where the images are."""

    root: Path
    """Folder of the data set."""
    dataset: Literal["folder", "cifar10", "cifar100", "stl10", "tiny-imagenet", "webdataset"] = "folder"
    """Its layout. folder: train/CLASS/IMAGE and val/CLASS/IMAGE (or test/), or CLASS/IMAGE alone to train on. cifar10,
    cifar100, stl10: as torchvision unpacks them, or folders. tiny-imagenet: as it is distributed, or folders.
    webdataset: train/*.tar and val/*.tar, or *train*.tar and *val*.tar, on a file system that every process sees."""
    subset: Path | None = None
    """File that names the classes to use, or the images to train on, one a line."""
    skip_bad_images: bool = False
    """Put the next good image in the place of one that cannot be decoded, and warn."""


def images(config: DataConfig, split: Split, transform: Callable[[Tensor], Any] | None = None) -> Images:
    """Return the images of a split; "unlabelled" is all that there is to pre-train on.

    Raises:
        FileNotFoundError: the folder has another layout, or the list of a subset names what is not there.
        ValueError: training and validation have different classes, or no image is left.
    """
    if not config.root.is_dir():
        raise FileNotFoundError(f"root is {config.root}, which is no folder.")
    if config.dataset == "folder":
        source, labels, classes = _folders(config.root, split, FOLDERS)
    elif config.dataset == "tiny-imagenet":
        source, labels, classes = _tiny_imagenet(config.root, split)
    elif config.dataset == "webdataset":
        source, labels, classes = _shards(config.root, split)
    else:
        source, labels, classes = _torchvision(config.root, split, *TORCHVISION[config.dataset])
    kept = torch.arange(len(labels))
    if config.subset is not None:
        kept, labels, classes = _subset(config.subset, split, source.names, labels, classes)
    if not len(kept):
        raise ValueError(f"{config.root} has no {split} images" + f" of {config.subset}." * (config.subset is not None))
    return Images(source, kept, labels, classes, transform, config.skip_bad_images)


class Batches:
    """Batches of views to pre-train on, dealt out to the ranks: image `i` of a global batch goes to rank `i % ranks`.

    Args:
        config: the data; its "unlabelled" images are used.
        crops: from a decoded image to its views, drawn from torch's global generator.
        batch_per_rank: images in a batch of one rank.
        seed: decides all, together with the epoch and the step.
        rank: this process.
        world_size: how many there are.
        workers: processes that decode and crop; 0 does it in this one.
    """

    def __init__(
        self,
        config: DataConfig,
        crops: Callable[[Tensor], tuple[Tensor, ...]],
        batch_per_rank: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        self.images = images(config, "unlabelled")
        self.batch, self.seed, self.rank, self.world_size = batch_per_rank, seed, rank, world_size
        self.steps_per_epoch = len(self.images) // (batch_per_rank * world_size)
        if not self.steps_per_epoch:
            raise ValueError(
                f"{config.root} has {len(self.images)} images to pre-train on, less than one batch of "
                f"{batch_per_rank} on each of {world_size} ranks."
            )
        self.bad: set[int] = set()
        self._steps: list[list[tuple[int, int]]] = []
        self._loader = DataLoader(
            Views(self.images, crops, seed),
            batch_sampler=self._steps,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_the_run,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # or else it would draw from the global one
        )

    @property
    def bad_images(self) -> int:
        """How many images could not be decoded so far."""
        return len(self.bad)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Yield the batches from `start_step` on: views uint8 `(N, 3, S, S)`, and labels `(N,)`."""
        order = self._order(epoch)[: self.steps_per_epoch * self.batch * self.world_size]
        ranks = rearrange(order, "(step image rank) -> rank step image", image=self.batch, rank=self.world_size)
        self._steps[:] = [[(epoch, index) for index in step] for step in ranks[self.rank, start_step:].tolist()]
        for views, labels, bad in self._loader:
            self.bad.update(bad)
            yield views, labels

    def _order(self, epoch: int) -> Tensor:
        """The images in an order of this epoch's own, a few shards after a few others."""
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        order = torch.randperm(len(self.images), generator=generator)
        shard = self.images.source.shard[self.images.kept[order]]
        turn = torch.randperm(int(self.images.source.shard.max()) + 1, generator=generator) // MIXED_SHARDS
        return order[turn[shard].argsort(stable=True)]


class Views(Dataset[tuple[tuple[Tensor, ...], int, list[int]]]):
    """Item `(epoch, index)` is an image's views in that epoch, its label, and the bad images that it stands in for."""

    def __init__(self, images: Images, crops: Callable[[Tensor], tuple[Tensor, ...]], seed: int) -> None:
        self.images, self.crops, self.seed = images, crops, seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[tuple[Tensor, ...], int, list[int]]:
        epoch, index = item
        image, label, bad = self.images.load(index)
        with torch.random.fork_rng(devices=[]):
            # This generator alone: torch.manual_seed remembers every call for devices that are not in use.
            torch.default_generator.manual_seed(_mix(self.seed, epoch, index))
            return self.crops(image), label, bad


def _leave_signals_to_the_run(worker: int) -> None:
    """Outlive what a scheduler or `torchrun` sends to all processes: the run saves first, and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Python would end them by the signal that they ignore, and wait for ever."""
    for worker in multiprocessing.active_children():
        worker.kill()


def _mix(*numbers: int) -> int:
    """A seed that has nothing to do with those of neighbouring numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _collate(items: list[tuple[tuple[Tensor, ...], int, list[int]]]) -> tuple[tuple[Tensor, ...], Tensor, list[int]]:
    views, labels, bad = zip(*items, strict=True)
    return tuple(_stack(view) for view in zip(*views, strict=True)), torch.tensor(labels), [*chain(*bad)]


def _stack(views: tuple[Tensor, ...]) -> Tensor:
    """Stack views as they lie in memory, channels last if they are crops: it is then a plain copy."""
    if views[0].is_contiguous():
        return torch.stack(views)
    return rearrange(torch.stack([rearrange(x, "c h w -> h w c") for x in views]), "n h w c -> n c h w")


class Images(Dataset[tuple[Any, int]]):
    """Images and their labels: item `i` is `(transform(image), label)`, the image uint8 `(3, H, W)`."""

    def __init__(
        self,
        source: Source,
        kept: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        transform: Callable[[Tensor], Any] | None = None,
        skip_bad_images: bool = False,
    ) -> None:
        self.source, self.kept, self.transform, self.skip_bad_images = source, kept, transform, skip_bad_images
        self.labels = labels
        """Of every image, `(N,)`; -1 without one."""
        self.classes = list(classes)
        """Their names, by label."""

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label, _ = self.load(index)
        return (self.transform(image) if self.transform else image), label

    def load(self, index: int) -> tuple[Tensor, int, list[int]]:
        """Return an image, its label, and the indices of the bad images in whose place it stands."""
        bad: list[int] = []
        while True:
            at = (index + len(bad)) % len(self)
            try:
                return self.source.load(int(self.kept[at])), int(self.labels[at]), bad
            except BadImageError as error:
                bad.append(at)
                if not self.skip_bad_images or len(bad) == len(self):
                    raise
                warnings.warn(f"{error}; the next image takes its place", stacklevel=2)


class BadImageError(ValueError):
    """An image that cannot be decoded."""


def decode(encoded: bytes, name: str) -> Tensor:
    """Return an image of any colour space and depth as uint8 `(3, H, W)`."""
    try:
        image = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        reason = re.sub(r".*\.cpp:\d+, ", "", str(error)).partition(". ")[0]  # without the place in torchvision's code
        raise BadImageError(f"{name} ({len(encoded)} bytes) cannot be decoded: {reason}") from error
    return TF.to_dtype(image[0] if image.ndim == 4 else image, torch.uint8, scale=True)


class Source(Protocol):
    """Images by number."""

    names: np.ndarray
    """Of their files, as bytes; empty without."""
    shard: Tensor
    """The number of the tar file that holds each; 0 without."""

    def load(self, index: int) -> Tensor: ...


class Files:
    """Image files in a folder."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        # Bytes in one array: every worker would end up with a copy of a list of strings, by counting references to it.
        self.names = np.array([name.encode() for name in names], dtype=np.bytes_)
        self.shard = torch.zeros(len(names), dtype=torch.long)

    def load(self, index: int) -> Tensor:
        path = self.root / self.names[index].decode()
        return decode(path.read_bytes(), str(path))


class Shards:
    """Images in tar files, any of them one read away by an index of the headers that is kept beside them.

    Args:
        paths: the tar files.
        index: where the index is kept, if the folder may be written to.
    """

    def __init__(self, paths: Sequence[Path], index: Path) -> None:
        self.paths = paths
        state = np.array([(path.stat().st_size, path.stat().st_mtime_ns) for path in paths])
        rows: dict[str, np.ndarray] = {}
        if index.exists():
            with np.load(index) as kept:
                rows = dict(kept)
        if not np.array_equal(rows.get("state", 0), state):
            with ThreadPoolExecutor() as pool:
                shards = list(pool.map(self._samples, paths))
            names, extents, labels = zip(*chain(*shards), strict=True) if any(shards) else ((), (), ())
            rows = {
                "state": state,
                "names": np.array([name.encode() for name in names], dtype=np.bytes_),
                "extents": np.array(extents, dtype=np.int64).reshape(-1, 2),
                "labels": np.array(labels, dtype=np.int64),
                "shard": np.repeat(np.arange(len(paths)), [len(shard) for shard in shards]),
            }
            self._save(index, rows)
        self.names, self.extents = rows["names"], rows["extents"]
        self.labels, self.shard = torch.from_numpy(rows["labels"]), torch.from_numpy(rows["shard"])

    @staticmethod
    def _samples(path: Path) -> list[tuple[str, tuple[int, int], int]]:
        """Name, (offset, size) and label of every sample: the files of one name, as webdataset has it."""
        samples = []
        try:
            with tarfile.open(path, "r:") as tar, path.open("rb") as file:
                members = (
                    {"fname": member.name, "data": (member.offset_data, member.size), "__url__": str(path)}
                    for member in tar
                    if member.isfile()
                )
                for sample in group_by_keys(members):
                    for suffix in FORMATS:
                        if suffix[1:] in sample:
                            offset, size = sample.get("cls", (0, 0))
                            file.seek(offset)
                            label = int(file.read(size) or -1)
                            samples.append((sample["__key__"] + suffix, sample[suffix[1:]], label))
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"{path} is no uncompressed tar file of images with .cls labels: {error}") from error
        return samples

    @staticmethod
    def _save(index: Path, rows: dict[str, np.ndarray]) -> None:
        partial = index.with_name(f".{index.stem}-{uuid.uuid4().hex}.npz")
        try:
            np.savez(partial, **rows)
            partial.replace(index)
        except OSError as error:
            partial.unlink(missing_ok=True)
            warnings.warn(f"{index} cannot be written, so every start reads all headers: {error}", stacklevel=2)

    def load(self, index: int) -> Tensor:
        path, (offset, size) = self.paths[int(self.shard[index])], self.extents[index].tolist()
        with path.open("rb") as file:
            file.seek(offset)
            return decode(file.read(size), f"{path}:{self.names[index].decode()}")


class Arrays:
    """Decoded images `(N, 3, H, W)` in memory."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.names = np.array([], dtype=np.bytes_)
        self.shard = torch.zeros(len(images), dtype=torch.long)

    def load(self, index: int) -> Tensor:
        return self.images[index]


class Found(NamedTuple):
    """What lies in a folder: images, a label for each (-1 without one), and the names of the classes."""

    source: Source
    labels: Tensor
    classes: Sequence[str]


def _folders(root: Path, split: Split, expected: str = FOLDERS) -> Found:
    train = root / "train" if (root / "train").is_dir() else root
    folder = _first(root, "val", "test") if split == "val" else train
    classes = _class_names(folder) if folder else []
    loose = _first(root, "unlabelled", "unlabeled") if split == "unlabelled" else None
    if split == "unlabelled" and not classes:
        loose = folder
    if not (classes or loose) or any((train / name / "train").is_dir() for name in classes):
        _fail(root, split, expected)
    if split == "val" and train != root and classes != _class_names(train):
        differ = sorted({*classes} ^ {*_class_names(train)})
        raise ValueError(
            f"{train} and {folder} have different classes: {_listed(differ)} in one of them alone. "
            "Both need a folder for every class."
        )

    try:
        files = datasets.folder.make_dataset(folder, extensions=FORMATS) if classes else []
    except FileNotFoundError as error:  # a class without images
        raise FileNotFoundError(f"{folder}: {error}") from error
    if loose is not None:
        files += [(str(path), -1) for path in sorted(loose.rglob("*")) if path.suffix.lower() in FORMATS]
    names = [path[len(str(root)) + 1 :] for path, _ in files]
    return Found(Files(root, names), torch.tensor([label for _, label in files]), classes)


def _tiny_imagenet(root: Path, split: Split) -> Found:
    annotations = root / "val" / "val_annotations.txt"
    if split != "val" or not (root / "val" / "images").is_dir():
        return _folders(root, split)
    if not annotations.is_file():
        _fail(root / "val", split, "val_annotations.txt beside images/")
    classes = _class_names(root / "train")
    rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines()]
    if unknown := {name for _, name in rows} - {*classes}:
        raise ValueError(f"{annotations} names classes that {root / 'train'} lacks: {_listed(sorted(unknown))}.")
    files = Files(root, [f"val/images/{image}" for image, _ in rows])
    return Found(files, torch.tensor([classes.index(name) for _, name in rows]), classes)


def _torchvision(root: Path, split: Split, dataset: type[Any], unpacked: str) -> Found:
    if not (root / unpacked).is_dir():
        return _folders(root, split, f"{unpacked}/ as torchvision.datasets.{dataset.__name__} unpacks it, or {FOLDERS}")
    if dataset is datasets.STL10:
        part = dataset(root, {"train": "train", "unlabelled": "train+unlabeled", "val": "test"}[split])
        return Found(Arrays(torch.from_numpy(part.data)), torch.as_tensor(part.labels), part.classes)
    part = dataset(root, train=split != "val")
    return Found(Arrays(torch.from_numpy(part.data).permute(0, 3, 1, 2)), torch.tensor(part.targets), part.classes)


def _shards(root: Path, split: Split) -> Found:
    name = "val" if split == "val" else "train"
    paths = sorted((root / name).glob("*.tar")) or sorted(root.glob(f"*{name}*.tar"))
    if not paths:
        _fail(root, split, f"{name}/*.tar or *{name}*.tar")
    shards = Shards(paths, root / f"{name}-index.npz")
    count = int(shards.labels.max()) + 1 if len(shards.labels) else 0
    return Found(shards, shards.labels, [str(label) for label in range(count)])


def _subset(
    file: Path, split: Split, names: np.ndarray, labels: Tensor, classes: Sequence[str]
) -> tuple[Tensor, Tensor, Sequence[str]]:
    """The images that a list keeps, their labels and classes."""
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if {*lines} <= {*classes}:
        chosen = [name for name in classes if name in {*lines}]
        new = torch.full((len(classes) + 1,), -1)  # the last is that of images without label
        new[[classes.index(name) for name in chosen]] = torch.arange(len(chosen))
        kept = (new[labels] >= 0).nonzero()[:, 0]
        return kept, new[labels[kept]], chosen
    if split == "val":
        return torch.arange(len(labels)), labels, classes
    places = defaultdict(list)
    for index, name in enumerate(names.tolist()):
        places[name.decode().rpartition("/")[2]].append(index)
    found = [
        [i for i in places[line.rpartition("/")[2]] if f"/{names[i].decode()}".endswith(f"/{line}")] for line in lines
    ]
    if missing := [line for line, indices in zip(lines, found, strict=True) if len(indices) != 1]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(lines)} lines of {file} are neither a class nor the name of one image: "
            f"{_listed(missing)}. Write paths as CLASS/IMAGE."
        )
    kept = torch.tensor(found)[:, 0].unique()
    return kept, labels[kept], classes


def _class_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _first(root: Path, *names: str) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _fail(root: Path, split: str, expected: str) -> NoReturn:
    found = _listed(sorted(path.name + "/" * path.is_dir() for path in root.iterdir()))
    raise FileNotFoundError(f"no {split} images in {root}: expected {expected}; found {found or 'nothing'}.")
