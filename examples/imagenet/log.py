"""What a run tells: a plain CSV, plain lines, TensorBoard event files and one progress bar."""

from __future__ import annotations

import csv
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

T = TypeVar("T")


class Log:
    """Writes figures by step to `log.csv`, TensorBoard and a progress bar; where there is no terminal, to plain lines.

    A resumed run cuts off what was logged after its checkpoint, so nothing is there twice. `log.txt` has the plain
    lines in any case, with their time, and keeps all: it tells what happened, restarts included.

    Args:
        folder: of the run.
        figures: names of all that may be logged, the columns after "step".
        steps: of the whole run.
        step: finished so far.
        size: of `log.csv` in bytes at that step.
        task: what the bar says.
    """

    def __init__(
        self,
        folder: Path,
        figures: Sequence[str],
        steps: int,
        step: int = 0,
        size: int = 0,
        task: str = "pre-training",
    ) -> None:
        path = folder / "log.csv"
        path.touch()
        os.truncate(path, min(size, path.stat().st_size))
        self._file = path.open("a", newline="")
        self._csv = csv.DictWriter(self._file, ["step", *figures], lineterminator="\n")
        if not size:
            self._csv.writeheader()
        self._text = (folder / "log.txt").open("a")
        self._tell(f"starts at step {step} of {steps}")
        self._board = SummaryWriter(str(folder), purge_step=step + 1 if size else 0)
        self._console = Console(stderr=True)
        self._steps = steps
        self._shown: dict[str, str] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(task, total=steps, completed=step, shown="")
        self._progress.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def write(self, step: int, figures: Mapping[str, float], show: Mapping[str, str]) -> None:
        """Log figures of a step by name; `show` are those for the eye, by a short name, and stay until replaced."""
        self._csv.writerow({"step": step} | {name: f"{value:.6g}" for name, value in figures.items()})
        self._file.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        self._shown.update(show)
        line = "  ".join(f"{name} {value}" for name, value in self._shown.items())
        self._progress.update(self._task, shown=line)
        self._tell(f"step {step}/{self._steps}  {line}")
        if not self._console.is_terminal:
            print(f"step {step}/{self._steps}  {line}", flush=True)

    def note(self, text: str) -> None:
        """Tell something that is no figure, above the bar."""
        self._console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)
        self._tell(f"note: {text}")

    def _tell(self, line: str) -> None:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}", file=self._text, flush=True)

    def size(self) -> int:
        """The length of `log.csv`, for a checkpoint of this step, once it is safely on the disk."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._progress.stop()
        self._board.close()
        self._file.close()
        self._text.close()


def read(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return a run's figures by name, each with the steps at which it was logged.

    Raises:
        ValueError: the folder has no log.
    """
    path = folder / "log.csv"
    if not path.is_file():
        raise ValueError(f"{folder} has no log.csv; name the --folder of a run of pretrain.py.")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        curves: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in reader.fieldnames or ()}
        for row in reader:
            for name, value in row.items():
                if value:
                    curves[name][0].append(int(row["step"]))
                    curves[name][1].append(float(value))
    return {name: curve for name, curve in curves.items() if curve[0] and name != "step"}


class Clock:
    """Where the time goes: images a second, the share of it spent waiting for data, and the memory in use."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was before, such as an evaluation."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self._images = 0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and count the time until each is there."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def count(self, images: int) -> None:
        self._images += images

    def lap(self, device: torch.device) -> tuple[float, float, float]:
        """Return images a second and the share of waiting since the last lap, and the memory in GiB; start another."""
        elapsed = time.perf_counter() - self._start
        figures = self._images / elapsed, self._waited / elapsed, _memory(device) / 2**30
        self.restart()
        return figures


def _memory(device: torch.device) -> float:
    """The most bytes that this process has held, of the GPU or else of the host; Windows cannot say the latter."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
