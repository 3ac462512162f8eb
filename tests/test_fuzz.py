"""Broken files end in the errors that are documented, whatever reads them, and no file is changed by being read."""

from __future__ import annotations

import argparse
import functools
import io
import json
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import cgh
from cgh.interop import reference
from tests.fuzzing import VALUES, broken_bytes, broken_tree, feed

Record = Callable[[str, object], None]

TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.int64, torch.bool, torch.complex64]),
)
CONTENT = VALUES | TENSORS


@functools.cache
def model() -> cgh.CGH:
    layers = OrderedDict(layer4=nn.Conv2d(3, 8, 3), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    return cgh.CGH(nn.Sequential(layers), ["layer4"], dim=2, hidden_dim=2, memory_size=8, image_shape=(3, 16, 16))


@functools.cache
def optimizer() -> torch.optim.SGD:
    optimizer = torch.optim.SGD(reference.parameter_groups(model()), lr=0.1, momentum=0.9)
    output = model()(*torch.randn(2, 4, 3, 16, 16))
    output.loss.backward()
    optimizer.step()
    return optimizer


def small() -> dict[str, Any]:
    weights = {"conv1.weight": torch.ones(2, 3, 3, 3), "bn1.weight": torch.ones(2)}
    return {"arch": "resnet18", "config": {"crop_size": 32}, "epoch": 3, "net": weights, "log": [(1.5, None)]}


def others() -> dict[str, Any]:
    return {"score": np.float64(1), "rows": np.ones((2, 3)), "args": argparse.Namespace(root=Path("x"))}


def kept_features() -> dict[str, Any]:
    about = {"weights": "a.pt", "classes": ["a", "b"]}
    return {"features": torch.ones(2, 3), "labels": torch.tensor([0, 1]), "about": about}


@functools.cache
def of_the_reference() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        reference.save(f"{folder}/run.pt", model(), optimizer(), epoch=1, arch="tiny")
        return cgh.checkpoint.load(f"{folder}/run.pt")


def in_pytorch(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def in_safetensors(content: dict[str, Tensor]) -> bytes:
    return pytest.importorskip("safetensors.torch").save(content)


def trained_backbone(path: Path) -> object:
    return cgh.interop.trained_backbone(path, "shufflenet_v2_x0_5")


def load_backbone(path: Path) -> object:
    return cgh.interop.load_backbone(model(), path)


def resume(path: Path) -> object:
    return reference.resume(path, model(), optimizer(), steps_per_epoch=1)


BYTES: dict[str, tuple[Callable[[], bytes], str, Callable[[Path], object]]] = {
    "checkpoint": (lambda: in_pytorch(small()), "a.pt", cgh.checkpoint.load),
    "others' checkpoint": (lambda: in_pytorch(others()), "a.pt", cgh.checkpoint.load),
    "old format": (
        lambda: in_pytorch(small(), _use_new_zipfile_serialization=False),
        "a.pt",
        cgh.checkpoint.load,
    ),
    "features": (lambda: in_pytorch(kept_features()), "a.pt", cgh.evaluate.load_features),
    "safetensors": (lambda: in_safetensors(cgh.interop.backbone_state(model())), "a.safetensors", load_backbone),
}
TREES: dict[str, tuple[Callable[[], Any], Callable[[Path], object], int]] = {
    "backbone": (lambda: cgh.interop.backbone_state(model()), load_backbone, 500),
    "features": (kept_features, cgh.evaluate.load_features, 500),
    "trained backbone": (small, trained_backbone, 100),
    "reference": (of_the_reference, resume, 300),
}


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_bytes(name: str, tmp_path: Path, record_property: Record) -> None:
    whole, file, read = BYTES[name]
    path = tmp_path / file
    feed(broken_bytes(whole()), path.write_bytes, lambda: read(path), tmp_path, record_property)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_entries_of_another_kind(name: str, tmp_path: Path, record_property: Record) -> None:
    whole, read, count = TREES[name]
    path = tmp_path / "a.pt"
    inputs = broken_tree(whole(), VALUES | TENSORS)
    feed(inputs, lambda x: torch.save(x, path), lambda: read(path), tmp_path, record_property, count)


def test_a_folder_that_says_something_else(tmp_path: Path, record_property: Record) -> None:
    student = cgh.HypercolumnExtractor(cgh.interop.build_backbone("shufflenet_v2_x0_5"), ["conv5"])
    encoder = cgh.ContextEncoder(student, dim=2, hidden_dim=2)
    cgh.interop.save_pretrained(encoder, tmp_path, "shufflenet_v2_x0_5", heads=True)
    file = tmp_path / "config.json"
    feed(
        broken_tree(json.loads(file.read_text())).map(lambda x: json.dumps(x).encode())
        | broken_bytes(file.read_bytes()),
        file.write_bytes,
        lambda: cgh.interop.from_pretrained(tmp_path, heads=True),
        tmp_path,
        record_property,
        count=100,
    )
