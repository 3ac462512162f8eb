"""Learn handwritten digits without their labels, on the CPU, in a minute or two.

pip install "cgh-ssl[examples]"
python examples/quickstart.py

A small network is trained by CGH, and another by InfoNCE alone. A table tells how well images of the same digit lie
together in what they learned; a checkpoint and pictures go to runs/quickstart.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import kornia.augmentation as K
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import cgh
from cgh import plot

TRAIN, BATCH = 1400, 128  # the other 397 images are for testing
STEPS = TRAIN // BATCH  # an epoch
HELD_OUT = 300  # of the training images, where settings are to be chosen

strong_view = nn.Sequential(
    K.RandomAffine(degrees=20, translate=(0.08, 0.08), scale=(0.8, 1.25), shear=(-15, 15, -15, 15), p=1.0),
    K.RandomElasticTransform(kernel_size=(17, 17), sigma=(4.0, 4.0), alpha=(1.5, 1.5), p=1.0),
    K.RandomGamma((0.6, 1.6), p=1.0),
    K.RandomGaussianNoise(std=0.05, p=1.0),
)
weak_view = K.RandomAffine(degrees=6, translate=(0.03, 0.03), scale=(0.9, 1.1), shear=(-3, 3, -3, 3), p=1.0)


@dataclass
class Config:
    """Learn handwritten digits without their labels."""

    epochs: int = 80
    """Passes over the training images by CGH."""
    infonce_epochs: int = 25
    """Passes by InfoNCE alone."""
    learning_rate: float = 3e-3
    """The highest, of both."""
    momentum: float = 0.98
    """Of the teacher."""
    warmup: float = 0.25
    """Share of CGH's steps over which InfoNCE fades out."""
    seed: int = 0
    """Of the networks' start, the order of the images and their views."""
    validate: bool = False
    """Judge by 300 of the training images, which are then not trained on; the test images stay untouched."""
    out: Path = Path("runs/quickstart")
    """Where the checkpoint and the pictures go."""
    format: Literal["png", "svg", "pdf"] = "png"
    """Of the pictures."""


class Digits(NamedTuple):
    """Images to train on, followed by those to judge by."""

    images: Tensor
    """`(N, 1, 32, 32)` in [0, 1]."""
    labels: Tensor
    """`(N,)`."""
    train: int
    """How many are to train on."""


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, `(1797, 1, 32, 32)` in [0, 1], with their labels, shuffled once and for all."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().div(16).unsqueeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return F.interpolate(images[order], size=32, mode="bilinear"), torch.from_numpy(data.target)[order]


def split(config: Config) -> Digits:
    """Return all digits, or with `validate` those for training alone."""
    images, labels = digits()
    return (
        Digits(images[:TRAIN], labels[:TRAIN], TRAIN - HELD_OUT) if config.validate else Digits(images, labels, TRAIN)
    )


def network(width: int = 16) -> nn.Sequential:
    """Return a backbone of four layers, images `(N, 1, 32, 32)` to a pooled feature `(N, 8 * width)`."""
    layers, channels = OrderedDict[str, nn.Module](), [1, width, 2 * width, 4 * width, 8 * width]
    for i in range(4):
        convolution = nn.Conv2d(channels[i], channels[i + 1], kernel_size=3, stride=2, padding=1, bias=False)
        layers[f"layer{i + 1}"] = nn.Sequential(convolution, nn.BatchNorm2d(channels[i + 1]), nn.ReLU())
    return nn.Sequential(OrderedDict(layers, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))


def method(config: Config, **options: Any) -> cgh.CGH:
    """Return CGH with a new network; InfoNCE fades out over a share of the steps."""
    torch.manual_seed(config.seed)
    sizes: dict[str, Any] = {"dim": 64, "hidden_dim": 256, "memory_size": 2048, "image_shape": (1, 32, 32)}
    warmup = {"warmup_steps": round(config.warmup * config.epochs * (split(config).train // BATCH))}
    return cgh.CGH(network(), momentum=config.momentum, **(sizes | warmup | options))


def pretrain(model: cgh.CGH, config: Config, progress: Progress, name: str, infonce: bool = False) -> dict[str, Any]:
    """Train `model`, by its InfoNCE alone if so asked, and return its curves."""
    data = split(config)
    steps_per_epoch = data.train // BATCH
    epochs = config.infonce_epochs if infonce else config.epochs
    steps = epochs * steps_per_epoch
    schedule = cgh.LearningRate(base=config.learning_rate, steps=steps, warmup_steps=steps // 20)
    optimizer = torch.optim.AdamW(model.student.parameters(), weight_decay=1e-4)
    curves: dict[str, dict[int, float]] = {"InfoNCE": {}, "relations": {}, "k-NN, %": {}}
    bar = progress.add_task(name, total=epochs, now="")
    torch.manual_seed(config.seed)  # every method sees the same views
    for epoch in range(epochs):
        for batch in torch.randperm(data.train).split(BATCH)[:steps_per_epoch]:
            optimizer.param_groups[0]["lr"] = schedule(model.steps)
            output = model(strong_view(data.images[batch]), weak_view(data.images[batch]))
            loss = output.infonce if infonce else output.loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update(output)
            curves["relations"][model.steps] = sum(output.terms.values()).item() / len(output.terms)
            if output.weights.infonce:
                curves["InfoNCE"][model.steps] = output.infonce.item()
        if epoch % 5 == 4 or epoch + 1 == epochs:
            curves["k-NN, %"][model.steps] = accuracies(embed(model, data.images)[1], data.labels, data.train)[0]
        now = "  ".join(f"{quantity} {[*curve.values()][-1]:.2f}" for quantity, curve in curves.items() if curve)
        progress.update(bar, advance=1, now=now)
    return {quantity: (list(curve), list(curve.values())) for quantity, curve in curves.items() if curve}


@torch.no_grad()
def embed(model: cgh.CGH, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the student's pooled features of `images` and its global embeddings."""
    model.eval()
    features = model.student.extractor(images)
    z = model.student.project(features)
    model.train()
    return features.pooled, z["global"]


def accuracies(features: Tensor, labels: Tensor, train: int = TRAIN) -> tuple[float, float]:
    """Return, in percent, how often 20 neighbours are right, and the nearest class mean of five labels a class."""
    (x, test), (y, truth) = (each.tensor_split([train]) for each in (features, labels))
    hits, generator = [], torch.Generator().manual_seed(0)
    for _ in range(10):  # draws of the labels
        drawn = torch.randperm(train, generator=generator)
        means = [F.normalize(x[drawn[y[drawn] == digit][:5]], dim=1).mean(dim=0) for digit in range(10)]
        nearest = (test @ F.normalize(torch.stack(means), dim=1).T).argmax(dim=1)
        hits.append((nearest == truth).double().mean().item())
    return cgh.evaluate.knn(x, y, test, truth, k=20)[20][0], 100 * sum(hits) / len(hits)


def typical(features: Tensor, data: Digits) -> Tensor:
    """Return a test image of each digit `(10,)`: that with its median count of right ones among eight neighbours."""
    (bank, test), (y, truth) = (each.tensor_split([data.train]) for each in (F.normalize(features, dim=1), data.labels))
    right = (y[(test @ bank.T).topk(8).indices] == truth[:, None]).sum(dim=1)
    of_digit = [(truth == digit).nonzero()[:, 0] for digit in range(10)]
    return torch.stack([places[right[places].median(dim=0).indices] for places in of_digit])


def main(config: Config, others: Mapping[str, cgh.CGH] | None = None) -> None:
    """Train InfoNCE alone, CGH and the `others`, print the table, and write the checkpoint and the pictures of CGH."""
    console, data = Console(), split(config)
    # Both are the same network on the same views, and compute the same losses; they differ in what they minimise.
    infonce = method(config, warmup_steps=config.infonce_epochs * STEPS)
    models = {"InfoNCE alone": infonce, "CGH": method(config), **(others or {})}
    features = {"raw pixels": data.images.flatten(1), "untrained network": embed(models["CGH"], data.images)[0]}
    with Progress("{task.description}", BarColumn(12), "{task.fields[now]}", TimeElapsedColumn()) as progress:
        curves = {n: pretrain(model, config, progress, n, n == "InfoNCE alone") for n, model in models.items()}
    features |= {name: embed(model, data.images)[1] for name, model in models.items()}

    table = Table("", "20 neighbours", "five labels a class")
    for name, x in features.items():
        table.add_row(name, *(f"{accuracy:.1f} %" for accuracy in accuracies(x, data.labels, data.train)))
    console.print(table)

    cgh.checkpoint.save(models["CGH"].state_dict(), config.out / "checkpoint.pt")
    plot.save(plot.curves(curves, window=STEPS), config.out / f"curves.{config.format}")
    train, test = slice(data.train), slice(data.train, None)
    before, after = features["untrained network"], features["CGH"]
    shown = data.train + typical(before, data)
    pairs = {"before training": (before[shown], before[train]), "after training": (after[shown], after[train])}
    labels = data.labels[shown], data.labels[train]
    plot.save(
        plot.neighbours(data.images[shown], data.images[train], pairs, labels),
        config.out / f"neighbours.{config.format}",
    )
    maps = {"before training": before[test], "after training": after[test]}
    plot.save(plot.embedding(maps, data.labels[test]), config.out / f"map.{config.format}")
    console.print(f"checkpoint.pt and the pictures curves, neighbours and map are in {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:
        sys.exit("stopped")
