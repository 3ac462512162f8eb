"""Comparing a file's tensors with a model's: everything that does not fit is said at once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_match(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Check that two sets of tensors have the same names and shapes.

    Args:
        saved: what a file holds.
        expected: what the model holds.
        what: the file's kind, for the message.

    Raises:
        ValueError: they differ; the message lists every missing, unexpected and misshapen key.

    Example:
        >>> import torch
        >>> from cgh.interop.matching import check_match
        >>> check_match({"a": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.zeros(3)}, "the backbone's file")
        Traceback (most recent call last):
        ...
        ValueError: the backbone's file does not fit the model:
          missing: b (3,)
    """
    problems = [f"missing: {key} {tuple(x.shape)}" for key, x in expected.items() if key not in saved]
    problems += [f"unexpected: {key} {tuple(x.shape)}" for key, x in saved.items() if key not in expected]
    problems += [
        f"misshapen: {key} is {tuple(saved[key].shape)}, the model's is {tuple(x.shape)}"
        for key, x in expected.items()
        if key in saved and saved[key].shape != x.shape
    ]
    if problems:
        raise ValueError("\n  ".join([f"{what} does not fit the model:", *problems]))


def check_tensors(state: Mapping[str, object], what: str) -> dict[str, Tensor]:
    """Return `state`, all of whose values are tensors.

    Raises:
        ValueError: some are not, or there are none.
    """
    others = {key: type(x).__name__ for key, x in state.items() if not isinstance(x, Tensor)}
    if others or not state:
        raise ValueError(f"{what} must map names to tensors; it holds {others or 'nothing'}.")
    return {key: x for key, x in state.items() if isinstance(x, Tensor)}
