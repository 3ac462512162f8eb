"""Cut, swapped and random bytes end in the errors that are documented, and no file is changed by being read."""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import cgh
from tests.conftest import small_backbone

INPUTS = 1000  # of each kind


def written(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def broken(data: bytes, draw: random.Random) -> bytes:
    """The bytes cut, with some swapped or replaced, or others altogether."""
    kind = draw.randrange(4)
    if kind == 0:
        return data[: draw.randrange(len(data))]
    if kind == 1:
        return draw.randbytes(draw.randrange(200))
    changed = bytearray(data)
    for _ in range(draw.choice([1, 3, 20])):
        at = draw.randrange(len(changed))
        if kind == 2:
            changed[at] = draw.randrange(256)
        else:
            other = draw.randrange(len(changed))
            changed[at], changed[other] = changed[other], changed[at]
    return bytes(changed)


def small() -> dict[str, torch.Tensor]:
    return {"conv1.weight": torch.ones(2, 2), "bn1.weight": torch.ones(2)}


CASES: dict[str, tuple[str, bytes, Callable[[Path], object]]] = {
    "checkpoint": ("a.pt", written({"model": small(), "epoch": 3, "log": [(1.5, None)]}), cgh.checkpoint.load),
    "foreign checkpoint": (
        "a.pt",
        written({"score": np.float64(1), "rows": np.ones((2, 3)), "args": argparse.Namespace(root=Path("x"))}),
        cgh.checkpoint.load,
    ),
    "old format": ("a.pt", b"", cgh.checkpoint.load),
    "safetensors": ("a.safetensors", b"", lambda path: cgh.interop.load_backbone(small_backbone_once(), path)),
    "features": (
        "a.pt",
        written({"features": torch.ones(2, 3), "labels": torch.ones(2), "about": {}}),
        cgh.evaluate.load_features,
    ),
    "trained backbone": (
        "a.pth",
        written({"state_dict": small()}),
        lambda path: cgh.interop.trained_backbone(path, "resnet18"),
    ),
}
BACKBONE: list[torch.nn.Module] = []


def small_backbone_once() -> torch.nn.Module:
    if not BACKBONE:
        BACKBONE.append(small_backbone())
    return BACKBONE[0]


def content(name: str) -> bytes:
    if name == "old format":
        file = io.BytesIO()
        torch.save({"model": small(), "epoch": 3}, file, _use_new_zipfile_serialization=False)
        return file.getvalue()
    if name == "safetensors":
        return pytest.importorskip("safetensors.torch").save(small())
    return CASES[name][1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_files_end_in_the_documented_errors(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    file, _, read = CASES[name]
    whole, path, draw = content(name), tmp_path / file, random.Random(0)
    count = INPUTS if name != "trained backbone" else 20  # each of these builds a network
    refused = 0
    for _ in range(count):
        data = broken(whole, draw)
        path.write_bytes(data)
        try:
            read(path)
        except ValueError:
            refused += 1
        assert path.read_bytes() == data
    record_property("inputs", count)
    assert refused > count / 2
    assert [found.name for found in tmp_path.iterdir()] == [file]
