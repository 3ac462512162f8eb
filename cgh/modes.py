"""Evaluation for a while: every module goes back to the mode that it was in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def check_module(model: object, owner: str, example: str) -> None:
    """Raise TypeError unless `model`, called `owner` in the message, is a module; `example` is one to pass."""
    if not isinstance(model, nn.Module):
        given = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise TypeError(f"{owner} is {given}; pass an nn.Module, such as {example}.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and at the end each of its modules back into its own, as frozen norms have one.

    Raises:
        TypeError: the model is no module, so that its mode is not known.

    Example:
        >>> import torch
        >>> from cgh.modes import evaluating
        >>> model = torch.nn.Sequential(torch.nn.Dropout().eval(), torch.nn.Dropout())
        >>> with evaluating(model):
        ...     inside = model[1].training
        >>> inside, [m.training for m in model]
        (False, [False, True])
    """
    check_module(model, "the model", "model.student.extractor in place of a function of it")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])  # by the model's own way first, which may undo what its eval() did
        for module, training in modes.items():
            module.training = training
