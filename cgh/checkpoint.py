"""Checkpoints that are written whole or not at all, and read as data."""

from __future__ import annotations

import contextlib
import copy
import enum
import os
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from cgh.foreign import STAND_INS, with_tensors

# What torch reads back as data, by its very type: a subclass is written by its own name, which is refused.
_PLAIN = (
    Tensor,
    nn.Parameter,
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
)
_ONE_BY_ONE = (dict, OrderedDict, Counter, list, tuple, set)


def save(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `state` to `path`, so that a run stopped at any moment leaves the old file or the new one, never a part.

    Args:
        state: tensors, numbers, strings and containers of them, such as `model.state_dict()`.
        path: its folder is made if missing.

    Raises:
        TypeError: a value is something else, which `load` would refuse, or a tensor on meta; the message names its key
            and what to write in its place. What was there before is untouched.
        OSError: the file cannot be written, as on a full disk. What was there before is untouched.

    Example:
        >>> import tempfile, torch
        >>> from cgh import checkpoint
        >>> path = tempfile.mkdtemp() + "/run.pt"
        >>> checkpoint.save({"step": 3, "weight": torch.ones(2)}, path)
        >>> checkpoint.load(path)["step"]
        3
    """
    if not isinstance(state, Mapping):
        remedy = ".state_dict()" if isinstance(state, nn.Module) else ", by a name in a dictionary"
        raise TypeError(f"the state is a {type(state).__name__}; write what it holds{remedy}.")
    state = dict(state)
    check_plain(state)
    path = Path(path).resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch's writer makes of a write that falls short
            raise OSError(
                f"{path} is not written, and what was there is untouched; is the disk full? {error}"
            ) from error
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`, whose file takes its place if all goes well and is removed if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return what `save` wrote. The file is read as data; a pickle that would run code is refused.

    In others' checkpoints NumPy's numbers are read as Python's, its arrays as tensors, and paths as pure paths; a
    command line's namespace stays one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is cut short, or holds more than data.
    """
    mine = [name for name in STAND_INS if name not in torch.serialization.get_safe_globals()]  # the user's own stay
    with torch.serialization.safe_globals(mine):
        try:
            state = with_tensors(torch.load(path, map_location=device, weights_only=True))
        except FileNotFoundError:
            raise
        except Exception as error:
            if names := _other_globals(path):
                raise ValueError(
                    f"{path} is not a checkpoint of plain data: it names {', '.join(names)}, which reading it would "
                    "run. Nothing was run. Have its tensors written by themselves where the file was made, as "
                    "torch.save(model.state_dict(), path) does, and numbers, strings and dictionaries beside them."
                ) from error
            # Of a refused pickle, torch's own message goes on to advise reading the file as code.
            own = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
            reason = str(own or error) or "it ends too early"
            raise ValueError(f"{path} is not a checkpoint of plain data, or is cut short: {reason}.") from error
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
        check_plain(dict(state))
        devices: set[torch.device] = set()
        copied = _copy(dict(state), devices)
        for device in devices:
            torch.cuda.synchronize(device)  # the copies do not wait for one another
        self._written = self._thread.submit(self._write, copied)

    def wait(self) -> None:
        """Return when the last state is written, or raise what went wrong."""
        written, self._written = self._written, None
        if written is not None:
            written.result()


def _copy(value: Any, devices: set[torch.device]) -> Any:
    """A state on the host that later steps do not change, its tensors on the way there from the CUDA devices added."""
    if isinstance(value, torch.Tensor):
        if value.is_cuda:
            devices.add(value.device)
        copied = torch.empty_like(value.detach(), device="cpu", pin_memory=value.is_cuda)
        return copied.copy_(value.detach(), non_blocking=value.is_cuda)
    if isinstance(value, dict):
        mapping = copy.copy(value)  # with the versions that a state_dict carries as an attribute
        for key, x in value.items():  # a Counter's update counts
            mapping[key] = _copy(x, devices)
        return mapping
    if type(value) in (list, tuple, set):
        return type(value)(_copy(x, devices) for x in value)
    return copy.copy(value)


def check_plain(value: object, key: str = "") -> None:
    """Raise TypeError, with the key and the remedy, where `load` would refuse a value that `save` is to write."""
    _check_plain(value, key, ())


def _check_plain(value: Any, key: str, around: tuple[int, ...]) -> None:
    if id(value) in around:
        raise TypeError(f"{key or 'the state'} holds itself; write it once.")
    if type(value) not in (*_PLAIN, *_ONE_BY_ONE):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise TypeError(
            f"{key or 'the state'} is a {kind}, which checkpoint.load would refuse, as reading it runs code; write "
            f"{_remedy(value)} in its place."
        )
    if isinstance(value, Tensor) and value.is_meta:
        raise TypeError(f"{key or 'the state'} is on meta, where tensors have no values; fill or load the model first.")
    around = (*around, id(value))
    if isinstance(value, dict):
        for name, x in value.items():
            _check_plain(name, f"a key of {key or 'the state'}", around)
            _check_plain(x, f"{key}.{name}".lstrip("."), around)
    elif isinstance(value, (list, tuple, set)):
        for index, x in enumerate(value):
            _check_plain(x, f"{key}[{index}]", around)
    for name, x in getattr(value, "__dict__", {}).items():  # as the versions of a state_dict's modules
        _check_plain(x, f"{key}.{name}", around)


def _remedy(value: Any) -> str:
    """What to write in the place of a value."""
    if isinstance(value, enum.Enum):
        return f"its name, {value.name!r},"
    if isinstance(value, PurePath):
        return f"str(path), {str(value)!r},"
    if isinstance(value, Tensor):
        return "value.full_tensor()" if hasattr(value, "full_tensor") else "value.as_subclass(torch.Tensor)"
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        numbers = getattr(value, "ndim", 0) and value.dtype.kind in "biuf"
        return "torch.from_numpy(value)" if numbers else f"value.tolist(), {value.tolist()!r},"
    if hasattr(value, "_asdict"):
        return "value._asdict()"
    for kind in (dict, list, tuple, set, str, int, float, bytes):
        if isinstance(value, kind):
            return f"{kind.__name__}(value)"
    if hasattr(value, "__dict__") and not callable(value):
        return "a dictionary of what matters of it, such as vars(value),"
    return "tensors, numbers, strings, or dictionaries, lists, tuples and sets of them"


def _other_globals(path: str | os.PathLike[str]) -> list[str]:
    """The classes and functions in a file that are no data; none where its names cannot be read."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # whatever a broken file raises, what reading it raised says more
        return []
