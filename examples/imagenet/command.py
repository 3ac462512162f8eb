"""How a script is called and how it ends: an error that says what to do is one line, once over all ranks."""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import tyro
from files import BadImageError
from run import agents_store
from torch.distributed.elastic.multiprocessing.errors import record

import cgh

OURS = (Path(__file__).resolve().parents[1], Path(cgh.__file__).resolve().parent)


def read_arguments(config: type[Any], args: Sequence[str] | None = None, **options: Any) -> Any:
    """Return what the command line says, as `tyro.cli` does; what is wrong with it is told by the first rank alone."""
    return tyro.cli(config, args=args, console_outputs=os.environ.get("RANK", "0") == "0", **options)


def command(main: Callable[[], object]) -> None:
    """Call a script's `main`; an error that this project raises ends in its message, without a traceback.

    Of the ranks that have the same error one tells it, and restarts by torchrun do not repeat it. A rank that fails
    because another did says nothing. Any other error keeps its traceback.
    """
    try:
        record(_quiet(main))()
    except KeyboardInterrupt:
        sys.exit("interrupted; started again with the same options, a run goes on from its last checkpoint.")


def _quiet(main: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        try:
            return main()
        except Exception as error:
            if says_what_to_do(error):
                message = _message(error)
                if _first_to_say(message):
                    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
            elif not (dist.is_initialized() and isinstance(error, RuntimeError) and _said()):
                raise
        sys.exit(1)

    return run


def says_what_to_do(error: Exception) -> bool:
    """Return whether an error is meant for the user: raised by this project, or about a file that it names."""
    if isinstance(error, BadImageError) or (isinstance(error, OSError) and error.filename is not None):
        return True
    if not isinstance(error, (ValueError, OSError, FloatingPointError, ModuleNotFoundError)):
        return False
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return any(place.is_relative_to(folder) for folder in OURS)


def _message(error: Exception) -> str:
    text = str(error).rstrip()
    if "DataLoader worker process" in text:  # which sends a traceback in place of its error
        text = text.rpartition("\n")[2].partition(": ")[2]
    return text


def _first_to_say(message: str) -> bool:
    """Return whether no rank has said this before, in this start of them or an earlier one."""
    store = agents_store()
    if store is None:
        return True
    try:
        store.set(f"cgh/said/{_start()}", "")
        return store.add(f"cgh/message/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
    except RuntimeError:  # the store has gone with the rank that said it
        return False


def _said() -> bool:
    """Return whether a rank of this start has said an error."""
    store = agents_store()
    try:
        return store is not None and store.check([f"cgh/said/{_start()}"])
    except RuntimeError:
        return True


def _start() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
