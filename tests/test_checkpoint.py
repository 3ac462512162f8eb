"""A checkpoint is written whole or not at all, and read as data."""

from __future__ import annotations

import functools
import os
import pickle
import resource
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cgh import checkpoint


def test_round_trip(tmp_path: Path) -> None:
    state = {"weight": torch.randn(3), "epoch": 2, "nested": {"lr": [0.1, None]}}
    checkpoint.save(state, tmp_path / "new" / "run.pt")
    loaded = checkpoint.load(tmp_path / "new" / "run.pt")
    torch.testing.assert_close(loaded, state, rtol=0, atol=0)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    checkpoint.save({"epoch": 1}, path)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"epoch": 2}, path)
    assert checkpoint.load(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    checkpoint.save({"epoch": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="run.pt is not written, and what was there is untouched; is the disk full"):
            checkpoint.save({"weights": [torch.zeros(10_000) for _ in range(10)]}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.load(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch pwned",)


def test_what_is_not_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.pt"
    for content in (pickle.dumps({"state": Payload()}), b"", b"\x80\x02 not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="run.pt is not a checkpoint of plain data, or is cut short"):
            checkpoint.load(path)
    torch.save({"state": Payload()}, path)
    with pytest.raises(ValueError, match="not a checkpoint of plain data"):
        checkpoint.load(path)
    assert not (tmp_path / "pwned").exists()

    checkpoint.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cut short"):
        checkpoint.load(path)
    torch.save(torch.zeros(2), path)
    with pytest.raises(ValueError, match="holds a Tensor; a checkpoint is a dictionary"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "missing.pt")


def test_a_state_is_written_as_it_was_while_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    model = torch.nn.BatchNorm2d(4).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 4, 3, 3)).square().sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": [{"loss": (1.5, None)}]}
    checkpoint.save(state, path)
    expected = checkpoint.load(path)

    started, go = threading.Event(), threading.Event()

    def write(copied: Mapping[str, Any]) -> None:
        started.set()
        go.wait()
        checkpoint.save(copied, tmp_path / "behind.pt")

    writer = checkpoint.Writer(write)
    writer.save(state)
    started.wait()
    optimizer.step()
    state["log"][0]["loss"] = None
    go.set()
    writer.wait()
    found = checkpoint.load(tmp_path / "behind.pt")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found["model"]._metadata == expected["model"]._metadata
    assert not torch.equal(found["model"]["weight"], model.weight)


def test_what_went_wrong_while_writing_is_raised_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    writer = checkpoint.Writer(functools.partial(checkpoint.save, path=tmp_path / "file" / "run.pt"))
    for again in (lambda: writer.save({"epoch": 2}), writer.wait):
        writer.save({"epoch": 1})
        with pytest.raises(OSError, match="file"):
            again()
    writer.wait()  # and once
