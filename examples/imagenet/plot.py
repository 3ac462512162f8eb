"""Draw the curves of pre-training runs over one another.

python examples/imagenet/plot.py runs/first runs/second --out curves.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from command import command, read_arguments
from log import read

from cgh.plot import curves

HIDDEN = ("epoch", "time/memory_gib")


@dataclass
class Config:
    """Draw the curves of pre-training runs over one another."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Their folders."""
    out: Path = Path("curves.png")


def draw(folders: Sequence[Path], out: Path) -> None:
    """Write a picture of all figures of the runs in `folders`, each a panel."""
    runs = {}
    for folder in folders:
        figures = read(folder)
        runs[str(folder)] = {name: figure for name, figure in figures.items() if name not in HIDDEN}
    rows = max(len(steps) for run in runs.values() for steps, _ in run.values())
    curves(runs, window=max(1, rows // 50)).savefig(out)


def main() -> None:
    """Run the command line."""
    config = read_arguments(Config)
    if not config.runs:
        raise ValueError("no run is named: plot.py FOLDER [FOLDER ...] draws the runs that pretrain.py keeps in them.")
    draw(config.runs, config.out)
    print(config.out)


if __name__ == "__main__":
    command(main)
