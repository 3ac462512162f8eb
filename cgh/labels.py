"""Classes and counts as users have them: tensors, arrays and numbers of any integer type."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def integer_labels(labels: Any, name: str = "labels") -> Tensor:
    """Return classes as int64.

    Args:
        labels: a tensor, a NumPy array, a pandas series or a sequence of integers of any type; booleans are the classes
            0 and 1.
        name: for the message.

    Raises:
        TypeError: they are floating point, strings or something else that is no integer.
        ValueError: a value beyond int64.

    Example:
        >>> import torch
        >>> from cgh.labels import integer_labels
        >>> integer_labels(torch.tensor([3, 1], dtype=torch.uint8))
        tensor([3, 1])
    """
    accepted = "classes are integers: a tensor, an array or a list of them, such as torch.tensor([0, 2, 1])"
    try:
        if not isinstance(labels, Tensor):
            labels = _plain(labels)
        tensor = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # strings, objects, numbers that int64 does not hold
        kinds = sorted({type(x).__name__ for x in labels}) if isinstance(labels, (list, tuple)) else []
        found = f"a {type(labels).__name__}" + f" of {', '.join(kinds)}" * bool(kinds)
        raise TypeError(f"{name} are {found}; {accepted}. Number your classes first.") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized:
        raise TypeError(f"{name} are {tensor.dtype}; {accepted}. Make them so with labels.long().")
    if tensor.dtype == torch.uint64 and (tensor.long() < 0).any():
        raise ValueError(f"{name} hold values above {2**63 - 1}; number your classes from 0.")
    return tensor.long()


def _plain(labels: Any) -> Any:
    """What torch makes a tensor of, which it does not of arrays of every byte order, stride and type of NumPy's."""
    if hasattr(labels, "to_numpy"):
        labels = labels.to_numpy()
    if hasattr(labels, "astype"):
        own = labels.dtype.newbyteorder("=")
        labels = labels.tolist() if labels.dtype.kind == "O" else labels.astype(own, order="C")
    if isinstance(labels, (list, tuple)):  # of Python's numbers, or NumPy's or torch's of any type
        numbers = (label.item() if hasattr(label, "item") else label for label in labels)
        return torch.tensor([operator.index(number) for number in numbers], dtype=torch.int64)
    return labels


def check_tensor(x: object, name: str) -> None:
    """Raise TypeError unless `x`, which is several things called `name`, is a tensor of numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} are a {type(x).__name__}; make them a tensor, such as torch.as_tensor({name}).")
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"{name} are {x.dtype}; make them floating point, such as {name}.float().")


def integers(values: Any, name: str) -> list[int]:
    """Return one integer or several, of any integer type, as Python's.

    Raises:
        TypeError: something is no integer.

    Example:
        >>> import torch
        >>> from cgh.labels import integers
        >>> integers(torch.tensor([1, 20]), "k"), integers(5, "k")
        ([1, 20], [5])
    """
    several = values if isinstance(values, Iterable) and getattr(values, "ndim", None) != 0 else [values]
    try:
        return [operator.index(value) for value in several]
    except TypeError as error:
        raise TypeError(f"{name} is {values!r}; it is an integer, or several.") from error
