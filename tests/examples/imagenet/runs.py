"""Runs of `pretrain.py` as real processes, on images that the tests make."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

import cgh

EXAMPLE = Path(__file__).parents[3] / "examples" / "imagenet"

# ResNet-18 on 32 pixels, cut short wherever the cut is of no matter to what is tested.
SMALL = [
    *("--arch=resnet18", "--crop-size=32", "--batch=8", "--epochs=2", "--warmup-epochs=1", "--infonce-epochs=1"),
    *("--dim=16", "--hidden-dim=16", "--memory-size=40", "--device=cpu", "--workers=0"),
    *("--log-steps=2", "--collapse-rows=2", "--knn-epochs=0"),
]


def make_images(root: Path, train: int = 64, val: int = 16) -> Path:
    """Write an image folder of four classes, each of one colour beneath noise."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            colour = 200.0 * torch.eye(4, 3)[number % 4].view(3, 1, 1)
            image = (colour + 55 * torch.rand(3, 40, 48, generator=generator)).to(torch.uint8)
            path = root / split / f"class_{number % 4}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(path)
    return root


class Started:
    """A run in a process of its own, the leader of a group that its loader workers are in."""

    def __init__(self, arguments: Sequence[object], output: Path, environment: Mapping[str, str] | None = None) -> None:
        self.output = output
        # The server has the imports done, so that a run starts within a second.
        context = multiprocessing.get_context("forkserver")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(EXAMPLE), os.environ.get("PYTHONPATH", "")])
        context.set_forkserver_preload(["pretrain"])
        self.process: BaseProcess = context.Process(
            target=_pretrain, args=([str(x) for x in arguments], str(output), dict(environment or {}))
        )
        self.process.start()

    def wait(self, timeout: float = 600) -> int:
        """Return the exit code; a signal's is negative."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.text()}"
        return self.process.exitcode

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, text: str, timeout: float = 600) -> None:
        """Wait until the run prints `text`."""
        end = time.monotonic() + timeout
        while text not in self.text():
            assert self.process.is_alive(), f"ended with {self.process.exitcode} before {text!r}: {self.text()}"
            assert time.monotonic() < end, f"no {text!r} in {timeout} s: {self.text()}"
            time.sleep(0.01)

    def kill_group(self) -> None:
        """Kill the run and its loader workers, as the end of a machine does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()


def _pretrain(arguments: list[str], output: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(1)
    if "FILE_LIMIT" in environment:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(environment["FILE_LIMIT"]),) * 2)
    sys.path.insert(0, str(EXAMPLE))
    import pretrain

    pretrain.main(arguments)


def start_ranks(count: int, arguments: Sequence[object], folder: Path) -> list[Started]:
    """Start the ranks of one run, as `torchrun` would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    return [
        Started(arguments, folder / f"rank{rank}.txt", shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def run(arguments: Sequence[object], output: Path, environment: Mapping[str, str] | None = None) -> str:
    """Run to the end and return what was printed."""
    started = Started(arguments, output, environment)
    code = started.wait()
    assert code == 0, started.text()
    return started.text()


def trained(folder: Path) -> dict[str, Any]:
    """Return all that a run's checkpoint has trained, and how far."""
    state = cgh.checkpoint.load(folder / "checkpoint.pt")
    return {name: state[name] for name in ("model", "optimizer", "scaler", "epoch", "step")}


def same(one: Any, other: Any) -> bool:
    """Whether nested tensors and numbers are the same, bit by bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def figures(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's log, without those figures that no two runs share."""
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]
