"""Does learning across the contexts beat learning within one? CIFAR, equal budgets, methods that differ in that alone.

pip install "cgh-ssl[examples]"
python examples/study/study.py search --root CIFAR --epochs 20            # settings, by held-out training images
python examples/study/study.py run --root CIFAR --searched runs/study/search
python examples/study/study.py table                                      # table.md, results.csv, curves.png

`run` trains every method with every seed, evaluates it and goes on where it was stopped: `--minutes 8` fits it into
stretches of ten minutes. On a GPU it computes in bfloat16, compiled, a step being one
CUDA graph; on a CPU choose a small `--width` and `--size`. `--arch` takes any backbone of torchvision or timm.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from factors import FACTORS, factors_table, measure
from graph import Graphed
from images import Images, load
from methods import METHODS, TARGETS, Learner, Method, Settings, resnet18
from results import add_rows, markdown, mean_and_spread, mean_curves, read_rows, to_csv
from rich.console import Console
from rich.progress import Progress, TextColumn
from run import mixed_seed
from torch import Tensor, nn

import cgh
from cgh import checkpoint, plot, views
from cgh.schedules import Weights

BASELINES = {"pixels": "pixels", "untrained": "untrained network"}
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)  # of CIFAR-10's training images
NEIGHBOURS = (20, 200)
QUANTITIES = tuple(f"{k} neighbours" for k in NEIGHBOURS)
HELD_OUT = 10  # one training image of so many is what a search judges by, and never trains on
PROBE_EPOCHS = 100
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
BUDGET = ("epochs", "images", "size", "width", "batch", "settings")  # what runs of one table have in common
LISTED_DEPTH = 3  # parts of the names of layers that are listed, as the blocks of a transformer have
COSTS = ("images/s", "peak memory, MiB", "minutes")
console = Console()


@dataclass(frozen=True)
class Budget:
    """What all methods have in common."""

    root: Path
    """Folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or torchvision's CIFAR-10 or CIFAR-100."""
    out: Path = Path("runs/study")
    """Folder for results; a run that was stopped goes on from there."""
    epochs: int = 200
    batch: int = 256
    images: int | None = None
    """Training images, drawn once for all runs; all by default."""
    size: int = 32
    """Side in pixels; the images are scaled down to it once."""
    arch: str = "resnet18"
    """torchvision's name of a backbone, or timm's after "timm/"; "resnet18" is the study's own for small images."""
    small_images: bool = False
    """Of another ResNet: a 3x3 stem of stride 1, and no max pool."""
    width: int = 64
    """Channels of resnet18's first stage."""
    dim: int = 128
    """Of the embeddings."""
    weight_decay: float = 5e-4
    learning_rate_warmup: float = 0.025
    """Share of the steps."""
    crop: tuple[float, float] = (0.2, 1.0)
    """Least and greatest share of the area, in both views."""
    every: int = 10
    """Epochs from one evaluation to the next."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: bool = torch.cuda.is_available()
    graph: bool = True
    """On a GPU, a step is one CUDA graph."""
    minutes: float = float("inf")
    """Stop after the first epoch that ends later than this; the next call goes on."""


@dataclass(frozen=True)
class Run(Budget):
    """Train and evaluate."""

    methods: tuple[str, ...] = (*METHODS, *BASELINES)
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: Settings = field(default_factory=Settings)
    searched: Path | None = None
    """Folder of a search; a method that it chose settings for takes them."""
    results: Path = RESULTS / "study.csv"
    """Gets the rows of each run that is done: one an evaluation."""


@dataclass(frozen=True)
class Search(Budget):
    """Choose settings on held-out training images, one after another, for each method by itself."""

    methods: tuple[str, ...] = tuple(METHODS)
    settings: Settings = field(default_factory=Settings)
    """Where the search starts."""
    learning_rate: tuple[float, ...] = (0.03, 0.06, 0.12)
    temperature: tuple[tuple[float, float, float, float], ...] = (
        (0.10, 0.08, 0.04, 0.08),
        (0.10, 0.08, 0.04, 0.04),
        (0.10, 0.10, 0.04, 0.04),
        (0.10, 0.10, 0.05, 0.05),
        (0.20, 0.20, 0.05, 0.05),
    )
    """Student global, student hypercolumn, teacher global, teacher hypercolumn."""
    infonce_temperature: tuple[float, ...] = (0.1, 0.2)
    momentum: tuple[float, ...] = (0.99, 0.996)
    memory_size: tuple[int, ...] = (4096, 16384)
    warmup: tuple[float, ...] = (0.025, 0.1, 0.3)


@dataclass(frozen=True)
class Factors(Budget):
    """Change one setting at a time, on held-out training images, beside what a seed alone changes."""

    method: str = "across"
    settings: Settings = field(default_factory=Settings)
    """Where each change starts from."""
    noise_seeds: int = 5
    """Runs of that start, which tell the noise."""
    seeds: int = 2
    """Runs of each change."""
    factors: tuple[str, ...] = tuple(FACTORS)
    """Names of what to change."""
    results: Path = RESULTS / "factors.csv"
    """Gets a row for each run."""


@dataclass(frozen=True)
class Table:
    """Rebuild the tables and the curves from the rows of all runs."""

    out: Path = Path("runs/study")
    """Folder for table.md and the curves."""
    results: Path = Run.results
    format: Literal["png", "svg", "pdf"] = "png"
    """Of the pictures."""


class OutOfTimeError(Exception):
    """The minutes are over; all is saved."""


def main(command: Run | Search | Factors | Table) -> None:
    """Do what the command line says."""
    try:
        if isinstance(command, Run):
            run(command)
        elif isinstance(command, Search):
            search(command)
        elif isinstance(command, Factors):
            factors(command)
        else:
            table(command.out, command.results, command.format)
    except OutOfTimeError:
        console.print("Stopped at a checkpoint; the same command goes on from there.")


def run(config: Run) -> None:
    """Train and evaluate every method with every seed; what is done already is left as it is."""
    _check_methods(config.methods, [*METHODS, *BASELINES])
    train, test = (load(config.root, split, config.size, config.out / "images") for split in ("train", "test"))
    train = train.take(_order(train)[: config.images])
    settings = dict.fromkeys(config.methods, config.settings)
    if config.searched:
        chosen = {path.stem: json.loads(path.read_text()) for path in config.searched.glob("*.json")}
        settings |= {name: _settings(chosen[name]) for name in config.methods if name in chosen}
    study = Study(config, train, test)
    for seed in config.seeds:
        for name in config.methods:
            folder = config.out / "runs" / f"{name}-{seed}"
            study.result(name, settings[name], seed, folder)
            record(config, len(train.labels), name, seed, folder)
    table(config.out, config.results)


def record(config: Run, images: int, name: str, seed: int, folder: Path) -> None:
    """Add a run's evaluations to the results, unless they are there."""
    settings = str(config.searched or _difference(config.settings))
    if config.arch != Budget.arch:
        settings = f"{config.arch}: {settings}"
    budget = (config.epochs, images, config.size, config.width, config.batch, settings)
    key = {"method": name, "seed": seed, **dict(zip(BUDGET, budget, strict=True))}
    there = {(row["method"], row["seed"], *(row[column] for column in BUDGET)) for row in read_rows(config.results)}
    if tuple(map(str, key.values())) in there:
        return
    result = json.loads((folder / "result.json").read_text())
    log = folder / "log.csv"
    judged = [row for row in read_rows(log) if row[QUANTITIES[0]]] or [{"epoch": 0}]
    rows: list[dict[str, Any]] = [
        {**key, "epoch": row["epoch"], **{q: row.get(q) for q in QUANTITIES}, "linear": None} for row in judged
    ]
    rows[-1] |= {column: result.get(column) for column in (*QUANTITIES, "linear", *TARGETS, *COSTS)}
    add_rows(config.results, rows)


def search(config: Search) -> None:
    """Choose settings for every method by 20 neighbours among training images that the trials do not train on.

    One setting after another, each beside the best of those before. The test images are never opened.
    """
    _check_methods(config.methods, METHODS)
    images = load(config.root, "train", config.size, config.out / "images")
    study = Study(config, *hold_out(images, config.images))
    for name in config.methods:
        rows = []
        tried: dict[Settings, float] = {}
        best = config.settings
        for changes in _candidates(config, METHODS[name]):
            for change in changes:
                settings = replace(best, **change)
                if settings not in tried:
                    folder = config.out / "search" / f"{name}-{len(tried):02d}"
                    tried[settings] = study.result(name, settings, 0, folder, linear=False)["20 neighbours"]
                    rows.append({"method": name, **asdict(settings), "20 neighbours": tried[settings]})
            best = max(tried, key=tried.__getitem__)
        write(config.out / "search" / f"{name}.json", json.dumps(asdict(best), indent=2))
        write(config.out / "search" / f"{name}.csv", to_csv(rows))


def factors(config: Factors) -> None:
    """Judge one change at a time by 20 neighbours among training images that no run trains on.

    The test images are never opened. The start runs with more seeds than the changes, as its spread is the noise that a
    difference has to exceed. What has a row is not repeated.
    """
    _check_methods([config.method], METHODS)
    images = load(config.root, "train", config.size, config.out / "images")
    study = Study(config, *hold_out(images, config.images))

    def judge(settings: Settings, change: str, seed: int) -> dict[str, Any]:
        folder = config.out / "factors" / f"{config.method}-{change}-{seed}".replace(" ", "-")
        result = study.result(config.method, settings, seed, folder, linear=False)
        figures = {quantity: result[quantity] for quantity in (*QUANTITIES, *TARGETS, "images/s")}
        return {"epochs": config.epochs, "images": len(study.train.labels), **figures}

    measure(config.results, config.method, config.settings, config.noise_seeds, config.seeds, judge, config.factors)
    console.print(factors_table(read_rows(config.results), *QUANTITIES), soft_wrap=True, highlight=False)


def hold_out(images: Images, count: int | None) -> tuple[Images, Images]:
    """Return the first `count` images that a run would train on, and others that none of a search trains on."""
    order = _order(images)
    rest = len(order) - len(order) // HELD_OUT
    return images.take(order[:rest][:count]), images.take(order[rest:])


class Study:
    """Trains and evaluates, on one set of images and to one budget, until the time is over.

    Args:
        budget: what all runs have in common.
        train: images to learn from, and neighbours to vote.
        test: images to judge by.
    """

    def __init__(self, budget: Budget, train: Images, test: Images) -> None:
        self.budget, self.device = budget, torch.device(budget.device)
        self.train, self.test = train.to(self.device), test.to(self.device)
        if len(train.labels) < budget.batch:
            raise ValueError(f"{len(train.labels)} images do not fill a batch of {budget.batch}; lower --batch.")
        if self.device.type == "cpu" and budget.width < 8:
            raise ValueError(
                f"--width {budget.width} on a CPU: with fewer than 8 channels, channels last, PyTorch's gradients are "
                "wrong on some processors (1x1 convolutions of stride 2, without AVX-512). Take 8 or more."
            )
        if len(train.labels) < max(NEIGHBOURS):
            raise ValueError(
                f"{len(train.labels)} training images have not the {max(NEIGHBOURS)} neighbours that judge a run; take "
                "more."
            )
        if budget.arch == Budget.arch and budget.small_images:
            raise ValueError("--small-images is of other ResNets: resnet18 here is made for small images as it is.")
        if budget.arch != Budget.arch and budget.width != Budget.width:
            raise ValueError(f"--width {budget.width} is of resnet18, but --arch is {budget.arch}; leave it out.")
        self.steps_per_epoch = len(train.labels) // budget.batch
        self.crops = views.BatchCrops(budget.size, budget.crop)
        layout = {"memory_format": torch.channels_last}
        self.augment = views.Augmentation(MEAN, STD, blur=False, **layout).to(self.device)
        self.normalise = views.Augmentation(MEAN, STD, colour=False).to(self.device)
        self.deadline = time.monotonic() + 60 * budget.minutes
        torch.backends.cudnn.deterministic = True

    def result(self, name: str, settings: Settings, seed: int, folder: Path, linear: bool = True) -> dict[str, Any]:
        """Return a run's figures: those it wrote, or else of what is left of its training.

        Raises:
            ValueError: the folder holds a run of another configuration.
            OutOfTimeError: the time is over, and the run is not.
        """
        common = {
            f.name: getattr(self.budget, f.name) for f in fields(Budget) if f.name not in ("out", "minutes", "graph")
        }
        if settings.layers == Settings.layers and self.budget.arch != Budget.arch:
            settings = replace(settings, layers=cgh.interop.default_layers(self._backbone()))
        config = {"method": name, "seed": seed, **asdict(settings), **common}
        _check_config(folder, json.loads(json.dumps(config, default=str)))
        path = folder / "result.json"
        if not path.exists():
            result: dict[str, Any] = {"method": name, "seed": seed}
            if name == "pixels":
                features = [images.pixels.flatten(1).float() for images in (self.train, self.test)]
            else:
                learner, log = self._trained(name, settings, seed, folder)
                features = self._features(learner)
                if log:
                    result |= _summary(log)
                    targets = learner.targets(*self.normalise([self.train.pixels[:1024]], seed=0))
                    result |= {name: targets.get(name) for name in TARGETS}
            result |= self._neighbours(*features)
            if linear:
                result["linear"] = self._linear(*features)
            write(path, json.dumps(result, indent=2))
            console.print(json.dumps(result), soft_wrap=True, highlight=False)
        return dict(json.loads(path.read_text()))

    def _trained(self, name: str, settings: Settings, seed: int, folder: Path) -> tuple[Learner, list[dict[str, Any]]]:
        """The learner at the end of its training, and the log of its epochs."""
        budget = self.budget
        epochs = 0 if name == "untrained" else budget.epochs
        method = METHODS.get(name, METHODS["infonce-global"])
        steps = epochs * self.steps_per_epoch
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        torch.manual_seed(seed)
        learner = self._learner(method, settings, steps, seed)
        learner = learner.to(self.device)
        learner = learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
        optimizer = learner.optimizer(budget.weight_decay)
        peak = settings.learning_rate * budget.batch / 256
        rate = cgh.LearningRate(peak, steps, round(budget.learning_rate_warmup * steps))
        log: list[dict[str, Any]] = []
        saved = folder / "checkpoint.pt"
        if saved.exists():
            state = checkpoint.load(saved, self.device)
            learner.load_state_dict(state["learner"])
            optimizer.load_state_dict(state["optimizer"])
            log = state["log"]
        if budget.compile:
            torch.compiler.reset()  # each learner is compiled anew
            learner.student.compile()
            learner.teacher.encoder.compile()
        train_step = self._train_step(learner, optimizer)
        writer = checkpoint.Writer(partial(checkpoint.save, path=saved))
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(f"{name}-{seed}", total=epochs, completed=len(log), note="")
            while len(log) < epochs:
                start = time.monotonic()
                loss = self._epoch(train_step, learner, rate, seed, len(log))
                seconds = time.monotonic() - start
                images = self.steps_per_epoch * budget.batch
                row: dict[str, Any] = {"epoch": len(log) + 1, "loss": loss, "images/s": images / seconds}
                if row["epoch"] % budget.every == 0 or row["epoch"] == epochs:
                    row |= self._neighbours(*self._features(learner))
                row["minutes"] = (time.monotonic() - start) / 60
                row["peak memory, MiB"] = _peak_memory(self.device)
                log.append(row)
                state = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict(), "log": log}
                writer.save(state)
                write(folder / "log.csv", to_csv(log))
                note = f"loss {loss:.3f}, {row['images/s']:.0f} images/s"
                progress.update(bar, advance=1, note=note)
                if time.monotonic() > self.deadline:
                    writer.wait()
                    raise OutOfTimeError
        writer.wait()
        return learner, log

    def _backbone(self) -> nn.Module:
        budget = self.budget
        if budget.arch == Budget.arch:
            return resnet18(budget.width)
        return cgh.interop.build_backbone(budget.arch, budget.small_images, budget.size)

    def _learner(self, method: Method, settings: Settings, steps: int, seed: int) -> Learner:
        budget, backbone = self.budget, self._backbone()
        try:
            return Learner(method, settings, steps, backbone, (3, budget.size, budget.size), budget.dim, seed)
        except ValueError as error:
            if "layer" not in str(error):
                raise
            table = cgh.list_layers(backbone, budget.size, depth=LISTED_DEPTH)
            raise ValueError(f"{budget.arch}, {method.title}: {error}\n{table}") from error

    def _train_step(self, learner: Learner, optimizer: torch.optim.Optimizer) -> Callable[..., Tensor]:
        """What trains by one batch and returns its loss: on a GPU a CUDA graph, one for the warm-up and one after it.

        It takes the learning rate, the losses' weights, which images, and what both parts of the augmentation drew.
        """

        def step(rate: float | Tensor, weights: Weights, index: Tensor, crops: Tensor, colours: Tensor) -> Tensor:
            cut = self.crops.transform(self.train.pixels[index], crops)
            strong, weak = self.augment.transform(cut, colours)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            with self._autocast():
                loss, teacher = learner(strong, weak, weights)
            loss.backward()
            optimizer.step()
            learner.update(teacher)
            return loss.detach()

        def recorded(weights: Weights, numbers: Tensor, *inputs: Tensor) -> Tensor:
            return step(numbers[0], Weights(numbers[1] if weights.infonce else 0.0, numbers[2]), *inputs)

        # A momentum that rises is a number of the host.
        if self.device.type == "cpu" or not self.budget.graph or callable(learner.teacher.momentum):
            return lambda rate, weights, *inputs: step(rate, weights, *(x.to(self.device) for x in inputs))
        graphs: dict[bool, Graphed] = {}

        def replay(rate: float, weights: Weights, *inputs: Tensor) -> Tensor:
            fading = weights.infonce > 0
            if fading not in graphs:
                graphs[fading] = Graphed(partial(recorded, weights), self.device)
            return graphs[fading](torch.tensor([rate, *weights]), *inputs)

        return replay

    def _epoch(
        self, train_step: Callable[..., Tensor], learner: Learner, rate: cgh.LearningRate, seed: int, epoch: int
    ) -> float:
        """Train for an epoch, of which the seed and its number decide all draws; return the mean loss."""
        batch, shape = self.budget.batch, self.train.pixels.shape
        shuffle = torch.Generator().manual_seed(mixed_seed(seed, epoch, 0))
        order = torch.randperm(shape[0], generator=shuffle)
        total = torch.zeros((), device=self.device)
        for i, index in enumerate(order.split(batch)[: self.steps_per_epoch]):
            step = epoch * self.steps_per_epoch + i
            draw = mixed_seed(seed, step, 1)
            crops, colours = self.crops.draw((batch, *shape[1:]), draw), self.augment.draw(batch, draw)
            total += train_step(rate(step), learner.weights(step), index, crops, colours)
        return total.item() / self.steps_per_epoch

    @torch.no_grad()
    def _features(self, learner: Learner) -> list[Tensor]:
        """The student's pooled features `(N, W)` of the training and the test images, in evaluation mode."""
        extractor = learner.student.extractor.eval()
        features = []
        for images in (self.train, self.test):
            with self._autocast():
                parts = [extractor.pooled(*self.normalise([part], seed=0)) for part in images.pixels.split(512)]
            features.append(torch.cat(parts).float())
        learner.student.train()
        return features

    def _neighbours(self, train: Tensor, test: Tensor) -> dict[str, float]:
        accuracy = cgh.evaluate.knn(train, self.train.labels, test, self.test.labels, k=NEIGHBOURS)
        return {f"{k} neighbours": top1 for k, (top1, _) in accuracy.items()}

    def _linear(self, train: Tensor, test: Tensor) -> float:
        """Accuracy of a linear layer on features that are scaled to mean 0 and deviation 1, without augmentation."""
        deviation, mean = torch.std_mean(train, dim=0)
        train, test = ((x - mean) / deviation.clamp(min=1e-6) for x in (train, test))
        batches = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            probe = cgh.evaluate.LinearProbe(nn.Identity(), train.shape[1], int(self.train.labels.max()) + 1)
        probe.to(self.device)
        steps = PROBE_EPOCHS * math.ceil(len(train) / 256)
        optimizer, schedule = cgh.evaluate.linear_recipe(probe, steps, learning_rate=0.1)
        for _ in range(PROBE_EPOCHS):
            for index in torch.randperm(len(train), generator=batches).to(self.device).split(256):
                loss = nn.functional.cross_entropy(probe(train[index]), self.train.labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            return cgh.evaluate.accuracy(probe(test), self.test.labels, k=[1])[0]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


def table(out: Path, results: Path, format: str = "png") -> None:
    """Write table.md and curves from the rows of `results`, a table and a picture for each budget; print the former.

    Raises:
        FileNotFoundError: no run is done.
    """
    rows = read_rows(results)
    if not rows:
        raise FileNotFoundError(f"{results} holds no rows; `run` writes them when a run is done.")
    text = ""
    for number, budget in enumerate(dict.fromkeys(tuple(row[column] for column in BUDGET) for row in rows)):
        runs: dict[str, dict[str, list[dict[str, str]]]] = {name: {} for name in (*BASELINES, *METHODS)}
        for row in rows:
            if tuple(row[column] for column in BUDGET) == budget:
                runs[row["method"]].setdefault(row["seed"], []).append(row)
        runs = {name: of_method for name, of_method in runs.items() if of_method}
        text += ", ".join(f"{c} {value}" for c, value in zip(BUDGET, budget, strict=True)) + "\n\n" + _tables(runs)
        _draw(runs, out / f"curves{number or ''}.{format}")
    write(out / "table.md", text)
    console.print(text, soft_wrap=True, highlight=False)


def _tables(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, str]]]]) -> str:
    """The methods' figures at the end of their runs, and what CGH has more than each, seed by seed."""
    titles = BASELINES | {name: method.title for name, method in METHODS.items()}
    columns = [*QUANTITIES, "best 200 neighbours", "linear"]

    def figures(evaluations: Sequence[Mapping[str, str]]) -> dict[str, float | None]:
        last = {column: float(value) if value else None for column, value in evaluations[-1].items() if column in known}
        return last | {"best 200 neighbours": max(float(row["200 neighbours"]) for row in evaluations)}

    known = {*columns, *COSTS}
    at_end = {name: {seed: figures(e) for seed, e in of_method.items()} for name, of_method in runs.items()}
    rows = [["method", "seeds", *columns, *COSTS]]
    for name, of_method in at_end.items():
        cells = [mean_and_spread([r.get(c) for r in of_method.values()], 1 if c in columns else 0) for c in rows[0][2:]]
        rows.append([titles[name], str(len(of_method)), *cells])
    text = markdown(rows) + "\n"
    across = at_end.get("across", {})
    rows = [["CGH less", "seeds", *columns]]
    for name in METHODS:
        seeds = [seed for seed in at_end.get(name, {}) if seed in across and name != "across"]
        if seeds:
            gains = [[_less(across[seed][c], at_end[name][seed][c]) for seed in seeds] for c in columns]
            rows.append([titles[name], str(len(seeds)), *(mean_and_spread(gain, 1, "+") for gain in gains)])
    return text + (markdown(rows) + "\n" if len(rows) > 1 else "")


def _less(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours - theirs


def _draw(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, str]]]], path: Path) -> None:
    """Draw the neighbours' accuracy by epoch, the mean over seeds, above lines for the baselines."""
    curves = {METHODS[name].title: mean_curves([*runs[name].values()], QUANTITIES) for name in METHODS if name in runs}
    if not curves:
        return
    figure = plot.curves(curves, size=(9, 4.2))
    for axes, quantity in zip(figure.axes, QUANTITIES, strict=True):
        axes.set_xlabel("epoch")
        for name in [baseline for baseline in BASELINES if baseline in runs]:
            level = statistics.mean(float(evaluations[-1][quantity]) for evaluations in runs[name].values())
            axes.axhline(level, color=plot.QUIET, linestyle=":")
            place = axes.get_yaxis_transform()
            axes.text(0.99, level, BASELINES[name], ha="right", va="bottom", color=plot.QUIET, transform=place)
    plot.save(figure, path)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _difference(settings: Settings) -> str:
    """What differs from the defaults, in words."""
    pairs = asdict(settings).items() - asdict(Settings()).items()
    return ", ".join(f"{key} {' '.join(x) if isinstance(x, tuple) else x}" for key, x in sorted(pairs)) or "default"


def _summary(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the epochs say of a run: the best accuracy, and what it cost."""
    return {
        "best 200 neighbours": max(row["200 neighbours"] for row in log if "200 neighbours" in row),
        "images/s": statistics.median(row["images/s"] for row in log),
        "peak memory, MiB": max(row["peak memory, MiB"] for row in log),
        "minutes": sum(row["minutes"] for row in log),
    }


def _candidates(config: Search, method: Method) -> list[list[dict[str, Any]]]:
    """What a search tries, a list for each setting; the first is the start."""
    names = ("student_global", "student_hypercolumn", "teacher_global", "teacher_hypercolumn")
    temperatures: list[dict[str, Any]] = [dict(zip(names, values, strict=True)) for values in config.temperature]
    if method.contexts == ("global",):
        temperatures = [{n: v for n, v in change.items() if n.endswith("global")} for change in temperatures]
    relations = [temperatures, [{"warmup": value} for value in config.warmup]] if method.pairs else []
    return [
        [{}],
        [{"learning_rate": value} for value in config.learning_rate],
        [{"infonce_temperature": value} for value in config.infonce_temperature],
        *relations,
        [{"momentum": value} for value in config.momentum],
        [{"memory_size": value} for value in config.memory_size],
    ]


def _order(images: Images) -> Tensor:
    """The order in which images are drawn, the same in every run."""
    return torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))


def _peak_memory(device: torch.device) -> float:
    """MiB: of the GPU's memory since the run began, or else of the process since it did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def _settings(chosen: Mapping[str, Any]) -> Settings:
    """Settings as JSON has them."""
    return Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()})


def _check_methods(names: Sequence[str], known: Sequence[str] | Mapping[str, Method]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"there is no method {name!r}; there are {', '.join(known)}.")


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration, or compare it with that of the run that is there, whose options may be fewer."""
    path = folder / "config.json"
    if not path.exists():
        write(path, json.dumps(config, indent=2))
    there = {f.name: f.default for f in fields(Budget)} | json.loads(path.read_text())
    for key, value in config.items():
        if there.get(key) != value:
            raise ValueError(
                f"{folder} was started with {key} {there.get(key)!r}, not {value!r}; go on with that, remove it, or "
                "give another --out."
            )


if __name__ == "__main__":
    from command import command  # beside the scripts of ImageNet, where images.py looks too

    command(lambda: main(tyro.cli(Run | Search | Factors | Table, description=__doc__.splitlines()[0])))
