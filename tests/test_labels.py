"""A class is the same class in every integer type, and nothing else is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cgh.labels import integer_labels, integers

INTEGERS = [
    getattr(torch, name)
    for name in ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
    if hasattr(torch, name)
]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_integer_type_gives_the_same_classes(dtype: torch.dtype) -> None:
    expected = torch.tensor([2, 0, 1, 100])
    for labels in (expected.to(dtype), expected.to(dtype).numpy(), list(expected.to(dtype).numpy())):
        found = integer_labels(labels)
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("error")
def test_arrays_of_every_layout_give_the_same_classes() -> None:
    expected = np.array([2, 0, 1, 100])
    read_only = expected.copy()
    read_only.flags.writeable = False
    for array in (
        expected[::-1].copy()[::-1],
        np.repeat(expected, 2)[::2],
        expected.astype(">i4"),
        expected.astype(">u8"),
        expected.astype(object),
        read_only,
    ):
        assert integer_labels(array).tolist() == [2, 0, 1, 100]
    assert integer_labels([np.bool_(True), np.int8(3), torch.tensor(4)]).tolist() == [1, 3, 4]
    assert integer_labels(np.array(3, dtype=">i2")).tolist() == 3


def test_booleans_are_two_classes_and_nothing_is_none() -> None:
    assert torch.equal(integer_labels(torch.tensor([True, False])), torch.tensor([1, 0]))
    assert torch.equal(integer_labels(np.array([True, False])), torch.tensor([1, 0]))
    for empty in ([], torch.empty(0, dtype=torch.uint8), np.array([], dtype=np.int16)):
        assert integer_labels(empty).shape == (0,)
        assert integer_labels(empty).dtype == torch.int64


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (torch.tensor([0.0, 1.0]), "float32"),
        (torch.tensor([float("nan")]), "float32"),
        (np.array([0.0, np.nan]), "float64"),
        ([0.0, 1.0], "a list of float"),
        (torch.tensor([1j]), "complex64"),
        (["cat", "dog"], "a list of str"),
        (("cat", 1), "a tuple of int, str"),
        (np.array(["cat"]), "a ndarray"),
        (np.array(["cat"], dtype=object), "a ndarray"),
        ([np.float64(1.0)], "a list of float64"),
        ([torch.tensor([1, 2])], "a list of Tensor"),
        ([None, 1], "a list of NoneType, int"),
        ({"a": 1}, "a dict"),
        ("cat", "a str"),
    ],
)
def test_what_is_no_integer_is_refused(labels: Any, found: str) -> None:
    with pytest.raises(TypeError, match=rf"truth are .*{found}.*; classes are integers"):
        integer_labels(labels, "truth")


def test_numbers_beyond_int64_are_refused() -> None:
    with pytest.raises(ValueError, match="above 9223372036854775807"):
        integer_labels(torch.from_numpy(np.array([2**63], dtype=np.uint64)))


@pytest.mark.parametrize(
    "values", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3]), np.array([3]), [3], (np.int16(3),)]
)
def test_counts_of_every_integer_type(values: Any) -> None:
    assert integers(values, "k") == [3]


@pytest.mark.parametrize("values", [2.0, "12", [1, 2.5], torch.tensor([1.0]), np.float64(1), None])
def test_counts_that_are_no_integers(values: Any) -> None:
    with pytest.raises(TypeError, match="k is .*; it is an integer, or several"):
        integers(values, "k")
