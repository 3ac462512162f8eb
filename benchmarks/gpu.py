"""Whether the library is exact, free of waits and of needless graphs, and resumed to the bit here; and how fast it is.

python benchmarks/gpu.py             # four minutes on one GPU; elsewhere, and with --quick, a short look at small sizes

First the checks, then one table, ours beside a baseline in the same process, by medians of runs that take turns. A
part that fails is reported, and the next goes on; one for which no time is left is left out. Without a GPU graphs are
counted on the CPU and Triton's kernels run in its interpreter; the aims beside the table's figures are those of an
H100-class GPU and shown there alone.
"""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cgh
from cgh import checkpoint, views

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "study"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import loss as losses
import overhead

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
STEPS = 12
NEEDS_GPU = "not run: needs a GPU"


@dataclass
class Config:
    """Check the library on this machine, and measure it beside its baselines."""

    minutes: float = 4.0
    """After which no further part is begun."""
    quick: bool = False
    """A short look, at the sizes that a CPU gets."""
    out: Path = Path("runs/gpu.json")
    """Gets all figures."""


@dataclass
class Row:
    """A line of the table: what ours takes beside a baseline, and what is to be reached."""

    what: str
    ours: float
    baseline: float
    against: str
    """What the baseline is."""
    aim: float
    """Of `ours / baseline`, or of ours where that is `absolute`."""
    unit: str = "ms"
    absolute: bool = False
    least: bool = False
    """The aim is to be reached from below."""

    @property
    def ratio(self) -> float:
        return self.ours / self.baseline if self.baseline else math.nan

    @property
    def reached(self) -> bool:
        found = self.ours if self.absolute else self.ratio
        return found >= self.aim if self.least else found <= self.aim


@dataclass
class Report:
    """What was found."""

    small: bool
    """Whether sizes are a CPU's."""
    checks: dict[str, str] = field(default_factory=dict)
    """By part, what it found."""
    failures: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class Trained:
    """A small CGH under training, from bytes on the device to the memory; a batch follows from the number of its step.

    Args:
        warmup: steps in which InfoNCE fades out.
        device: of all.
    """

    def __init__(self, warmup: int = 4, device: torch.device = DEVICE) -> None:
        torch.manual_seed(0)
        backbone = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
        self.model = cgh.CGH(backbone, dim=32, hidden_dim=64, memory_size=256, warmup_steps=warmup, seed=0).to(device)
        on_cuda = device.type == "cuda"
        self.called: Callable[..., cgh.CGHOutput] = self.model
        self.optimizer = torch.optim.SGD(self.model.student.parameters(), 0.05, momentum=0.9, fused=on_cuda or None)
        self.crops = views.BatchCrops(64)
        self.augment = views.Augmentation(memory_format=torch.channels_last).to(device)
        self.images = torch.randint(256, (16, 3, 64, 64), dtype=torch.uint8).to(device)
        self.done = 0

    def step(self) -> cgh.CGHOutput:
        """Train by one batch."""
        strong, weak = self.augment(self.crops(self.images, seed=self.done), seed=self.done)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.images.is_cuda):
            output = self.called(strong, weak)
        self.optimizer.zero_grad()
        output.loss.backward()
        self.optimizer.step()
        self.model.update(output)
        self.done += 1
        return output

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "done": self.done}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]


# Checks: each returns what it found, or raises


def golden_losses() -> str:
    """The reference implementation's losses and gradients, on this device."""
    from tests import golden

    worst = {torch.float64: 0.0, torch.float32: 0.0}
    for case in golden.load("loss"):
        for dtype in worst:
            found, expected = _golden(golden, case, dtype)
            worst[dtype] = max(worst[dtype], float(((found - expected).abs() / expected.abs().clamp(min=1.0)).max()))
    text = f"off by {worst[torch.float64]:.0e} in float64, {worst[torch.float32]:.0e} in float32"
    if worst[torch.float64] > 1e-9 or worst[torch.float32] > 1e-4:
        raise AssertionError(text)
    return text


def _golden(golden: Any, case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers of a case's relation loss and its gradients, found and expected."""
    dims = {name: case[f"{name}_dim"] for name in ("global", "hypercolumn")}

    def rows(which: str, count: int, dim: int) -> Tensor:
        return golden.unit_rows(f"{case['name']}/{which}", (count, dim)).to(DEVICE, dtype)

    z = {name: rows(f"student/{name}", case["batch"], dim).requires_grad_() for name, dim in dims.items()}
    t = {name: rows(f"teacher/{name}", case["batch"], dim) for name, dim in dims.items()}
    memory = {name: rows(f"memory/{name}", case["memory"], dim) for name, dim in dims.items()}
    local = [rows(f"student/local{i}", case["batch"], dims["global"]) for i in range(case["local_views"])]
    criterion = cgh.CrossContextLoss(
        {"global": 0.1, "hypercolumn": case["temp_s"]}, {"global": 0.04, "hypercolumn": case["temp_t"]}
    )
    total = criterion(z, t, memory, *({"global": view} for view in local))
    total.backward()
    found, expected = [total.item()], [case["relation"]["total"]]
    for name, x in z.items():
        key = f"student/{name}"
        found += golden.fingerprint(f"{case['name']}/relation/{key}", x.grad)
        expected += case["relation"]["grads"][key]
    return torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)


def half_precision() -> str:
    """The loss in autocast's dtype is no less exact than with every matrix kept."""
    rows = losses.inputs(64, 16_384 if ON_GPU else 2048, 512 if ON_GPU else 64)
    found = {}
    for name, implementations in losses.LOSSES.items():
        truth = losses.exact(implementations[losses.BASELINE], rows)
        ours, kept = (
            max(losses.errors(losses.gradients(implementations[which], rows), truth))
            for which in ("ours", losses.BASELINE)
        )
        found[name] = f"{name} {ours:.0e} (kept {kept:.0e})"
        if ours > 1.1 * kept + 1e-5:
            raise AssertionError(f"less exact than the matrices kept: {found[name]}")
    return "largest error: " + ", ".join(found.values())


def same_views() -> str:
    """Views on the device are those that the CPU makes by the same seed."""
    images = torch.randint(256, (64, 3, 40, 40), dtype=torch.uint8)
    crop, augment = views.BatchCrops(32), views.Augmentation()
    on_cpu = augment(crop(images, seed=0), seed=0)
    cut = crop(images.to(DEVICE), seed=0)
    off = max((a.float().cpu() - b.float()).abs().max().item() for a, b in zip(cut, crop(images, seed=0), strict=True))
    on_device = copy.deepcopy(augment).to(DEVICE)([x.to(DEVICE) for x in crop(images, seed=0)], seed=0)
    apart = max((a.cpu() - b).abs().max().item() for a, b in zip(on_device, on_cpu, strict=True))
    text = f"crops off by {off:.0f} of 255, colours by {apart:.0e}"
    if off > 1 or apart > 1e-3:
        raise AssertionError(text)
    return text


def kernels() -> str:
    """Where there is no GPU, Triton's kernels by its interpreter."""
    if ON_GPU:
        return "run on the GPU by the parts above"
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/interpreted.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    last = (found.stdout.strip() or found.stderr.strip()).splitlines()[-1]
    if found.returncode:
        raise AssertionError(last)
    return f"by Triton's interpreter: {last}"


def waits() -> str:
    """A whole training step, across the end of the warm-up, never waits for the device."""
    if not ON_GPU:
        # What is on "meta" has no values, so whatever would read one raises.
        trained = Trained(device=torch.device("meta"))
        for _ in range(6):
            trained.step()
        return "none in 6 steps, as far as a device without values shows"
    trained = Trained()
    for _ in range(3):
        trained.step()
    torch.cuda.synchronize()
    with _waits("error"):
        for _ in range(STEPS):
            trained.step()
    return f"none in {STEPS} steps"


@contextmanager
def _waits(mode: str) -> Iterator[None]:
    """Have PyTorch warn or raise at calls that wait for the device."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def graphs() -> str:
    """The compiled method makes at most two graphs, across the end of the warm-up and with shuffling."""
    count = 0

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return module.forward

    torch.compiler.reset()
    trained = Trained()
    trained.called = torch.compile(trained.model, backend=backend)
    for _ in range(STEPS):
        trained.step()
    text = f"{count} in {STEPS} steps"
    if count > 2:
        raise AssertionError(text)
    return text


def reduced_overhead() -> str:
    """`torch.compile(mode="reduce-overhead")` around the method trains."""
    if not ON_GPU:
        return NEEDS_GPU
    torch.compiler.reset()
    trained = Trained()
    trained.called = torch.compile(trained.model, mode="reduce-overhead")
    last = [trained.step().loss for _ in range(STEPS)][-1].item()
    if not math.isfinite(last):
        raise AssertionError(f"the loss is {last}")
    return f"loss {last:.3f} after {STEPS} steps"


def resumed() -> str:
    """Training that stops, is saved behind its back, and goes on, has the bits of training that never stopped."""
    with _deterministic():
        whole = Trained()
        for _ in range(8):
            whole.step()
        first = Trained()
        for _ in range(4):
            first.step()
        saved: list[dict[str, Any]] = []
        writer = checkpoint.Writer(lambda state: saved.append(dict(state)))
        writer.save(first.state())
        first.step()  # does not change what is written
        writer.wait()
        second = Trained()
        second.load(saved[0])
        for _ in range(4):
            second.step()
    _same(whole.state(), second.state())
    return "8 steps, and 4 and 4"


def replayed() -> str:
    """The study's step as a CUDA graph has the bits of the step without."""
    if not ON_GPU:
        return NEEDS_GPU
    with _deterministic():
        states = []
        for graph in (True, False):
            learner, step = _study(batch=64, width=16, size=32, graph=graph, compile=False)
            for i in range(STEPS):
                step(i)
            states.append(learner.state_dict())
    _same(*states)
    return f"{STEPS} steps, with and without"


@contextmanager
def _deterministic() -> Iterator[None]:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that are not deterministic: the bits are compared
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark


def _same(a: Any, b: Any, name: str = "") -> None:
    """Raise unless two states are the same to the bit."""
    if isinstance(a, Tensor):
        if not torch.equal(a.cpu(), b.cpu()):
            raise AssertionError(f"{name.strip('.')} differs")
    elif isinstance(a, dict):
        for key in a:
            _same(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _same(x, y, f"{name}.{i}")


# Rows of the table


def loss_rows(report: Report) -> None:
    """Time and memory of both losses beside the matrices kept, and beside their products alone."""
    large, small = ((256, 131_072, 512), (256, 4096, 128)) if not report.small else ((32, 8192, 64), (32, 1024, 32))
    for name, sizes, aim in (("cross-context", large, 0.25), ("InfoNCE", large, 0.3), ("cross-context", small, 0.5)):
        rows = losses.inputs(*sizes)
        half = {context: bank.bfloat16() for context, bank in rows[2].items()}
        ours, what = losses.LOSSES[name]["ours"], "{}, N {:,}, K {:,}, D {:,}".format(name, *sizes)
        turns: dict[str, losses.Loss] = {
            "": ours,
            ", bfloat16 banks": lambda z, t, _, ours=ours, half=half: ours(z, t, half),
            losses.BASELINE: losses.LOSSES[name][losses.BASELINE],
        }
        found = losses.costs(turns, rows, 3 if report.small else 20, products_of=name)
        kept, products = found.pop(losses.BASELINE), found.pop(losses.ALONE)
        for which, cost in found.items():
            report.rows.append(Row(what + which, 1e3 * cost.seconds, 1e3 * kept.seconds, losses.BASELINE, aim))
        if sizes == large:
            megabytes = found[""].megabytes
            report.rows.append(Row("its extra memory", megabytes, kept.megabytes, losses.BASELINE, 1 / 20, unit="MB"))
            report.rows.append(Row(what, 1e3 * found[""].seconds, 1e3 * products.seconds, f"its {losses.ALONE}", 2.2))
        if ON_GPU:
            # Without the host, which in training is ahead of the device: as a graph of its kernels.
            runs = {which: partial(losses.gradients, loss, rows) for which, loss in turns.items()}
            alone = {which: _replayed(run) for which, run in runs.items()}
            base = alone.pop(losses.BASELINE)
            for which, milliseconds in alone.items():
                label = f"{what}{which}, the device's part"
                report.rows.append(Row(label, milliseconds, base, losses.BASELINE, aim))
    if ON_GPU:
        ours, base = (_launches(runs[which]) for which in ("", losses.BASELINE))
        report.rows.append(Row("its launches", ours, base, losses.BASELINE, 15, unit="", absolute=True))


def _launches(run: Callable[[], object]) -> int:
    """Return how many kernels `run` launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def _replayed(run: Callable[[], object], repetitions: int = 20) -> float:
    """Return milliseconds of `run`'s kernels, replayed as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return 1000 * statistics.median(losses.seconds(graph.replay) for _ in range(repetitions))


def view_rows(report: Report) -> None:
    """The augmentation beside kornia's."""
    import kornia.augmentation as K

    def transforms(*before: nn.Module, blur: bool) -> nn.Sequential:
        after = [K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.5)] if blur else []
        normalise = K.Normalize(torch.tensor(views.IMAGENET_MEAN), torch.tensor(views.IMAGENET_STD))
        colour = K.ColorJitter(*views.JITTER, p=0.8), K.RandomGrayscale(p=0.2)
        return nn.Sequential(*before, *colour, *after, normalise).to(DEVICE)

    n, side = (32, 64) if report.small else (256, 224)
    batch = torch.randint(256, (2, n, 3, side, side), dtype=torch.uint8).to(DEVICE)
    options: dict[str, Any] = {
        "memory_format": torch.channels_last,
        "dtype": torch.bfloat16 if ON_GPU else torch.float32,
    }
    augment, theirs = views.Augmentation(**options).to(DEVICE), transforms(blur=True)
    normalise = K.Normalize(torch.tensor(views.IMAGENET_MEAN), torch.tensor(views.IMAGENET_STD)).to(DEVICE)
    seed = iter(range(10**9))
    found = _times(
        ours=lambda: augment([batch[0], batch[1]], seed=next(seed)),
        kornia=lambda: (theirs(batch[0] / 255), normalise(batch[1] / 255)),
        repetitions=3 if report.small else 20,
    )
    what = f"two views of {n} at {side}: colour, blur, normalised"
    report.rows.append(Row(what, found["ours"], found["kornia"], "kornia", 2.5, absolute=True))

    cut = views.BatchCrops(32)
    plain = views.Augmentation(blur=False, memory_format=torch.channels_last).to(DEVICE)
    crop = [K.RandomResizedCrop((32, 32), scale=(0.2, 1.0)), K.RandomHorizontalFlip()]
    theirs, weak = transforms(*crop, blur=False), nn.Sequential(*crop, normalise)
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8).to(DEVICE)

    def ours() -> None:
        draw = next(seed)
        plain(cut(images, seed=draw), seed=draw)

    found = _times(
        ours=ours,
        kornia=lambda: (theirs(images / 255), weak(images / 255)),
        repetitions=3 if report.small else 20,
    )
    what = f"crops and colour of {n} at 32"
    report.rows.append(Row(what, found["ours"], found["kornia"], "kornia", 0.6, absolute=True))


def step_rows(report: Report) -> None:
    """A whole step with its augmentation beside bare forward and backward passes of the same networks."""
    config = overhead.Config()
    if report.small:
        config = overhead.Config(arch="resnet18", batch=8, size=64, memory_size=4096, repetitions=2)
    torch.backends.cudnn.benchmark = True
    model, strong, weak = overhead.build(config)
    parts = overhead.parts(model, strong, weak)
    options: dict[str, Any] = {"memory_format": torch.channels_last} if ON_GPU else {}
    augment = views.Augmentation(**options).to(DEVICE)
    pixels = torch.randint(256, (2, config.batch, 3, config.size, config.size), dtype=torch.uint8).to(DEVICE)

    def whole() -> None:
        for place, view in zip((strong, weak), augment([pixels[0], pixels[1]], seed=0), strict=True):
            place.copy_(view)
        parts["whole step"]()

    found = _times(ours=whole, bare=parts["bare forward and backward"], repetitions=config.repetitions)
    what = f"{config.arch} step, batch {config.batch}, with its augmentation"
    report.rows.append(Row(what, found["ours"], found["bare"], "bare passes", 1.04))


def study_rows(report: Report) -> None:
    """The study's step, from bytes on the device to the memory, beside bare passes and the step without a graph."""
    options = {"batch": 128, "width": 16, "size": 16} if report.small else {"batch": 256, "width": 64, "size": 32}
    torch.compiler.reset()
    _, ours = _study(**options, graph=True, compile=ON_GPU)
    learner, plain = _study(**options, graph=False, compile=False)
    batch, size = options["batch"], options["size"]
    strong, weak = torch.randn(2, batch, 3, size, size, device=DEVICE)
    strong, weak = (view.contiguous(memory_format=torch.channels_last) for view in (strong, weak))

    def bare(_: int) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=ON_GPU):
            z = learner.student(strong)
            with torch.no_grad():
                learner.teacher(weak)
        torch.stack([x.sum() for x in z.values()]).sum().backward()

    for i in range(6):
        ours(i)
        plain(i)
    count = 4 if report.small else 20

    def several(step: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [step(i) for i in range(count)]

    found = _times(ours=several(ours), plain=several(plain), bare=several(bare), repetitions=5)
    speed = {name: batch * count / milliseconds * 1000 for name, milliseconds in found.items()}
    what = f"study, ResNet-18 of width {options['width']}, {size} pixels, batch {batch}"
    report.rows += [
        Row(what, speed["ours"], speed["plain"], "without graph", 30_000, "images/s", absolute=True, least=True),
        Row(f"{what}, a step", found["ours"] / count, found["bare"] / count, "bare passes", 1.25),
    ]


def wait_rows(report: Report) -> None:
    """How often a step waits for the device, where there is one."""
    trained = Trained()
    for _ in range(3):
        trained.step()
    with warnings.catch_warnings(record=True) as caught, _waits("warn"):
        warnings.simplefilter("always")
        trained.step()
    count = sum("called a synchronizing" in str(warning.message) for warning in caught)
    report.rows.append(Row("host waits in a step", count, math.nan, "", 0, unit="", absolute=True))


def _study(batch: int, width: int, size: int, graph: bool, compile: bool) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """The study's learner on random images, and what trains it by the batch of a step."""
    from images import Images
    from methods import METHODS, Learner, Settings, resnet18
    from study import Budget, Study

    torch.manual_seed(0)
    pixels = torch.randint(256, (8 * batch, 3, size, size), dtype=torch.uint8)
    images = Images(pixels, torch.zeros(len(pixels), dtype=torch.long))
    study = Study(Budget(ROOT, batch=batch, width=width, size=size, graph=graph, device=DEVICE.type), images, images)
    learner = Learner(
        METHODS["across"], Settings(memory_size=4096), 10_000, resnet18(width), (3, size, size), 128, seed=0
    )
    learner = learner.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train_step = study._train_step(learner, learner.optimizer(5e-4))
    if compile:
        learner.student.compile()
        learner.teacher.encoder.compile()
    order = torch.arange(len(pixels)).split(batch)

    def step(number: int) -> Tensor:
        drawn = study.crops.draw((batch, 3, size, size), number), study.augment.draw(batch, number)
        # The graph holds its rate in float32, and this one is the same number there.
        return train_step(2**-7, learner.weights(10_000), order[number % len(order)], *drawn)

    return learner, step


def _times(repetitions: int, **runs: Callable[[], object]) -> dict[str, float]:
    """Return milliseconds of each, which take turns."""
    for run in runs.values():
        for _ in range(3):
            run()
    times = [{name: losses.seconds(run) for name, run in runs.items()} for _ in range(repetitions)]
    return {name: 1000 * statistics.median(some[name] for some in times) for name in runs}


CHECKS: dict[str, Callable[[], str]] = {
    "the reference's losses": golden_losses,
    "losses in autocast": half_precision,
    "views by the same seed": same_views,
    "host waits": waits,
    "graphs compiled": graphs,
    "resumed to the bit": resumed,
    "replayed to the bit": replayed,
    "Triton's kernels": kernels,
    "reduce-overhead": reduced_overhead,
}
ROWS: tuple[Callable[[Report], None], ...] = (wait_rows, loss_rows, view_rows, step_rows, study_rows)
LAST = ("Triton's kernels", "reduce-overhead")  # the slow ones, after the table's rows


def parts(report: Report) -> dict[str, Callable[[], None]]:
    """Return all that is to be done, by name, in order."""

    def check(name: str) -> Callable[[], None]:
        return lambda: report.checks.update({name: CHECKS[name]()})

    rows = {
        row.__name__.removesuffix("_rows") + " (table)": lambda row=row: row(report)
        for row in ROWS
        if ON_GPU or row is not wait_rows
    }
    first, last = ({name: check(name) for name in CHECKS if (name in LAST) == late} for late in (False, True))
    return first | rows | last


def run(config: Config, console: Console) -> Report:
    """Do every part that there is time for, whatever becomes of the others."""
    report = Report(small=config.quick or not ON_GPU)
    start = time.monotonic()
    for name, part in parts(report).items():
        begun = time.monotonic()
        if begun - start > 60 * config.minutes:
            report.left_out.append(name)
            continue
        torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False  # whatever the one before set
        try:
            part()
        except Exception as error:  # whatever it is, the next part goes on
            lines = str(error).strip().splitlines() or [""]
            report.failures[name] = f"{type(error).__name__}: {lines[0]}"
            verdict = f"FAILS  {name}: {report.failures[name]}"
        else:
            found = report.checks.get(name, "")
            verdict = f"{'-' if found == NEEDS_GPU else 'ok':<6} {name}  {found}"
        seconds = time.monotonic() - begun
        console.print(f"{verdict}  [{seconds:.0f} s]", markup=False, highlight=False, soft_wrap=True)
        if ON_GPU:
            torch.cuda.empty_cache()
    return report


def table(report: Report) -> Table:
    """Return the rows as a table; aims are an H100-class GPU's, so they are shown beside a GPU's figures alone."""
    with_aims = ON_GPU and not report.small
    lines = Table("what", "ours", "baseline", "ratio", *(["to reach", "reached"] if with_aims else []))
    for row in report.rows:
        unit = f" {row.unit}" if row.unit else ""
        baseline = "" if math.isnan(row.baseline) else f"{row.baseline:,.4g}{unit} ({row.against})"
        ratio = "" if math.isnan(row.ratio) else f"{row.ratio:.3g}"
        aim = f"{'at least ' if row.least else ''}{row.aim:,.5g}" + (unit if row.absolute else " of it")
        end = [aim, "yes" if row.reached else "no"] if with_aims else []
        lines.add_row(row.what, f"{row.ours:,.4g}{unit}", baseline, ratio, *end)
    return lines


def main(config: Config) -> None:
    """Print what was found, write it, and fail where a part failed."""
    console = Console()
    machine = torch.cuda.get_device_name() if ON_GPU else f"no GPU: CPU, {torch.get_num_threads()} threads"
    console.print(f"{machine}; PyTorch {torch.__version__}, CGH {cgh.__version__}", highlight=False)
    report = run(config, console)
    console.print(table(report))
    if report.left_out:
        console.print(f"left out for want of time: {', '.join(report.left_out)}", highlight=False)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    found = asdict(report) | {
        "machine": machine,
        "torch": torch.__version__,
        "rows": [asdict(row) | {"ratio": row.ratio, "reached": row.reached} for row in report.rows],
    }
    config.out.write_text(json.dumps(_without_nan(found), indent=2) + "\n")
    console.print(f"figures: {config.out}")
    if report.failures:
        raise SystemExit(1)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
