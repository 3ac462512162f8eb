"""Draw what the quickstart's network learned: relations by digit, and hypercolumns as colours.

pip install "cgh-ssl[examples]"
python examples/quickstart.py
python examples/gallery.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import quickstart
import torch
import tyro

import cgh
from cgh import plot


@dataclass
class Config:
    """Draw what the quickstart's network learned."""

    checkpoint: Path = Path("runs/quickstart/checkpoint.pt")
    """Of a quickstart of the same seed."""
    out: Path = Path("runs/gallery")
    """Where the pictures go."""
    format: Literal["png", "svg", "pdf"] = "png"
    """Of the pictures."""


@torch.no_grad()
def main(config: Config) -> None:
    """Draw relations and hypercolumns before and after training."""
    if not config.checkpoint.exists():
        sys.exit(f"{config.checkpoint} is not there; examples/quickstart.py writes it.")
    images, labels = quickstart.digits()
    model = quickstart.method(quickstart.Config())
    train, test = slice(0, 300), slice(quickstart.TRAIN, quickstart.TRAIN + 100)
    relation = cgh.RelationMatrix(0.08)
    relations, maps = {}, {}
    for state in ("before", "after"):
        if state == "after":
            model.load_state_dict(cgh.checkpoint.load(config.checkpoint))
        model.eval()
        z, bank = model.student(images[test]), model.student(images[train])
        relations |= {f"{name}, {state} training": relation(z[name], bank[name]) for name in z}
        shallow = cgh.HypercolumnExtractor(model.student.extractor.backbone, ["layer1", "layer2"])
        maps[f"{state} training"] = shallow(images[test][:10]).hypercolumn
    figure = plot.relation_matrix(relations, labels[test], labels[train], size=(11, 3.3))
    plot.save(figure, config.out / f"relations.{config.format}")
    plot.save(plot.hypercolumns(images[test][:10], maps), config.out / f"hypercolumns.{config.format}")
    print(f"the pictures relations and hypercolumns are in {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:
        sys.exit("stopped")
