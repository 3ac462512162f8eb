"""A checkpoint is written whole or not at all, and read as data."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import functools
import os
import pathlib
import pickle
import resource
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

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
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cut short: it ends too early"):
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


class Colour(enum.IntEnum):
    RED = 1


class Point(NamedTuple):
    x: int


@dataclasses.dataclass
class Config:
    rate: float = 0.1


@pytest.mark.parametrize(
    ("value", "kind", "remedy"),
    [
        (np.float64(0.5), "numpy.float64", "value.tolist(), 0.5,"),
        (np.mean(np.ones(2)), "numpy.float64", "value.tolist(), 1.0,"),
        (np.int64(3), "numpy.int64", "value.tolist(), 3,"),
        (np.str_("a"), "numpy.str_", "value.tolist(), 'a',"),
        (np.ones(2), "numpy.ndarray", "torch.from_numpy(value)"),
        (np.array(["a"]), "numpy.ndarray", "value.tolist(), ['a'],"),
        (pathlib.Path("data"), f"pathlib.*{type(Path()).__name__}", "str(path), 'data',"),
        (argparse.Namespace(lr=0.1), "argparse.Namespace", "a dictionary .* vars(value),"),
        (Config(), ".*Config", "a dictionary .* vars(value),"),
        (Colour.RED, ".*Colour", "its name, 'RED',"),
        (Point(1), ".*Point", "value._asdict()"),
        (collections.defaultdict(list), "collections.defaultdict", "dict(value)"),
        (frozenset({1}), "frozenset", "tensors, numbers, strings, or .*"),
        (torch.__version__, "torch.*TorchVersion", "str(value)"),
        (tv_tensors.Mask(torch.ones(2)), "torchvision.*Mask", "value.as_subclass(torch.Tensor)"),
        (len, "builtin_function_or_method", "tensors, numbers, strings, or .*"),
    ],
    ids=str,
)
def test_what_load_would_refuse_is_not_written(value: Any, kind: str, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    checkpoint.save({"epoch": 1}, path)
    for nested, key in (({"best": value}, "best"), ({"a": {"b": [0, (value,)]}}, r"a\.b\[1\]\[0\]")):
        remedy_there = remedy.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[").replace("]", r"\]")
        with pytest.raises(
            TypeError, match=rf"^{key} is a {kind}, which .* refuse.*; write {remedy_there} in its place"
        ):
            checkpoint.save(nested, path)
        assert checkpoint.load(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_odd_keys_attributes_and_circles_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a key of scores is a numpy.int64"):
        checkpoint.save({"scores": {np.int64(1): 2}}, tmp_path / "run.pt")
    tensor = torch.ones(2)
    tensor.origin = Path("x")
    with pytest.raises(TypeError, match=r"weight.origin is a pathlib"):
        checkpoint.save({"weight": tensor}, tmp_path / "run.pt")
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(TypeError, match=r"loop\[0\] holds itself"):
        checkpoint.save({"loop": circle}, tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary()
    | st.sampled_from([torch.float16, torch.device("cpu"), torch.Size([2, 3])])
)
values = st.recursive(
    leaves,
    lambda x: (
        st.lists(x)
        | st.tuples(x, x)
        | st.dictionaries(st.text() | st.integers(), x)
        | st.dictionaries(st.text(), x).map(collections.OrderedDict)
        | st.sets(st.integers()).map(collections.Counter)
        | st.frozensets(leaves).map(set)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), values))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pt"
    checkpoint.save(state, path)
    loaded = checkpoint.load(path)
    assert loaded == state
    assert repr(loaded) == repr(state) or "{" in repr(state)  # the same types; sets have no order


def test_states_of_models_optimisers_and_schedules_are_read_back(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    checkpoint.save(state, tmp_path / "run.pt")
    loaded = checkpoint.load(tmp_path / "run.pt")
    torch.testing.assert_close(loaded, state, rtol=0, atol=0)
    assert loaded["model"]._metadata == state["model"]._metadata
    schedule.load_state_dict(loaded["schedule"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(60.5), 60.5),
        (np.float32(0.5), 0.5),
        (np.float64(2).astype(">f8"), 2.0),
        (np.int64(-3), -3),
        (np.bool_(True), True),
        (np.str_("top"), "top"),
        (argparse.Namespace(lr=0.1, root=Path("a/b")), argparse.Namespace(lr=0.1, root=pathlib.PurePosixPath("a/b"))),
        (types.SimpleNamespace(lr=0.1), types.SimpleNamespace(lr=0.1)),
        (pathlib.PureWindowsPath("c:/x"), pathlib.PureWindowsPath("c:/x")),
        (torch.__version__, str(torch.__version__)),
    ],
    ids=str,
)
def test_harmless_classes_of_others_are_read_as_data(value: Any, expected: Any, tmp_path: Path) -> None:
    torch.save({"best": value, "all": [(value,)]}, tmp_path / "run.pt")
    loaded = checkpoint.load(tmp_path / "run.pt")
    assert loaded == {"best": expected, "all": [(expected,)]}
    assert type(loaded["best"]) is type(expected)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (0, 3), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i2", "u2", ">i4", "i8", "f2", "f4", ">f8"])
def test_arrays_of_others_are_tensors(dtype: str, shape: tuple[int, ...], order: str, tmp_path: Path) -> None:
    array = np.asarray(np.arange(np.prod(shape)).reshape(shape), dtype=dtype, order=order)
    torch.save({"rows": {"features": array}}, tmp_path / "run.pt")
    loaded = checkpoint.load(tmp_path / "run.pt")["rows"]["features"]
    expected = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    assert loaded.dtype == expected.dtype
    assert torch.equal(loaded, expected)


def test_the_users_own_list_of_classes_stays(tmp_path: Path) -> None:
    torch.save({"x": np.float64(1)}, tmp_path / "run.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = {*torch.serialization.get_safe_globals()}
        checkpoint.load(tmp_path / "run.pt")
        assert {*torch.serialization.get_safe_globals()} == before


def test_a_refusal_names_the_classes_and_never_advises_to_run_them(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    torch.save({"model": {"weight": torch.ones(2)}, "config": Config(), "call": len}, path)
    with pytest.raises(ValueError, match="not a checkpoint of plain data") as error:
        checkpoint.load(path)
    assert f"it names builtins.len, {__name__}.Config, which" in str(error.value)
    assert "torch.save(model.state_dict(), path)" in str(error.value)
    assert "weights_only" not in str(error.value)
    path.write_bytes(pickle.dumps({"state": Payload()}, protocol=2))
    with pytest.raises(ValueError, match="not a checkpoint of plain data") as error:
        checkpoint.load(path)
    assert "weights_only" not in str(error.value)


def test_tensors_without_values_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    checkpoint.save({"epoch": 1}, path)
    with torch.device("meta"):
        state = torch.nn.Linear(2, 2).state_dict()
    writer = checkpoint.Writer(lambda state: checkpoint.save(state, path))
    for save in (lambda state: checkpoint.save(state, path), writer.save):
        with pytest.raises(TypeError, match=r"model\.weight is on meta, where tensors have no values"):
            save({"model": state})
    writer.wait()
    assert checkpoint.load(path) == {"epoch": 1}


def test_a_writer_copies_counters_and_sets(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6])
    x = torch.ones(2)
    writer = checkpoint.Writer(functools.partial(checkpoint.save, path=tmp_path / "run.pt"))
    writer.save({"schedule": schedule.state_dict(), "set": {x}})
    x.zero_()
    writer.wait()
    state = checkpoint.load(tmp_path / "run.pt")
    assert state["schedule"]["milestones"] == {3: 1, 6: 1}
    assert [value.tolist() for value in state["set"]] == [[1.0, 1.0]]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    checkpoint.save({"step": 1}, tmp_path / "one.pt")
    (tmp_path / "last.pt").symlink_to("one.pt")
    checkpoint.save({"step": 2}, tmp_path / "last.pt")
    assert (tmp_path / "last.pt").is_symlink()
    assert checkpoint.load(tmp_path / "one.pt") == {"step": 2}
