"""What keeps a run alive: its processes, its folder, its checkpoints, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import cgh

# What autocast computes in, by the names that the command lines use.
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        if device == "cuda":
            dist.init_process_group("nccl", device_id=chosen)
        else:
            dist.init_process_group("gloo")
    return chosen


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
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # what a lock of another process is told by
            self._lock.seek(0)
            raise ValueError(
                f"{self.folder} is in use by {self._lock.read().strip()}: wait until that run ends, stop it, or choose "
                "another --folder."
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        for leftover in self.folder.glob(".checkpoint.pt.*.tmp"):  # of a run that was killed while it wrote one
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

        Raises:
            OSError: the disk is full, say; the checkpoints that are there are untouched.
        """
        if self.checkpoint.exists() and not self.broken:  # or the good one before it would go
            spare = self.folder / "checkpoint-spare.pt"
            with contextlib.suppress(OSError):  # a file system without hard links keeps no previous one
                spare.unlink(missing_ok=True)
                spare.hardlink_to(self.checkpoint)
                spare.replace(self.previous)
        cgh.checkpoint.save(state, self.checkpoint)
        self.broken.clear()


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


class Stop:
    """Whether any process was asked to stop, by SIGTERM or SIGUSR1, so that all save and leave after the same step.

    Call it once a step on every rank. The answer over several ranks is one step old: it travels, over the host's
    network, while the step is computed, so that nothing waits for it.
    """

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo")  # type: ignore[assignment]  # every rank is a member
        self._answer = torch.zeros(1)
        self._work: dist.Work | None = None

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True

    def __call__(self) -> bool:
        if self._group is None:
            return self.asked
        if self._work is not None:
            self._work.wait()
        agreed = bool(self._answer)
        self._answer = torch.tensor([float(self.asked)])
        self._work = dist.all_reduce(self._answer, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed
