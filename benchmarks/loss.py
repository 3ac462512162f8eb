"""What the losses cost: time, memory and error, beside the same losses with every relation matrix kept.

python benchmarks/loss.py            # some minutes and 7 GB of memory; --quick for a short look

On a CUDA GPU under bfloat16 autocast, elsewhere in float32. Times are of value and gradient together, the median over
repetitions in which the implementations take turns. Memory is what a run takes at its peak on top of its inputs: on
CUDA of PyTorch's allocator, on Linux of the process's resident memory; elsewhere it is not measured.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

import cgh
from cgh import plot
from cgh.losses import STUDENT_TEMPERATURE, TEACHER_TEMPERATURE
from cgh.relation import cross_context_term, cross_entropy, infonce_term, similarity
from cgh.streaming import backend, chunk_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTEXTS = ("global", "hypercolumn")
PAIRS = (CONTEXTS, CONTEXTS[::-1])
BASELINE = "matrices kept"
ALONE = "products alone"

PAPER = (256, 131_072, 512)
SMALL = ((256, 4_096, 128), (64, 4_096, 128), (64, 16_384, 512))
"""Sizes N, K, D."""

Rows = dict[str, Tensor]
Inputs = tuple[Rows, Rows, Rows]
"""Of the student, of the teacher, and of the memory."""
Loss = Callable[[Rows, Rows, Rows], Tensor]


@dataclass
class Config:
    """Measure the losses beside the same losses with every relation matrix kept."""

    batch: int = 256
    """Images, N."""
    dim: int = 512
    """Width of the embeddings, D."""
    size: int = 131_072
    """Rows of each bank, K."""
    sizes: tuple[int, ...] = (4_096, 16_384, 65_536, 131_072, 262_144, 1_048_576)
    """K of the second table and of the picture, with N as above."""
    batches: tuple[int, ...] = (64, 512)
    """N of the second table, with K as above."""
    repetitions: int = 3
    """Rounds, of which a figure is the median."""
    memory: float = 5.0
    """Gigabytes that relation matrices may take; where they need more, only ours is measured."""
    small: bool = True
    """Also measure few images and short banks."""
    quick: bool = False
    """A short look, at small sizes."""
    out: Path = Path("runs/loss-benchmark.png")
    """Picture of time and memory against K."""


@dataclass
class Cost:
    """What one implementation takes; NaN is not measured."""

    seconds: float = math.nan
    megabytes: float = math.nan


def four_matrices(z: Rows, t: Rows, memory: Rows) -> Tensor:
    """Return the cross-context loss straightforwardly: the four relation matrices, then the loss from them."""
    student = {name: similarity(z[name], memory[name]) for name in CONTEXTS}
    teacher = {name: similarity(t[name], memory[name]) for name in CONTEXTS}
    terms = [
        cross_entropy(
            student[learner] / STUDENT_TEMPERATURE[learner],
            torch.softmax(teacher[guide] / TEACHER_TEMPERATURE[guide], dim=1),
        )
        for learner, guide in PAIRS
    ]
    return torch.stack(terms).mean()


def term_by_term(z: Rows, t: Rows, memory: Rows) -> Tensor:
    """Return the same, with matrices that go as soon as neither their term nor its gradient needs them."""
    terms = [
        cross_context_term(
            z[learner],
            t[guide],
            memory[learner],
            memory[guide],
            STUDENT_TEMPERATURE[learner],
            TEACHER_TEMPERATURE[guide],
        )
        for learner, guide in PAIRS
    ]
    return torch.stack(terms).mean()


def infonce(z: Rows, t: Rows, memory: Rows) -> Tensor:
    """Return InfoNCE straightforwardly."""
    return torch.stack([infonce_term(z[name], t[name], memory[name], temperature=0.2) for name in CONTEXTS]).sum()


LOSSES: dict[str, dict[str, Loss]] = {
    "cross-context": {BASELINE: four_matrices, "term by term": term_by_term, "ours": cgh.CrossContextLoss()},
    "InfoNCE": {BASELINE: infonce, "ours": cgh.InfoNCELoss()},
}
"""By loss and implementation."""

PRODUCTS = {"cross-context": 8, "InfoNCE": 4}
"""Products of `(N, D)` and `(D, K)` that ours takes, or of as many operations."""


def inputs(batch: int, size: int, dim: int) -> Inputs:
    """Return unit rows, the teacher's near the student's."""
    torch.manual_seed(0)

    def rows(count: int) -> Tensor:
        x = torch.randn(count, dim, device=DEVICE)
        return x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True))

    z = {name: rows(batch) for name in CONTEXTS}
    t = {name: F.normalize(x + rows(batch), dim=1) for name, x in z.items()}
    return z, t, {name: rows(size) for name in CONTEXTS}


def first(rows: Inputs, batch: int, size: int) -> Inputs:
    """Return the first `batch` images and the first `size` rows of the banks."""
    z, t, memory = rows
    z, t = ({name: x[:batch] for name, x in view.items()} for view in (z, t))
    return z, t, {name: bank[:size] for name, bank in memory.items()}


def gradients(loss: Loss, rows: Inputs) -> tuple[Tensor, ...]:
    """Return the loss and its gradients with respect to the student's embeddings."""
    z = {name: x.detach().requires_grad_() for name, x in rows[0].items()}
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda"):
        value = loss(z, *rows[1:])
    return (value.detach(), *torch.autograd.grad(value, list(z.values())))


def exact(loss: Loss, rows: Inputs) -> tuple[Tensor, ...]:
    """Return `gradients` in float64, some images at a time, as all their matrices at once would not fit."""
    z, t, memory = ({name: x.double() for name, x in some.items()} for some in rows)
    images, some = len(z["global"]), 32
    parts = []
    for start in range(0, images, some):
        leaves = {name: x[start : start + some].requires_grad_() for name, x in z.items()}
        share = len(leaves["global"]) / images
        value = share * loss(leaves, {name: x[start : start + some] for name, x in t.items()}, memory)
        parts.append((value.detach(), *torch.autograd.grad(value, list(leaves.values()))))
    values, *grads = zip(*parts, strict=True)
    return (torch.stack(values).sum(), *(torch.cat(grad) for grad in grads))


def errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[float, float]:
    """Return the relative error of the loss, and that of its gradient in norm."""
    value, gradient = found[0].double(), torch.cat(found[1:], dim=1).double()
    true_gradient = torch.cat(truth[1:], dim=1)
    norm = torch.linalg.norm
    return float((value - truth[0]).abs() / truth[0]), float(norm(gradient - true_gradient) / norm(true_gradient))


def seconds(run: Callable[[], object]) -> float:
    """Return how long `run` takes, the device's part included; on a CPU in processor time, beside other work."""
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    synchronize()
    start = clock()
    run()
    synchronize()
    return clock() - start


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def megabytes(run: Callable[[], object]) -> float:
    """Return the memory that `run` takes at its peak on top of what is taken before."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have freed is otherwise taken again without being seen
    reset.write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Return the process's resident memory in megabytes: now, "VmRSS", or at its peak, "VmHWM"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def costs(losses: dict[str, Loss], rows: Inputs, repetitions: int, products_of: str = "") -> dict[str, Cost]:
    """Return what each of `losses` takes, and what the products alone of a loss so named take by `ALONE`."""
    runs = {name: lambda loss=loss: gradients(loss, rows) for name, loss in losses.items()}
    if products_of and DEVICE.type != "cuda":
        runs[ALONE] = products(products_of, rows)
    for run in runs.values():
        run()  # loads and compiles what is at first use
    peaks = {name: megabytes(run) for name, run in runs.items()}
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(repetitions)]
    found = {name: Cost(statistics.median(each[name] for each in times), peaks[name]) for name in runs}
    if products_of and DEVICE.type == "cuda":
        found[ALONE] = Cost(at_full_rate(products_of, rows))
    return found


def products(name: str, rows: Inputs) -> Callable[[], object]:
    """Return what computes the products of our loss and nothing else, chunk by chunk of the banks as the loss does."""
    z, t, memory = rows
    queries = {bank: torch.cat([z[bank], t[bank]]) if name == "cross-context" else z[bank] for bank in memory}
    chunk = chunk_rows(sum(map(len, queries.values())), DEVICE.type)
    buffer = torch.empty(max(map(len, queries.values())) * chunk)

    def multiply() -> None:
        for bank, query in queries.items():
            means = torch.zeros_like(query)
            for part in memory[bank].split(chunk):
                logits = torch.mm(query, part.T, out=buffer[: len(query) * len(part)].view(len(query), -1))
                means.addmm_(logits, part)

    return multiply


def at_full_rate(name: str, rows: Inputs) -> float:
    """Return how long the operations of our loss's products take at the rate of a large square product in bfloat16."""
    side, (z, _, memory) = 8192, rows
    a, b, out = torch.randn(3, side, side, device=DEVICE, dtype=torch.bfloat16)
    fastest = min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(10))
    return fastest * PRODUCTS[name] * len(z["global"]) * memory["global"].numel() / side**3


def compare(config: Config, rows: Inputs) -> Table:
    """Return a table of every implementation of both losses at one size."""
    sizes = config.batch, config.size, config.dim
    table = Table("loss", "implementation", title="N {:,}, K {:,}, D {:,}".format(*sizes))
    for column in ("time, ms", "ratio", "memory, MB", "ratio", "error of loss", "of gradient"):
        table.add_column(column, justify="right")
    rows = first(rows, config.batch, config.size)
    for name, losses in LOSSES.items():
        found = costs(losses, rows, config.repetitions, products_of=name)
        base, alone = found[BASELINE], found.pop(ALONE)
        truth = exact(losses[BASELINE], rows)
        for implementation, cost in found.items():
            error = errors(gradients(losses[implementation], rows), truth)
            table.add_row(
                name,
                implementation,
                number(1000 * cost.seconds),
                ratio(cost.seconds, base.seconds),
                number(cost.megabytes),
                ratio(cost.megabytes, base.megabytes),
                *(f"{x:.0e}" for x in error),
            )
        what = number(1000 * alone.seconds), ratio(alone.seconds, base.seconds)
        table.add_row(name, f"our {ALONE}", *what, end_section=True)
    return table


def beside_baseline(
    sizes: Sequence[tuple[int, int, int]] = (PAPER, *SMALL), repetitions: int = 9
) -> list[tuple[str, float, float]]:
    """Return (name, baseline, ours) at every size `(N, K, D)`: milliseconds, or megabytes where the name says so.

    The baseline keeps every relation matrix; in the rows named "products alone" it is our products at the rate of a
    large one. On CUDA there are rows for banks in bfloat16 besides: the baseline's are in float32 throughout.
    """
    table = []
    for batch, size, dim in sizes:
        z, t, memory = inputs(batch, size, dim)
        where = f"N {batch:,}, K {size:,}, D {dim:,}"
        for name, losses in LOSSES.items():
            turns = {implementation: losses[implementation] for implementation in (BASELINE, "ours")}
            if DEVICE.type == "cuda":
                half = {context: bank.bfloat16() for context, bank in memory.items()}
                turns["ours, bfloat16 banks"] = lambda z, t, _, loss=losses["ours"], half=half: loss(z, t, half)
            found = costs(turns, (z, t, memory), repetitions, products_of=name)
            base, alone = found.pop(BASELINE), found.pop(ALONE)
            for implementation, cost in found.items():
                label = f"{name}{implementation.removeprefix('ours')}, {where}"
                table.append((f"{label}, over {BASELINE}", 1000 * base.seconds, 1000 * cost.seconds))
                table.append((f"{label}, over {ALONE}", 1000 * alone.seconds, 1000 * cost.seconds))
                table.append((f"{label}, memory in MB", base.megabytes, cost.megabytes))
    return table


def few(repetitions: int) -> Table:
    """Return a table of what ours takes beside its baselines with few images or a short bank."""
    table = Table(title="few images, or a short memory; ms, or MB")
    for column in ("", "baseline", "ours", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, base, ours in beside_baseline(SMALL, repetitions):
        table.add_row(name, number(base), number(ours), ratio(ours, base))
    return table


def grow(config: Config, rows: Inputs) -> tuple[Table, Figure]:
    """Return what the cross-context loss takes as the memory and the batch grow, and a picture against the memory."""
    table = Table(title=f"cross-context, D {config.dim:,}")
    for column in ("N", "K", "ours, ms", f"{BASELINE}, ms", "ratio", "ours, MB", f"{BASELINE}, MB", "ratio"):
        table.add_column(column, justify="right")
    curves: dict[str, list[tuple[int, Cost]]] = {"ours": [], BASELINE: []}
    by_size = [(config.batch, size) for size in config.sizes]
    for batch, size in [*by_size, *((batch, config.size) for batch in config.batches)]:
        losses = {"ours": LOSSES["cross-context"]["ours"]}
        if 10 * 4 * batch * size <= 1e9 * config.memory:  # at its peak it holds ten matrices of float32
            losses[BASELINE] = LOSSES["cross-context"][BASELINE]
        found = costs(losses, first(rows, batch, size), config.repetitions)
        ours, base = found["ours"], found.get(BASELINE, Cost())
        table.add_row(
            f"{batch:,}",
            f"{size:,}",
            number(1000 * ours.seconds),
            number(1000 * base.seconds),
            ratio(ours.seconds, base.seconds),
            number(ours.megabytes),
            number(base.megabytes),
            ratio(ours.megabytes, base.megabytes),
        )
        if (batch, size) in by_size:
            for name, cost in found.items():
                curves[name].append((size, cost))
    figure = plot.curves(
        {
            name: {
                "time, s": ([size for size, _ in points], [cost.seconds for _, cost in points]),
                "memory, MB": ([size for size, _ in points], [cost.megabytes for _, cost in points]),
            }
            for name, points in curves.items()
            if points
        }
    )
    for axes in figure.axes:
        axes.set(xscale="log", yscale="log", xlabel="rows of each bank, K")
        for line in axes.lines:
            line.set(marker="o", markersize=4)
    return table, figure


def number(x: float) -> str:
    """Return `x` for a table."""
    return "not measured" if math.isnan(x) else f"{x:,.{1 if x >= 10 else 2}f}"


def ratio(x: float, base: float) -> str:
    """Return `x / base` for a table."""
    return f"{x / base:.2g}" if base and not math.isnan(x / base) else ""


def main(config: Config) -> None:
    """Print the tables and save the picture."""
    if config.quick:
        config = replace(
            config, batch=32, dim=64, size=8192, sizes=(1024, 8192, 65_536), batches=(16, 64), repetitions=3
        )
    rows = inputs(max(config.batch, *config.batches), max(config.size, *config.sizes), config.dim)
    console = Console(width=110)
    if DEVICE.type == "cuda":
        machine, dtype = torch.cuda.get_device_name(), "bfloat16 autocast"
    else:
        machine, dtype = f"CPU, {torch.get_num_threads()} threads", "float32"
    console.print(f"{machine}, {dtype}, PyTorch {torch.__version__}, {backend(rows[0]['global'])} backend")
    console.print(compare(config, rows))
    if config.small:
        console.print(few(10 * config.repetitions))
    table, figure = grow(config, rows)
    console.print(table)
    plot.save(figure, config.out)
    console.print(f"picture: {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
