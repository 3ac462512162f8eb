"""Draw the curves of pre-training runs over one another.

python examples/imagenet/plot.py runs/first runs/second --out curves.png

Of one run alone there is a second picture beside it, curves-groups.png: losses, entropies with the line of log K,
ranks, speed and the like, each group in one panel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from command import command, read_arguments
from log import read

from cgh.plot import curves, groups, save

HIDDEN = ("epoch", "time/memory_gib")
GROUPS = ("loss", "entropy", "rank", "agreement", "knn", "time/images_per_second")


@dataclass
class Config:
    """Draw the curves of pre-training runs over one another."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Their folders."""
    out: Path = Path("curves.png")
    """The picture; its name ends in its format, such as .png or .pdf."""


def draw(folders: Sequence[Path], out: Path) -> None:
    """Write a picture of all figures of the runs in `folders`, each a panel, and of a single run one of its groups."""
    runs = {}
    for folder in folders:
        figures = read(folder)
        runs[str(folder)] = {name: figure for name, figure in figures.items() if name not in HIDDEN}
    rows = max(len(steps) for run in runs.values() for steps, _ in run.values())
    window = max(1, rows // 50)
    save(curves(runs, window), out)
    if len(folders) == 1:
        (run,) = runs.values()
        members = {group: [name for name in run if name == group or name.split("/")[0] == group] for group in GROUPS}
        members = {group: names for group, names in members.items() if names}
        config = folders[0] / "config.json"
        size = json.loads(config.read_text(encoding="utf-8")).get("memory_size") if config.exists() else None
        levels = {"entropy": {"log K": math.log(size)}} if size and "entropy" in members else {}
        if members:
            save(groups(run, members, levels, window), out.with_name(f"{out.stem}-groups{out.suffix}"))


def main() -> None:
    """Run the command line."""
    config = read_arguments(Config)
    if not config.runs:
        raise ValueError("no run is named: plot.py FOLDER [FOLDER ...] draws the runs that pretrain.py keeps in them.")
    draw(config.runs, config.out)
    print(config.out)


if __name__ == "__main__":
    command(main)
