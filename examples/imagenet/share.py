"""Write a trained backbone as a folder that timm and transformers load, with its model card, and upload it.

python examples/imagenet/share.py --weights runs/imagenet/checkpoint.pt --folder runs/imagenet/shared \
    --results runs/imagenet/knn/results.json runs/imagenet/linear/results.json
python examples/imagenet/share.py --weights runs/imagenet/checkpoint.pt --folder runs/imagenet/shared --push user/name
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import command, read_arguments

import cgh


@dataclass(kw_only=True)
class Config:
    """Write a trained backbone as a folder that timm and transformers load."""

    weights: Path
    """A checkpoint of pretrain.py."""
    folder: Path
    """The folder to write."""
    results: tuple[Path, ...] = ()
    """Files of evaluations, results.json, for the model card."""
    push: str | None = None
    """USER/NAME of a repository of the Hugging Face hub to upload to, as who is logged in there."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    config = read_arguments(Config, args)
    run: dict[str, Any] = cgh.checkpoint.load(config.weights).get("config", {})
    if "arch" not in run:
        raise ValueError(f"{config.weights} does not say what it was trained with; name a checkpoint of pretrain.py.")
    figures = {path.parent.name: json.loads(path.read_text()) for path in config.results}
    backbone = cgh.interop.trained_backbone(config.weights)
    cgh.interop.save_pretrained(backbone, config.folder, run["arch"], run["crop_size"], config=run, figures=figures)
    print(cgh.interop.push_to_hub(config.folder, config.push) if config.push else config.folder)


if __name__ == "__main__":
    command(main)
