"""What the method costs on top of its two networks: a whole step beside bare forward and backward passes.

python benchmarks/overhead.py            # one or two minutes on two CPU cores; --quick for a short look

The bare step is the student's forward and backward and the teacher's forward, heads included. The whole step adds
losses, teacher update, memory and batch shuffling. The optimiser is in neither. On a CUDA GPU it is ResNet-50 under
bfloat16 autocast, channels last, at the paper's batch; elsewhere ResNet-18 in float32 at a quarter of it. The two take
turns, and times are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

import cgh

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


@dataclass
class Config:
    """Measure a whole step beside bare forward and backward passes."""

    arch: str = "resnet50" if ON_GPU else "resnet18"
    """torchvision's name of a ResNet."""
    batch: int = 256 if ON_GPU else 64
    """Images in a step."""
    size: int = 224
    """Side of the images in pixels."""
    dim: int = 512
    """Width of the embeddings."""
    memory_size: int = 131_072
    """Rows of each bank."""
    repetitions: int = 10 if ON_GPU else 3
    """Rounds, of which a figure is the median."""
    quick: bool = False
    """A short look, at small sizes."""


def build(config: Config) -> tuple[cgh.CGH, Tensor, Tensor]:
    """Return the method and two views."""
    torch.manual_seed(0)
    model = cgh.CGH(
        cgh.interop.resnet(config.arch),
        dim=config.dim,
        memory_size=config.memory_size,
        memory_dtype=torch.bfloat16 if ON_GPU else torch.float32,  # that of the products, as in pretrain.py
    ).to(DEVICE)
    views = torch.randn(2, config.batch, 3, config.size, config.size, device=DEVICE)
    strong, weak = views
    if ON_GPU:
        model = model.to(memory_format=torch.channels_last)
        strong, weak = (view.contiguous(memory_format=torch.channels_last) for view in views)
    return model, strong, weak


def parts(model: cgh.CGH, strong: Tensor, weak: Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    student, teacher, memory = model.student, model.teacher, model.memory

    def amp() -> torch.autocast:
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU)

    def bare() -> None:
        with amp():
            z = student(strong)
            teacher(weak)
        torch.stack([x.sum() for x in z.values()]).sum().backward()

    def whole() -> None:
        with amp():
            output = model(strong, weak)
        output.loss.backward()
        model.update(output)

    t = teacher(weak)
    z = {name: x.clone().requires_grad_() for name, x in t.items()}

    def loss(criterion: torch.nn.Module) -> None:
        with amp():
            value = criterion(z, t, memory)
        value.backward()

    return {
        "bare forward and backward": bare,
        "whole step": whole,
        "relation loss": lambda: loss(model.relation_loss),
        "InfoNCE, in the warm-up alone": lambda: loss(model.infonce_loss),
        "teacher update": lambda: teacher.update(student),
        "memory": lambda: memory.enqueue(t),
        "shuffling": lambda: model.shuffle(lambda images: t, weak),
    }


def seconds(run: Callable[[], object]) -> float:
    """Return how long `run` takes, the device's part included."""
    if not ON_GPU:
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    config = tyro.cli(Config)
    if config.quick:
        config = Config(batch=8, size=64, memory_size=4096, repetitions=2)
    model, strong, weak = build(config)
    functions = parts(model, strong, weak)
    for run in functions.values():  # the first call of each is slower
        run()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(config.repetitions):
        for name, run in functions.items():
            times[name].append(seconds(run))
    medians = {name: statistics.median(some) for name, some in times.items()}
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    table = Table("part", "ms", "of the bare step", title=f"{config} on {device}, PyTorch {torch.__version__}")
    bare, whole = list(medians.values())[:2]
    for name, value in medians.items():
        table.add_row(name, f"{1000 * value:.1f}", f"{value / bare:.1%}")
    console = Console()
    console.print(table)
    console.print(f"overhead: {whole / bare - 1:.1%} of the bare step")


if __name__ == "__main__":
    main()
