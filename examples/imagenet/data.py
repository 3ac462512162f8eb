"""The images, from a folder, CIFAR, STL-10, Tiny ImageNet or tar shards, and the batches of views of a training run.

The batches of an epoch follow from the seed, and the views of an image from the seed, the epoch and its index: nothing
is drawn from a state that a run would have to save. So they are the same wherever a run stopped and whatever the number
of workers.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import operator
import os
import posixpath
import signal
import tarfile
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from einops import rearrange
from files import BadImageError, decode, is_hidden, is_image, list_files, list_folders, list_images, read_image
from run import leave_signals_to_the_run, mixed_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets

from cgh.labels import integer_labels

Split = Literal["train", "unlabelled", "val"]

FOLDERS = "train/CLASS/IMAGE and val/CLASS/IMAGE (or valid/, test/)"
UNLABELLED = ("unlabelled", "unlabeled")
EVALUATION = ("val", "valid", "validation", "test")  # names of the folder to evaluate on, the first that is there
NO_CLASSES = (*EVALUATION, *UNLABELLED)  # names of folders that lie beside train/
COMPRESSED = tuple(f".tar.{suffix}" for suffix in ("gz", "bz2", "xz", "zst", "lz4", "lzma", "lz", "z"))
COMPRESSED += (".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
TORCHVISION = {
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python"),
    "stl10": (datasets.STL10, "stl10_binary"),
}
HOST = torch.device("cpu")  # where images are found, decoded and dealt out, whatever torch.set_default_device says
MOST_CLASSES = 2**24
MIXED_SHARDS = 16  # shards that are shuffled together, so that reading keeps to a few files at a time


@dataclass
class DataConfig:
    """Where the images are."""

    root: Path
    """Folder of the data set."""
    dataset: Literal["folder", "cifar10", "cifar100", "stl10", "tiny-imagenet", "webdataset"] = "folder"
    """Its layout. folder: train/CLASS/IMAGE and val/CLASS/IMAGE (or valid/, test/), or CLASS/IMAGE alone to train on.
    cifar10, cifar100, stl10: as torchvision unpacks them, or folders. tiny-imagenet: as it is distributed, or folders.
    webdataset: train/*.tar and val/*.tar, or *train*.tar and *val*.tar, on a file system that every process sees."""
    shard_images: str | None = None
    """What the names of a shard's images end with, such as .jpg, where other pictures such as masks lie beside them."""
    subset: Path | None = None
    """File that names the classes to use, or the images to train on, one a line."""
    skip_bad_images: bool = False
    """Put the next good image in the place of one that cannot be decoded, and warn."""


def images(config: DataConfig, split: Split, transform: Callable[[Tensor], Any] | None = None) -> Images:
    """Return the images of a split; "unlabelled" is all that there is to pre-train on.

    Raises:
        FileNotFoundError: the folder has another layout, or the list of a subset names what is not there.
        ValueError: training and validation have different classes or cannot be told apart, files would be left out, or
            no image is left.
    """
    if not config.root.is_dir():
        raise FileNotFoundError(f"root is {config.root}, which is no folder.")
    with HOST:
        if config.dataset == "folder":
            source, labels, classes = _folders(config.root, split, FOLDERS)
        elif config.dataset == "tiny-imagenet":
            source, labels, classes = _tiny_imagenet(config.root, split)
        elif config.dataset == "webdataset":
            source, labels, classes = _shards(config.root, split, config.shard_images)
        else:
            source, labels, classes = _torchvision(config.root, split, *TORCHVISION[config.dataset])
        kept = torch.arange(len(labels))
        if config.subset is not None:
            kept, labels, classes = _subset(config.subset, split, source.names, labels, classes)
        if not len(kept):
            raise ValueError(
                f"{config.root} has no {split} images" + f" of {config.subset}." * (config.subset is not None)
            )
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
            worker_init_fn=leave_signals_to_the_run,
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
        for views, labels, bad in _start(self._loader):
            self.bad.update(bad)
            yield views, labels

    def _order(self, epoch: int) -> Tensor:
        """The images in an order of this epoch's own, a few shards after a few others."""
        with HOST:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
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
        with HOST, torch.random.fork_rng(devices=[]):
            image, label, bad = self.images.load(index)
            # This generator alone: torch.manual_seed remembers every call for devices that are not in use.
            torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, index))
            return self.crops(image), label, bad


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start a loader's workers, to be ended with this process."""
    others = {*multiprocessing.active_children()}
    with HOST:
        batches = iter(loader)
    _workers.update({*multiprocessing.active_children()} - others)
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # after PyTorch's own, so that it is called before them
    return batches


_workers: set[BaseProcess] = set()


def _end_workers() -> None:
    """Kill what ignores the signal that Python and PyTorch would end it by, and wait for."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch takes a worker that is killed for an accident
    for worker in _workers:
        worker.kill()


def _collate(items: list[tuple[tuple[Tensor, ...], int, list[int]]]) -> tuple[tuple[Tensor, ...], Tensor, list[int]]:
    views, labels, bad = zip(*items, strict=True)
    with HOST:
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
        with HOST:
            image, label, _ = self.load(index)
            return (self.transform(image) if self.transform else image), label

    def load(self, index: int) -> tuple[Tensor, int, list[int]]:
        """Return an image, its label, and the indices of the bad images in whose place it stands."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no image {index} among {len(self)}")
        bad: list[int] = []
        while True:
            at = (index + len(bad)) % len(self)  # the first takes the place of a last one that is bad
            try:
                return self.source.load(int(self.kept[at])), int(self.labels[at]), bad
            except BadImageError as error:
                bad.append(at)
                if not self.skip_bad_images or len(bad) == len(self):
                    raise
                warnings.warn(f"{error}; the next image takes its place", stacklevel=2)


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
        self.names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.shard = torch.zeros(len(names), dtype=torch.long)

    def load(self, index: int) -> Tensor:
        return read_image(self.root / os.fsdecode(self.names[index]))


class Shards:
    """Images in tar files, any of them one read away by an index of the headers that is kept beside them.

    Args:
        paths: the tar files.
        index: where the index is kept, if the folder may be written to.
        suffix: what the names of the images end with; by default those of all formats.
    """

    def __init__(self, paths: Sequence[Path], index: Path, suffix: str | None = None) -> None:
        self.paths = paths
        stats = [(path.name, path.stat()) for path in paths]
        state = np.array([os.fsencode(f"{stat.st_size} {stat.st_mtime_ns} {name}") for name, stat in stats])
        rows = self._kept(index)
        if not (np.array_equal(rows.get("state", 0), state) and np.array_equal(rows.get("suffix", 0), suffix or "")):
            with ThreadPoolExecutor() as pool:
                shards = list(pool.map(lambda path: shard_samples(path, suffix), paths))
            names, extents, labels = zip(*chain(*shards), strict=True) if any(shards) else ((), (), ())
            rows = {
                "state": state,
                "suffix": np.array(suffix or ""),
                "names": np.array([os.fsencode(name) for name in names], dtype=np.bytes_),
                "extents": np.array(extents, dtype=np.int64).reshape(-1, 2),
                "labels": np.array(labels, dtype=np.int64),
                "shard": np.repeat(np.arange(len(paths)), [len(shard) for shard in shards]),
            }
            self._save(index, rows)
        self.names, self.extents = rows["names"], rows["extents"]
        self.labels, self.shard = torch.from_numpy(rows["labels"]), torch.from_numpy(rows["shard"])

    @staticmethod
    def _kept(index: Path) -> dict[str, np.ndarray]:
        try:
            with np.load(index) as kept:
                rows = dict(kept)
            if rows.keys() != {"state", "suffix", "names", "extents", "labels", "shard"}:
                raise ValueError(f"it holds {sorted(rows)}")
            return rows
        except FileNotFoundError:
            return {}
        except Exception as error:  # numpy's readers raise what they come across in a file that is broken
            warnings.warn(f"{index} cannot be read, so it is written anew: {error}", stacklevel=2)
            return {}

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
            return decode(file.read(size), f"{path}:{os.fsdecode(self.names[index])}")


class Sample(NamedTuple):
    """An image in a tar file."""

    name: str
    extent: tuple[int, int]
    """Where its bytes start, and how many they are."""
    label: int
    """-1 without."""


def shard_samples(path: Path, suffix: str | None = None) -> list[Sample]:
    """Return the images of a tar file.

    Files whose names are the same up to the first dot are of one sample, as webdataset has it. A sample with several
    images is taken for as many if each has a label of its own name up to the last dot, or if `suffix` tells images
    from others.

    Raises:
        ValueError: the file is no uncompressed tar file, or it cannot be told which files are images, or whose.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            extents = _extents(tar)
            _check_end(path, tar.offset)
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise ValueError(f"{path} is no uncompressed tar file of images: {error}") from error
    groups = defaultdict(list)
    for name in filter(is_image, extents):
        if suffix is None or name.lower().endswith(suffix.lower()):
            groups[_up_to_dot(name, first=True)].append(name)
    samples, unclear = [], []
    with path.open("rb") as file:
        for key, names in groups.items():
            stems = [_up_to_dot(name) for name in names]
            keys = [(stem, key) if len(names) == 1 else (stem,) for stem in stems]
            labels = [_label(path, file, extents, each) for each in keys]
            if len({*stems}) < len(names) or (len(names) > 1 and suffix is None and None in labels):
                unclear += names
            samples += [
                Sample(name, extents[name], -1 if label is None else label)
                for name, label in zip(names, labels, strict=True)
            ]
    if unclear:
        raise ValueError(
            f"{path} holds {len(unclear)} images whose names are the same up to the first dot, such as "
            f"{_listed(unclear[:2])}: views of one, an image and its mask, or images with dots in their names? "
            "--shard-images .jpg tells images by what their names end with; a label for each, NAME.cls, tells images "
            "with dots."
        )
    return samples


def _extents(tar: tarfile.TarFile) -> dict[str, tuple[int, int]]:
    """Start and size of every file by name, those with it that are links to another."""
    extents: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    for member in tar:
        if member.name in extents or member.name in links:
            raise ValueError(f"it holds {member.name} twice, and one of the two would be lost")
        if member.isfile():
            extents[member.name] = (member.offset_data, member.size)
        elif member.islnk():
            links[member.name] = member.linkname
        elif member.issym():
            links[member.name] = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname))
    for name, target in links.items():
        if target in extents:
            extents[name] = extents[target]
        elif is_image(name):
            raise ValueError(f"{name} is a link to {target}, which is not in it")
    return extents


def _check_end(path: Path, end: int) -> None:
    """Raise ValueError unless a tar file's last header is followed by zeros, and these by nothing: it would be lost."""
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(tarfile.BLOCKSIZE)
        if not rest:
            raise ValueError(f"it ends after {end} bytes without the zeros that every tar file ends with: cut short?")
        while rest:
            if rest.strip(b"\0"):
                raise ValueError(
                    f"from byte {end} on it holds what is no file of it: a broken header, or archives that were "
                    "joined, which `tar --ignore-zeros` unpacks"
                )
            rest = file.read(2**20)


def _up_to_dot(name: str, first: bool = False) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + (file.partition(".")[0] if first else file.rpartition(".")[0])


def _label(path: Path, file: BinaryIO, extents: Mapping[str, tuple[int, int]], keys: Sequence[str]) -> int | None:
    """The number in a KEY.cls, or by "label" or "cls" in a KEY.json; None without."""
    spelled = (key + suffix for key in keys for suffix in (".cls", ".json", ".CLS", ".JSON"))
    for name in spelled:
        if name not in extents:
            continue
        offset, size = extents[name]
        file.seek(offset)
        content = file.read(size)
        try:
            if name.lower().endswith(".cls"):
                label = int(content)
            else:
                fields = json.loads(content)
                labels = [fields[key] for key in ("label", "cls") if key in fields] if isinstance(fields, dict) else []
                if not labels:
                    continue
                label = operator.index(labels[0])
            if not -1 <= label < MOST_CLASSES:
                raise ValueError
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}:{name} holds {content[:80]!r}; a label is an integer below {MOST_CLASSES:,}, alone in a .cls "
                'file, or by the name "label" or "cls" in a .json file.'
            ) from error
        return label
    return None


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
    train = _first(root, "train") or root
    folder = _first(root, *EVALUATION) if split == "val" else train
    classes = list_folders(folder) if folder else []
    if (
        folder is None
        or not (classes or split == "unlabelled")
        or any((train / name / "train").is_dir() for name in classes)
    ):
        _fail(root, split, expected)
    if folder == root and (others := [name for name in classes if name.lower() in NO_CLASSES]):
        raise ValueError(
            f"{root} has {_listed(others)} but no train/, so that {others[0]} would be a class to train on: "
            f"move the classes into {root / 'train'}."
        )
    files: dict[str, list[str]] = {name: [] for name in classes}
    loose: list[str] = []
    for path in list_images(folder):
        name, slash, _ = path.partition("/")
        (files[name] if slash else loose).append(path)
    if split == "val" and train != root and classes != list_folders(train):
        differ = sorted({*classes} ^ {*list_folders(train)})
        raise ValueError(
            f"{train} and {folder} have different classes: {_listed(differ)} in one of them alone. "
            "Both need a folder for every class."
        )
    if split != "unlabelled":
        if empty := [name for name in classes if not files[name]]:
            raise FileNotFoundError(f"{folder}: found no valid file for the classes {_listed(empty)}.")
        if loose:
            raise ValueError(
                f"{folder} has {len(loose)} images beside the folders of the classes, so without label, such as "
                f"{loose[0]}: move them into the folder of their class, or out of {folder}."
            )

    below = "" if folder == root else f"{folder.name}/"
    names = [below + path for path in [*chain(*files.values()), *loose]]
    labels = [*chain(*([label] * len(files[name]) for label, name in enumerate(classes))), *[-1] * len(loose)]
    more = [name for name in list_folders(root) if name.lower() in UNLABELLED] if split == "unlabelled" else []
    if len(more) > 1:
        raise ValueError(f"{root} has {_listed(more)}, of which one can be read: move their images into one.")
    for name in more:
        unlabelled = list_images(root / name)
        names, labels = names + [f"{name}/{path}" for path in unlabelled], labels + [-1] * len(unlabelled)
    return Found(Files(root, names), torch.tensor(labels, dtype=torch.long), classes)


def _tiny_imagenet(root: Path, split: Split) -> Found:
    annotations = root / "val" / "val_annotations.txt"
    if split != "val" or not (root / "val" / "images").is_dir():
        return _folders(root, split)
    if not annotations.is_file():
        _fail(root / "val", split, "val_annotations.txt beside images/")
    classes = list_folders(root / "train")
    rows = [line.split("\t")[:2] for line in os.fsdecode(annotations.read_bytes()).splitlines()]
    if broken := [row for row in rows if len(row) < 2 or not is_image(row[0])]:
        raise ValueError(
            f"{annotations} has {len(broken)} lines that do not begin with an image, a tab and a class: {broken[:3]}."
        )
    if unknown := {name for _, name in rows} - {*classes}:
        raise ValueError(f"{annotations} names classes that {root / 'train'} lacks: {_listed(sorted(unknown))}.")
    files = Files(root, [f"val/images/{image}" for image, _ in rows])
    return Found(files, torch.tensor([classes.index(name) for _, name in rows]), classes)


def _torchvision(root: Path, split: Split, dataset: type[Any], unpacked: str) -> Found:
    if not (root / unpacked).is_dir():
        return _folders(root, split, f"{unpacked}/ as torchvision.datasets.{dataset.__name__} unpacks it, or {FOLDERS}")
    stl10 = dataset is datasets.STL10
    which = {"train": "train", "unlabelled": "train+unlabeled", "val": "test"}[split] if stl10 else split != "val"
    try:
        part = dataset(root, which)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{root / unpacked} is not as torchvision.datasets.{dataset.__name__} unpacks it: {error}"
        ) from error
    if stl10:
        labels = integer_labels(part.labels)
        names = getattr(part, "classes", [str(label) for label in range(10)])  # their file may be missing
        return Found(Arrays(torch.from_numpy(part.data)), labels, names)
    return Found(Arrays(torch.from_numpy(part.data).permute(0, 3, 1, 2)), torch.tensor(part.targets), part.classes)


def _shards(root: Path, split: Split, suffix: str | None) -> Found:
    name = "val" if split == "val" else "train"
    paths = _shard_paths(root, name)
    if not paths:
        _fail(root, split, f"{name}/*.tar or *{name}*.tar")
    shards = Shards(paths, root / f"{name}-index.npz", suffix)
    count = int(shards.labels.max()) + 1 if len(shards.labels) else 0
    return Found(shards, shards.labels, [str(label) for label in range(count)])


def _shard_paths(root: Path, name: str) -> list[Path]:
    """The tar files of train or val, sorted; what may be meant as one of them but cannot be read as such is refused."""
    folder = _first(root, name)
    inside = []
    if folder:
        found = {*list_files(folder, _is_archive), *filter(_is_archive, list_folders(folder))}
        inside = [folder / path for path in sorted(found)]
    beside = sorted(
        path
        for path in root.iterdir()
        if name in path.name.lower() and _is_archive(path.name) and not is_hidden(path.name)
    )
    names = [path.name for path in beside]
    if both := [each for each in names if "train" in each.lower() and "val" in each.lower()]:
        raise ValueError(
            f"{root} has {len(both)} shards that are named after both train and val: {_listed(both)}. Move them into "
            "train/ or val/, or rename them."
        )
    if folder and inside and beside:
        raise ValueError(
            f"{root} has {len(inside)} shards in {folder.name}/ and {len(beside)} beside it: {_listed(names)}. Move "
            f"these into {folder.name}/, or out of {root}."
        )
    paths = inside or beside
    if compressed := [str(path) for path in paths if path.suffix.lower() != ".tar"]:
        raise ValueError(
            f"{len(compressed)} of {len(paths)} shards are compressed, such as {compressed[0]}: decompress them "
            "to plain .tar files, in which any image is one read away."
        )
    if deeper := [str(path) for path in inside if path.parent != folder]:
        raise ValueError(
            f"{len(deeper)} of {len(paths)} shards lie in folders inside {folder}, such as {deeper[0]}: move them into "
            f"{folder} itself."
        )
    return paths


def _is_archive(name: str) -> bool:
    """Whether a file of this name is a tar file, also a compressed one."""
    return name.lower().endswith((".tar", *COMPRESSED))


def _subset(
    file: Path, split: Split, names: np.ndarray, labels: Tensor, classes: Sequence[str]
) -> tuple[Tensor, Tensor, Sequence[str]]:
    """The images that a list keeps, their labels and classes."""
    lines = [line.strip() for line in os.fsdecode(file.read_bytes()).splitlines() if line.strip()]
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
        places[os.fsdecode(name).rpartition("/")[2]].append(index)
    found = [
        [i for i in places[line.rpartition("/")[2]] if f"/{os.fsdecode(names[i])}".endswith(f"/{line}")]
        for line in lines
    ]
    if missing := [line for line, indices in zip(lines, found, strict=True) if len(indices) != 1]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(lines)} lines of {file} are neither a class nor the name of one image: "
            f"{_listed(missing)}. Write paths as CLASS/IMAGE."
        )
    kept = torch.tensor(found)[:, 0].unique()
    return kept, labels[kept], classes


def _first(root: Path, *names: str) -> Path | None:
    """The folder of one of these names, in whatever case, as the file systems of Windows and macOS have it."""
    found = {name.lower(): name for name in list_folders(root)}
    spelled = [name if (root / name).is_dir() else found.get(name) for name in names]
    return next((root / name for name in spelled if name), None)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _fail(root: Path, split: str, expected: str) -> NoReturn:
    found = _listed(sorted(path.name + "/" * path.is_dir() for path in root.iterdir()))
    raise FileNotFoundError(f"no {split} images in {root}: expected {expected}; found {found or 'nothing'}.")
