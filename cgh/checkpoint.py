"""Checkpoints that are written whole or not at all, and read as data."""

from __future__ import annotations

import os
from collections.abc import Mapping
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
