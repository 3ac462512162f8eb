"""What keeps a run alive: its processes, its folder, its checkpoints, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import signal
import socket
import time
import uuid
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cgh

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

# What autocast computes in, by the names that the command lines use.
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def mixed_seed(*numbers: int) -> int:
    """Return a seed of 32 bits, as many as torch reads on a CPU, unlike those of neighbouring numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def effective(precision: str, device: torch.device) -> str:
    """Return the precision that "auto" stands for: bf16 on a GPU that computes in it, float32 elsewhere."""
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "float32"


def join(device: str) -> torch.device:
    """Join the processes that torchrun started, if it did, and return the device of this one.

    Args:
        device: "cuda", "cpu", or "auto" for a GPU where there is one.

    Raises:
        ValueError: "cuda" where PyTorch sees no GPU, or fewer than this machine has processes.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"--device cuda for process {local_rank} of this machine, counted from 0, but PyTorch {torch.__version__} "
            f"sees {torch.cuda.device_count()} GPU(s): check nvidia-smi and CUDA_VISIBLE_DEVICES, start a process for "
            "each GPU, or use --device cpu."
        )
    chosen = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ:
        options: dict[str, Any] = {"backend": "nccl", "device_id": chosen} if device == "cuda" else {"backend": "gloo"}
        if (store := agents_store()) is not None:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            options |= {"store": meet(store, rank, world_size), "rank": rank, "world_size": world_size}
        dist.init_process_group(**options)
    return chosen


@functools.cache
def agents_store() -> dist.TCPStore | None:
    """Return the store of torchrun's agents, where the ranks meet and those of earlier starts met; None without."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
    )


def meet(store: dist.Store, rank: int, world_size: int, timeout: timedelta = timedelta(minutes=30)) -> dist.Store:
    """Return a part of the agents' store that is this start's own.

    In the store itself, restarted ranks would find where their predecessors listened. How often torchrun has restarted
    them does not tell the starts apart, since each node's agent counts for itself. So every rank hangs out a name that
    is new, and rank 0 answers to each name that it finds until all have come.

    Raises:
        TimeoutError: a rank has not come.
    """
    name, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"cgh/name/{rank}", name)
    if rank:
        store.wait([f"cgh/answer/{name}"], timeout)
        own = dist.PrefixStore(store.get(f"cgh/answer/{name}").decode(), store)
        own.add("present", 1)
        return own
    own = dist.PrefixStore(name, store)
    while (present := own.add("present", 0)) < world_size - 1:
        if time.monotonic() > end:
            raise TimeoutError(
                f"{present + 1} of {world_size} ranks have come in {timeout}; look for the others' errors."
            )
        for key in (f"cgh/name/{other}" for other in range(1, world_size)):
            if store.check([key]):
                store.set(f"cgh/answer/{store.get(key).decode()}", name)
        time.sleep(0.02)
    return own


def distribute(module: nn.Module, **options: Any) -> nn.Module:
    """Return a module whose gradients are averaged over the ranks, or the module itself where there is one rank.

    Looking for unused parameters, of which there are none, keeps gradients in the buckets that they started in: sums of
    many ranks would else differ in bits after resuming.
    """
    if cgh.distributed.rank_and_world_size()[1] == 1:
        return module
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before PyTorch 2.14
    return DistributedDataParallel(module, find_unused_parameters=True, **{buffers: False}, **options)


def write_json(path: Path, value: object) -> None:
    """Write a file that is whole whenever the process is stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


class Run:
    """The folder of a run: one run at a time writes in it, and every file is whole whenever the run is stopped.

    Args:
        folder: is made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint.pt"
        self.previous = folder / "checkpoint-previous.pt"
        self.behind = cgh.checkpoint.Writer(self.save)
        """Writes checkpoints while the run goes on."""
        self.broken: list[str] = []  # why the last checkpoint cannot be read, if it cannot
        folder.mkdir(parents=True, exist_ok=True)

    def lock(self) -> None:
        """Keep others out until this process ends, however it ends.

        Raises:
            ValueError: another process is in.
        """
        # A record lock, unlike flock, is not inherited by loader workers, which may outlive a killed run by seconds.
        self._lock = (self.folder / "lock").open("a+")
        try:
            _take(self._lock)
        except (BlockingIOError, PermissionError) as error:  # what a lock of another process is told by
            self._lock.seek(0)
            raise ValueError(
                f"{self.folder} is in use by {self._lock.read().strip()}: wait until that run ends, stop it, or choose "
                "another --folder."
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        for leftover in self.folder.glob(".checkpoint-next.pt.*.tmp"):  # of a run that was killed while it wrote one
            leftover.unlink()

    def load(self) -> dict[str, Any] | None:
        """Return the last good checkpoint, or nothing where the run has none yet.

        Raises:
            ValueError: there are checkpoints and none can be read.
        """
        self.broken.clear()
        for path in (self.checkpoint, self.previous):
            try:
                state = cgh.checkpoint.load(path)
            except FileNotFoundError:
                continue
            except ValueError as error:
                self.broken.append(str(error))
                continue
            if self.broken:
                warnings.warn(f"{self.broken[0]} Going on from {path}.", stacklevel=2)
            return state
        if self.broken:
            raise ValueError(
                f"{' '.join(self.broken)} No checkpoint of this run can be read: put a copy there, or start anew in "
                "another --folder."
            )
        return None

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint; the one before stays as `checkpoint-previous.pt`.

        Two good ones of different content are there at every moment, under two names: a file that breaks takes no
        other with it.

        Raises:
            OSError: the disk is full, say; the checkpoints that are there are untouched.
        """
        written, spare = self.folder / "checkpoint-next.pt", self.folder / "checkpoint-spare.pt"
        cgh.checkpoint.save(state, written)
        spare.unlink(missing_ok=True)  # of a run that was killed here
        if self.checkpoint.exists() and not self.broken:  # or the good one before it would go
            with contextlib.suppress(OSError):  # a file system without hard links keeps no previous one
                spare.hardlink_to(self.checkpoint)
        written.replace(self.checkpoint)
        if spare.exists():
            spare.replace(self.previous)
        self.broken.clear()


def _take(file: TextIO) -> None:
    """Lock a file for this process, or raise what tells of another's lock."""
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    # Windows keeps others from reading what is locked, so it is a byte far behind the name that they are to read.
    os.lseek(file.fileno(), 2**30, os.SEEK_SET)
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def check_same(saved: Mapping[str, Any], asked: Mapping[str, Any], run: Run) -> None:
    """Raise ValueError unless the run is resumed with what it was started with."""
    changed = [
        f"{name} was {saved.get(name)} and is now {asked[name]}" for name in asked if saved.get(name) != asked[name]
    ]
    if changed:
        raise ValueError(
            f"{run.folder} holds another run: {'; '.join(changed)}. Start with the same options to go on with it, or "
            "choose another --folder."
        )


# What asks a run to stop: a scheduler, Ctrl-C, and a scheduler's early warning, which Windows does not have.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


def leave_signals_to_the_run(worker: int) -> None:
    """Let a worker that loads images outlive what asks all processes to stop: the run saves first, and then ends it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Stop:
    """Whether any process was asked to stop, so that all save and leave after the same step.

    Ctrl-C asks as a scheduler's SIGTERM and SIGUSR1 do; without torchrun a second one ends the process at once.

    Call it once a step on every rank. The answer over several ranks is one step old: it travels, over the host's
    network, while the step is computed, so that nothing waits for it.
    """

    def __init__(self) -> None:
        self.asked = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo")  # type: ignore[assignment]  # every rank is a member
        self._answer = torch.zeros(1, device="cpu")
        self._work: dist.Work | None = None

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        if number == signal.SIGINT and self._group is None:  # torchrun repeats what the terminal sent to all
            os.write(2, b"\nstopping after this step, to save; Ctrl-C again ends the run at once\n")
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self) -> bool:
        if self._group is None:
            return self.asked
        if self._work is not None:
            self._work.wait()
        agreed = bool(self._answer)
        self._answer = torch.tensor([float(self.asked)], device="cpu")
        self._work = dist.all_reduce(self._answer, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed
