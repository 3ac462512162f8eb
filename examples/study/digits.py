"""Which part of the quickstart's gain is relations, which is two contexts, which is learning across?

python examples/study/digits.py run        # every method with every seed, on the CPU; then the table and the pictures
python examples/study/digits.py table      # both again, from the rows that are there
python examples/study/digits.py factors    # one setting changed at a time, judged by training images held out

The quickstart's digits, network, views, optimiser and settings; the methods of the study. A finished run is a row of
docs/results/digits.csv, and is not repeated; what it knew on the way is in digits-curves.csv.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
import tyro
from factors import FACTORS, factors_table, measure
from methods import METHODS, TARGETS, Learner, Settings
from results import add_rows, commit, markdown, mean_and_spread, mean_curves, read_rows
from rich.console import Console
from rich.progress import track
from torch import Tensor

import cgh
from cgh import diagnostics, plot
from cgh.modes import evaluating

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from quickstart import BATCH, TRAIN, accuracies, digits, network, strong_view, weak_view  # noqa: E402

SETTINGS = Settings(momentum=0.98, memory_size=2048, warmup=0.25, hidden=256)  # the quickstart's
QUANTITIES = ("20 neighbours", "five labels a class")
HELD_OUT = 300  # training images that judge `factors`, which never opens the test images
RESULTS = HERE.parents[1] / "docs" / "results"
console = Console()

Row: TypeAlias = Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """Train and evaluate what has no row yet."""

    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 80
    every: int = 10
    """Epochs from one evaluation to the next."""
    settings: Settings = field(default_factory=lambda: SETTINGS)
    """The quickstart's, for all methods; runs with others need a file of results of their own."""
    results: Path = RESULTS / "digits.csv"
    """Gets a row for each run; a file beside it, whose name ends in "-curves", one for each evaluation."""
    pictures: Path = HERE.parents[1] / "docs" / "images"
    """Folder of digits-methods.svg and digits-curves.svg."""


@dataclass(frozen=True)
class Factors:
    """Change one setting at a time, judged by training images that are not trained on."""

    method: str = "across"
    noise_seeds: int = 5
    """Runs of the quickstart's settings, which tell the noise."""
    seeds: int = 2
    """Runs of each change."""
    factors: tuple[str, ...] = tuple(FACTORS)
    """Names of what to change."""
    epochs: int = 80
    results: Path = RESULTS / "digits-factors.csv"
    """Gets a row for each run."""


@dataclass(frozen=True)
class Table:
    """Print the table and draw the pictures."""

    results: Path = Run.results
    pictures: Path = Run.pictures


def main(command: Run | Factors | Table) -> None:
    """Do what the command line says."""
    if isinstance(command, Factors):
        factors(command)
        return
    if isinstance(command, Run):
        commit()  # that which runs, whatever is committed until the last row
        done = {(row["method"], row["seed"], row["epochs"]) for row in read_rows(command.results)}
        for seed in command.seeds:
            for name in command.methods:
                if (name, str(seed), str(command.epochs)) not in done:
                    run = {"method": name, "seed": seed, "epochs": command.epochs}
                    figures, evaluations = train(name, seed, command.epochs, command.settings, every=command.every)
                    add_rows(command.results, [run | figures])
                    add_rows(beside(command.results), [run | evaluation for evaluation in evaluations])
                    console.print(run | figures)
    runs = {
        name: {s: rows[-1] for s, rows in seeds.items()}
        for name, seeds in by_method(read_rows(command.results)).items()
    }
    if not runs:
        sys.exit("there are no runs yet; `run` makes them.")
    table(runs)
    draw(runs, command.pictures / "digits-methods.svg")
    draw_curves(by_method(read_rows(beside(command.results))), command.pictures / "digits-curves.svg")


def factors(command: Factors) -> None:
    """Judge one change at a time by training images that no run trains on."""

    def judge(settings: Settings, _: str, seed: int) -> dict[str, Any]:
        figures, _ = train(command.method, seed, command.epochs, settings, held_out=HELD_OUT)
        return {"epochs": command.epochs, **figures}

    measure(command.results, command.method, SETTINGS, command.noise_seeds, command.seeds, judge, command.factors)
    print(factors_table(read_rows(command.results), *QUANTITIES[::-1]))


def train(
    name: str, seed: int, epochs: int, settings: Settings = SETTINGS, held_out: int = 0, every: int = 0
) -> tuple[dict[str, float | None], list[dict[str, float]]]:
    """Return how good the embeddings are that a method learns, and what its teacher's relations are like.

    Besides, how good they were after each `every` epochs and at the end.
    """
    images, labels = digits()
    if held_out:
        images, labels = images[:TRAIN], labels[:TRAIN]
    count = TRAIN - held_out
    torch.manual_seed(seed)
    steps = epochs * (count // BATCH)
    backbone = network()
    learner = Learner(METHODS[name], settings, steps, backbone, (1, 32, 32), dim=64, seed=seed)
    schedule = cgh.LearningRate(base=3e-3, steps=steps, warmup_steps=steps // 20)
    optimizer = torch.optim.AdamW(learner.student.parameters(), weight_decay=1e-4)
    torch.manual_seed(seed)  # every method sees the same views
    start, step, evaluations = time.monotonic(), 0, list[dict[str, float]]()
    for epoch in track(range(1, epochs + 1), f"{name}-{seed}", console=console, disable=not console.is_terminal):
        for batch in torch.randperm(count).split(BATCH)[: count // BATCH]:
            optimizer.param_groups[0]["lr"] = schedule(step)
            loss, teacher = learner(strong_view(images[batch]), weak_view(images[batch]), learner.weights(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            learner.update(teacher)
            step += 1
        if every and (epoch % every == 0 or epoch == epochs):
            _, z = embed(learner, images)
            evaluations.append({"epoch": epoch} | dict(zip(QUANTITIES, accuracies(z, labels, count), strict=True)))
    seconds = time.monotonic() - start
    targets = learner.targets(images[:count])
    features, z = embed(learner, images)
    figures: dict[str, float | None] = dict(zip(QUANTITIES, accuracies(z, labels, count), strict=True))
    pooled = {f"{q}, pooled": x for q, x in zip(QUANTITIES, accuracies(features, labels, count), strict=True)}
    rank = diagnostics.effective_rank(features[:count]).item()
    figures |= pooled | {name: targets.get(name) for name in TARGETS} | {"rank": rank}
    return figures | {"images/s": steps * BATCH / seconds}, evaluations


@torch.no_grad()
def embed(learner: Learner, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the student's pooled features of `images` and its global embeddings."""
    with evaluating(learner.student):
        features = learner.student.extractor(images)
        return features.pooled, learner.student.project(features, contexts=["global"])["global"]


def beside(results: Path) -> Path:
    """Return the file of the evaluations on the way."""
    return results.with_stem(f"{results.stem}-curves")


def by_method(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Return the rows of each seed of each method, of the longest runs alone."""
    longest = max((int(row["epochs"]) for row in rows), default=0)
    runs: dict[str, dict[str, list[Row]]] = {name: {} for name in METHODS}
    for row in rows:
        if int(row["epochs"]) == longest:
            runs[row["method"]].setdefault(row["seed"], []).append(row)
    return {name: of_method for name, of_method in runs.items() if of_method}


def table(runs: Mapping[str, Mapping[str, Row]]) -> None:
    """Print means and spreads over the seeds, and what CGH has more than each, seed by seed."""
    columns = (*QUANTITIES, *(f"{q}, pooled" for q in QUANTITIES), *TARGETS, "rank")
    cells = [["method", "seeds", *columns]]
    for name, of_method in runs.items():
        values = [[float(r[c]) for r in of_method.values() if r.get(c)] for c in columns]
        spreads = [mean_and_spread(v, 2 if c == "agreement" else 1) for c, v in zip(columns, values, strict=True)]
        cells.append([METHODS[name].title, str(len(of_method)), *spreads])
    print(markdown(cells))
    across = runs.get("across", {})
    cells = [["CGH less", "seeds", *QUANTITIES]]
    for name, of_method in runs.items():
        seeds = [seed for seed in of_method if seed in across and name != "across"]
        if seeds:
            gains = [[float(across[s][c]) - float(of_method[s][c]) for s in seeds] for c in QUANTITIES]
            cells.append([METHODS[name].title, str(len(seeds)), *(mean_and_spread(gain, 1, "+") for gain in gains)])
    print(markdown(cells))


def draw(runs: Mapping[str, Mapping[str, Row]], picture: Path) -> None:
    """Draw every run as a dot and every method's mean as a line, one panel a quantity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.45 * len(runs) + 1.2), layout="constrained")
    panels: Any = figure.subplots(1, len(QUANTITIES), sharey=True)
    for axes, quantity in zip(panels, QUANTITIES, strict=True):
        for place, of_method in enumerate(runs.values()):
            values = [float(row[quantity]) for row in of_method.values()]
            axes.plot(values, [place] * len(values), "o", alpha=0.5, color=plot.COLOURS[0], markersize=5)
            axes.plot([sum(values) / len(values)] * 2, [place - 0.3, place + 0.3], color=plot.COLOURS[1], linewidth=2)
        axes.set_xlabel(f"{quantity}, %")
        axes.grid(axis="x", color=plot.FAINT)
    panels[0].set_yticks(range(len(runs)), [METHODS[name].title for name in runs])
    panels[0].invert_yaxis()
    plot.save(figure, picture)


def draw_curves(runs: Mapping[str, Mapping[str, Sequence[Row]]], picture: Path) -> None:
    """Draw how good every method's embeddings were on the way, the mean over its seeds."""
    curves = {METHODS[name].title: mean_curves([*seeds.values()], QUANTITIES) for name, seeds in runs.items()}
    if not curves:
        return
    figure = plot.curves(curves, size=(9, 4.2))
    for axes in figure.axes:
        axes.set_xlabel("epoch")
    plot.save(figure, picture)


if __name__ == "__main__":
    main(tyro.cli(Run | Factors | Table, description=(__doc__ or "").splitlines()[0]))
