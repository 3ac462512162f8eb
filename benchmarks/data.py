"""Images a second of one core: two 224-pixel views of a JPEG until they are ready for the device.

python benchmarks/data.py --images /data/imagenet/val    # a folder or tar file of JPEGs; --quick for a short look

The baseline is the pipeline that is usual for this kind of training: Pillow decodes, torchvision's first transforms
crop, colour and blur image by image. The three take turns, and a figure is the median over the rounds, by the time of
the CPU, so that other processes matter little. A second table has decoding alone, by each decoder that is installed.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from cgh import views

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "imagenet"))
from data import Batches, DataConfig
from files import decode_by_pillow


@dataclass
class Config:
    """Measure the data path beside a plain Pillow pipeline."""

    images: Path | None = None
    """Folder or tar file of JPEGs; without, 200 of ImageNet's median size are made."""
    batch: int = 32
    """Images in a batch."""
    rounds: int = 5
    """Passes over the images, of each pipeline."""
    quick: bool = False
    """A short look, at 64 images, twice."""


class PillowBlur:
    """Pillow's Gaussian blur of a radius that is drawn."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(0.1, 2.0).item()))


class TwoViews:
    """A strong and a weak view, image by image, by Pillow."""

    def __init__(self) -> None:
        normalise = [T.ToTensor(), T.Normalize(views.IMAGENET_MEAN, views.IMAGENET_STD)]
        crop, flip = T.RandomResizedCrop(224, scale=(0.2, 1.0)), T.RandomHorizontalFlip()
        colour = [
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([PillowBlur()], p=0.5),
        ]
        self.strong, self.weak = T.Compose([crop, *colour, flip, *normalise]), T.Compose([crop, flip, *normalise])

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        return self.strong(image), self.weak(image)


def pillow(root: Path, batch: int) -> Iterator[Any]:
    """Yield batches of the usual pipeline."""
    yield from DataLoader(ImageFolder(str(root), TwoViews()), batch, shuffle=True, drop_last=True)


def on_the_cpu(root: Path, batch: int) -> Iterator[Any]:
    """Yield batches of ours, colour and blur included."""
    augment = views.Augmentation(colour=False)
    for crops, _ in Batches(DataConfig(root), v2.Compose([views.Crops(), views.Colour()]), batch).epoch(0):
        yield augment(crops, seed=0)


def for_an_accelerator(root: Path, batch: int) -> Iterator[Any]:
    """Yield what the host prepares where colour, blur and normalisation run on the accelerator."""
    yield from Batches(DataConfig(root), views.Crops(), batch).epoch(0)


PIPELINES = {
    "Pillow, image by image": pillow,
    "ours, all on the CPU": on_the_cpu,
    "ours, colour and blur on the accelerator": for_an_accelerator,
}
"""By name; the first is what the others are compared with."""


def decoders() -> dict[str, Callable[[bytes], Tensor]]:
    """Return the decoders of JPEGs by name; torchvision's is deprecated since its version 0.29."""
    found: dict[str, Callable[[bytes], Tensor]] = {"Pillow": decode_by_pillow}

    def as_tensor(encoded: bytes) -> Tensor:
        return torch.frombuffer(bytearray(encoded), dtype=torch.uint8)

    with contextlib.suppress(ImportError):
        from torchvision.io import decode_jpeg

        found["torchvision"] = lambda x: decode_jpeg(as_tensor(x), "RGB", apply_exif_orientation=True)
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        import torchcodec.decoders

        found["torchcodec"] = lambda x: torchcodec.decoders.decode_jpeg(as_tensor(x))
    return found


def make_images(folder: Path, count: int) -> None:
    """Write JPEGs of ImageNet's median size whose spectrum falls as that of photographs does."""
    height, width = 375, 500
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    (folder / "made").mkdir()
    for i in range(count):
        noise = np.fft.rfft2(np.random.default_rng(i).normal(size=(3, height, width)))
        waves = np.fft.irfft2(noise / frequency, s=(height, width))
        pixels = (128 + 50 * waves / waves.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / "made" / f"{i:04}.jpg", quality=89)


def jpegs(images: Path | None, count: int, scratch: Path) -> Path:
    """Return a folder with `count` JPEGs at most, all in one subfolder."""
    if images is None:
        make_images(scratch, count)
        return scratch
    if images.is_file():
        with tarfile.open(images) as tar:
            tar.extractall(scratch / "tar", filter="data")
        images = scratch / "tar"
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise SystemExit(f"{images} holds no .jpg or .jpeg file.")
    (scratch / "linked" / "all").mkdir(parents=True)
    for i, path in enumerate(found[:count]):
        (scratch / "linked" / "all" / f"{i:05}.jpg").symlink_to(path.resolve())
    return scratch / "linked"


def main(config: Config) -> None:
    """Print the table."""
    count, rounds = (64, 2) if config.quick else (2048, config.rounds)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    with tempfile.TemporaryDirectory() as scratch:
        root = jpegs(config.images, count if config.images else min(count, 200), Path(scratch))
        encoded = [path.read_bytes() for path in sorted(root.rglob("*.jpg"))]
        decoding: dict[str, list[float]] = {name: [] for name in decoders()}
        for _ in range(rounds + 1):
            for name, decode in decoders().items():
                start = time.process_time()
                for image in encoded:
                    decode(image)
                decoding[name].append(len(encoded) / (time.process_time() - start))
        speeds: dict[str, list[float]] = {name: [] for name in PIPELINES}
        for _ in range(rounds + 1):
            for name, pipeline in PIPELINES.items():
                start = time.process_time()
                batches = sum(1 for _ in pipeline(root, config.batch))
                speeds[name].append(batches * config.batch / (time.process_time() - start))

    show("Two 224-pixel views of a JPEG, one core", "pipeline", speeds)
    show("Decoding a JPEG alone, one core", "decoder", decoding)


def show(title: str, what: str, speeds: dict[str, list[float]]) -> None:
    """Print the medians of all rounds but the first, which warms up, beside the first row's."""
    table = Table(title=title)
    table.add_column(what)
    table.add_column("images/s", justify="right")
    table.add_column("times Pillow's", justify="right")
    medians = {name: statistics.median(speed[1:]) for name, speed in speeds.items()}
    for name, median in medians.items():
        table.add_row(name, f"{median:.0f}", f"{median / next(iter(medians.values())):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
