"""What others keep beside their tensors, read as plain data: nothing of it is imported, and none of its code runs.

A pickle names classes and functions. Those below are harmless where stand-ins take their places: NumPy's numbers become
Python's and its arrays tensors (NumPy's own functions trust what a file says of memory), paths become pure paths, which
any system can hold, and the settings of a command line stay a namespace.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import struct
import types
from collections.abc import Callable
from typing import Any

import torch

# NumPy's types by kind and size, with the letter of Python's struct and torch's type.
_TYPES = {
    "b1": ("?", torch.bool),
    "i1": ("b", torch.int8),
    "i2": ("h", torch.int16),
    "i4": ("i", torch.int32),
    "i8": ("q", torch.int64),
    "u1": ("B", torch.uint8),
    "u2": ("H", torch.uint16),
    "u4": ("I", torch.uint32),
    "u8": ("Q", torch.uint64),
    "f2": ("e", torch.float16),
    "f4": ("f", torch.float32),
    "f8": ("d", torch.float64),
}


class Type:
    """Stands for `numpy.dtype`."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def unpack(self, data: bytes) -> tuple[Any, ...]:
        """Return the numbers or the string that the bytes hold."""
        if self.code[:1] == "U":
            return (data.decode("utf-32-be" if self.order == ">" else "utf-32-le").rstrip("\0"),)
        if self.code not in _TYPES:
            raise ValueError(f"NumPy's type {self.code!r} is not read as data")
        letter, dtype = _TYPES[self.code]
        return struct.unpack(f"{self.order}{len(data) // dtype.itemsize}{letter}", data)


class Array:
    """Stands for `numpy.ndarray`, empty until its state is set."""

    tensor = torch.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        if kind.code not in _TYPES or any(side < 0 for side in shape):
            raise ValueError(f"an array of NumPy's type {kind.code!r} and shape {shape} is not read as data")
        values = torch.tensor(kind.unpack(data), dtype=_TYPES[kind.code][1])
        if math.prod(shape) != len(values):
            raise ValueError(f"an array of shape {shape} does not hold {len(values)} numbers")
        self.tensor = (
            values.reshape(shape[::-1]).permute(*range(len(shape))[::-1]) if fortran else values.reshape(shape)
        )


def array(*_: object) -> Array:
    """Stands for the function that makes an empty array, whose state follows."""
    return Array()


def number(kind: Type, data: bytes) -> Any:
    """Stands for the function that makes a number of NumPy's."""
    (value,) = kind.unpack(data)
    return value


def no_bytes(*_: object) -> bytes:
    """Stands for `bytes`, which a file calls for the empty ones alone."""
    return b""


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (Type, "numpy.dtype"),
    (Array, "numpy.ndarray"),
    *((number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (no_bytes, "builtins.bytes"),
    argparse.Namespace,
    types.SimpleNamespace,
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((pathlib.PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
    (pathlib.PurePosixPath, "pathlib.PurePosixPath"),
    (pathlib.PureWindowsPath, "pathlib.PureWindowsPath"),
    (str, "torch.torch_version.TorchVersion"),
    # Lightning's dictionaries of settings, by their names of several releases.
    *(
        (dict, f"{module}.AttributeDict")
        for module in (
            "lightning.fabric.utilities.data",
            "lightning_fabric.utilities.data",
            "lightning.pytorch.utilities.parsing",
            "pytorch_lightning.utilities.parsing",
        )
    ),
]
"""What torch's reader puts in the place of the classes and functions that a file names."""


def with_tensors(value: Any) -> Any:
    """Return what was read, with tensors in the place of arrays."""
    if isinstance(value, Array):
        return value.tensor
    if isinstance(value, dict):
        for key, x in value.items():
            value[key] = with_tensors(x)
    elif isinstance(value, list):
        value[:] = [with_tensors(x) for x in value]
    elif type(value) is tuple:
        return tuple(with_tensors(x) for x in value)
    elif isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        with_tensors(vars(value))
    return value
