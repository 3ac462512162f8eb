"""Checkpoints that are written whole or not at all, and read as data."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch


def save(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `state` to `path`, so that a run stopped at any moment leaves the old file or the new one, never a part.

    Args:
        state: tensors, numbers, strings and containers of them, such as `model.state_dict()`.
        path: its folder is made if missing.

    Raises:
        OSError: the file cannot be written, as on a full disk. What was there before is untouched.

    Example:
        >>> import tempfile, torch
        >>> from cgh import checkpoint
        >>> path = tempfile.mkdtemp() + "/run.pt"
        >>> checkpoint.save({"step": 3, "weight": torch.ones(2)}, path)
        >>> checkpoint.load(path)["step"]
        3
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            try:
                torch.save(dict(state), file)
            except RuntimeError as error:  # what torch's writer makes of a write that falls short
                raise OSError(
                    f"{path} is not written, and what was there is untouched; is the disk full? {error}"
                ) from error
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return what `save` wrote. The file is read as data; a pickle that would run code is refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is cut short, or holds more than data.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of plain data, or is cut short: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}; a checkpoint is a dictionary.")
    return state


class Writer:
    """Writes states while the training goes on: `save` copies one to the host's memory, and a thread writes it.

    One is written at a time. What goes wrong in the thread is raised by the next `save`, or by `wait`.

    Args:
        write: what the thread does with a copy, such as `functools.partial(checkpoint.save, path=path)`.

    Example:
        >>> import functools, tempfile, torch
        >>> from cgh import checkpoint
        >>> path = tempfile.mkdtemp() + "/run.pt"
        >>> writer = checkpoint.Writer(functools.partial(checkpoint.save, path=path))
        >>> weight = torch.ones(2)
        >>> writer.save({"weight": weight})
        >>> _ = weight.zero_()
        >>> writer.wait()
        >>> checkpoint.load(path)["weight"]
        tensor([1., 1.])
    """

    def __init__(self, write: Callable[[Mapping[str, Any]], None]) -> None:
        self._write = write
        self._thread = ThreadPoolExecutor(1)  # which Python waits for when it ends
        self._written: Future[None] | None = None

    def save(self, state: Mapping[str, Any]) -> None:
        """Copy `state` and have it written; wait for the one before, and raise what went wrong with it."""
        self.wait()
        copied = _copy(dict(state))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies do not wait for one another
        self._written = self._thread.submit(self._write, copied)

    def wait(self) -> None:
        """Return when the last state is written, or raise what went wrong."""
        written, self._written = self._written, None
        if written is not None:
            written.result()


def _copy(value: Any) -> Any:
    """A state on the host that later steps do not change, its tensors on the way there."""
    if isinstance(value, torch.Tensor):
        copied = torch.empty_like(value.detach(), device="cpu", pin_memory=value.is_cuda)
        return copied.copy_(value.detach(), non_blocking=value.is_cuda)
    if isinstance(value, dict):
        mapping = copy.copy(value)  # with the versions that a state_dict carries as an attribute
        mapping.update((key, _copy(x)) for key, x in value.items())
        return mapping
    if type(value) in (list, tuple):
        return type(value)(_copy(x) for x in value)
    return copy.copy(value)
