"""Pre-train a backbone by CGH; the defaults are the paper's recipe for ImageNet.

torchrun --nproc-per-node 8 examples/imagenet/pretrain.py --folder runs/imagenet --root /data/imagenet
python examples/imagenet/pretrain.py --folder runs/cifar10 --dataset cifar10 --root /data/cifar10 --arch resnet18 \
    --small-images --crop-size 32
python examples/imagenet/pretrain.py --folder runs/vit --root /data/imagenet --arch timm/vit_small_patch16_224 \
    --optimizer adamw --lr 5e-4 --weight-decay 0.05 --drop-path 0.1
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torchvision.transforms.v2 as T
import tyro
from command import command, read_arguments
from data import Batches, DataConfig, images
from evaluation import labelled, normalise, plain
from log import Clock, Log, read
from method import Method, parse, spelled
from plot import draw
from run import PRECISIONS, Run, Stop, check_same, distribute, effective, join, write_json
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.utils.data import Dataset, Subset

import cgh
from cgh import diagnostics, views
from cgh.extras import require
from cgh.interop import reference
from cgh.interop.matching import check_match
from cgh.losses import STUDENT_TEMPERATURE, TEACHER_TEMPERATURE

LISTED_DEPTH = 3  # parts of the names of layers that are listed, as the blocks of a transformer have
TIME = ("time/images_per_second", "time/waiting_for_data", "time/memory_gib")
# What the recipes have other than the paper's for ImageNet.
RECIPES: dict[str, dict[str, Any]] = {
    "imagenet": {},
    "cifar": {
        **{"arch": "resnet18", "small_images": True, "crop_size": 32, "blur": False, "dim": 128, "hidden_dim": 512},
        **{"memory_size": 4096, "teacher_momentum": 0.99, "batch_norm_splits": 8, "lr": 0.06, "weight_decay": 5e-4},
    },
    "small": {
        **{"arch": "resnet18", "crop_size": 96, "dim": 128, "hidden_dim": 512, "memory_size": 4096, "batch": 64},
        **{"teacher_momentum": 0.99, "batch_norm_splits": 4, "infonce_epochs": 50},
    },
}


@dataclass(kw_only=True)
class Recipe:
    """What decides the weights; a run goes on only with what it was started with."""

    recipe: Literal["imagenet", "cifar", "small"] = "imagenet"
    """Defaults of what follows: the paper's for ImageNet, or for CIFAR's 32 pixels, or for some thousand photographs on
    one device. Every option given beside it wins."""
    data: tyro.conf.OmitArgPrefixes[DataConfig]
    arch: str = "resnet50"
    """torchvision's name of a backbone, or timm's after "timm/"."""
    small_images: bool = False
    """For images of about 32 pixels, of a ResNet: a 3x3 stem of stride 1, and no max pool."""
    drop_path: float | None = None
    """Greatest probability of leaving out one of the student's blocks; by default the architecture's own."""
    crop_size: int = 224
    """Side of both views, in pixels."""
    multi_crop: bool = False
    """Four more strong views of smaller sides."""
    blur: bool = True
    """Blur half of the strong views; small images do better without."""
    both_strong: bool = False
    """Distort the teacher's view as the student's is."""
    layers: tuple[str, ...] = ()
    """Stages whose maps make the hypercolumn, coarsest last; by default the architecture's last two. Several
    hypercolumns, each a context, are named: shallow=layer1,layer2 deep=layer3,layer4."""
    prefix_tokens: int | None = None
    """Class and register tokens before those of a grid, row by row, where the backbone does not say how many."""
    pairs: tuple[str, ...] = ()
    """What learns from what, LEARNER:GUIDE such as global:hypercolumn; by default every context from each other."""
    student_temperature: tuple[str, ...] = spelled(STUDENT_TEMPERATURE)
    """CONTEXT=TEMPERATURE, or one number for all; hypercolumns of other names may leave theirs to "hypercolumn"."""
    teacher_temperature: tuple[str, ...] = spelled(TEACHER_TEMPERATURE)
    """Likewise."""
    infonce_temperature: float = 0.2
    """Of the warm-up's loss."""
    dim: int = 512
    """Width of the embeddings."""
    hypercolumn_dim: int | None = None
    """Width of those of the hypercolumn; by default the same."""
    hidden_dim: int = 4096
    """Width inside the heads."""
    memory_size: int = 131_072
    """Rows of the memory banks."""
    teacher_momentum: float = 0.999
    """Momentum of the teacher's moving average."""
    teacher_momentum_end: float | None = None
    """What it rises to, in a cosine over the run; by default it stays."""
    centring: bool = False
    """Take the mean of the teacher's similarities off them."""
    batch_norm_splits: int = 1
    """Groups in which one device normalises its batch, as that many devices would."""
    epochs: int = 200
    """Passes over the images."""
    batch: int = 256
    """Images in a step, over all ranks."""
    accumulate: int = 1
    """Parts that a batch goes through the networks in, one after another, in as much less memory; batch norm normalises
    each by itself, as --batch-norm-splits does."""
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
    """AdamW is usual for transformers; LARS, which is timm's, for batches of thousands."""
    lr: float = 0.05
    """Highest learning rate, for a batch of 256; it is scaled by batch / 256."""
    layer_decay: float = 1.0
    """Of the learning rate, from a block of the backbone to the one before it; for one that starts with --init."""
    warmup_epochs: float | None = None
    """Epochs until the learning rate is at its highest, before it falls. By default 5, or half of all where those are
    less."""
    schedule: Literal["cosine", "cosine-epochs", "milestones"] = "cosine"
    """How the learning rate falls after the warm-up: a cosine in steps, a cosine in whole epochs, or tenths."""
    milestones: tuple[int, ...] = (120, 160)
    """Epochs after which it is divided by ten, with --schedule milestones."""
    infonce_epochs: float | None = None
    """Epochs over which InfoNCE fades out. By default 5, or half of all where those are less."""
    momentum: float = 0.9
    """Of SGD and LARS; of AdamW, of the gradient's mean."""
    weight_decay: float = 1e-4
    """Of the weights of linear layers and convolutions, and of nothing else."""
    reference_weight_decay: bool = False
    """Decay the norms of shortcuts and of the hypercolumn's head too, as the reference implementation does; SGD's."""
    nesterov: bool = False
    """SGD's momentum of Nesterov's kind."""
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """What autocast computes in, and the banks on a GPU are in; auto is bf16 on a GPU that has it, else float32; fp16
    scales the loss."""
    init: Path | None = None
    """Start the backbone with these weights: a run's checkpoint, the reference's, torchvision's or timm's."""
    resume_from: Path | None = None
    """Go on from this checkpoint, of another run or of the reference implementation, momentum and memory included."""
    seed: int = 0
    """Decides the initial weights and memory, the order of the images and their augmentation."""


@dataclass(kw_only=True)
class Config(Recipe):
    """Pre-train a backbone by CGH; the defaults are the paper's recipe for ImageNet."""

    folder: Path
    """Of the run, for all that it writes; started again with the same options, the run goes on from there."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU where there is one."""
    workers: int = 8
    """Processes that load images, on each rank."""
    channels_last: bool = torch.cuda.is_available()
    """Lay images and weights out channels last, as tensor cores like them; by default where there is a GPU."""
    compile: bool = torch.cuda.is_available() and find_spec("triton") is not None
    """Compile student and teacher with torch.compile; by default where there is a GPU, and Triton to compile for it."""
    deterministic: bool = False
    """Bit-identical weights on a GPU too, for some of its speed."""
    checkpoint_minutes: float = 10
    """Minutes between checkpoints; there is also one at the end of every epoch."""
    checkpoint_steps: int = 0
    """Steps between further checkpoints; 0 for none."""
    log_steps: int = 50
    """Steps between rows of the log."""
    collapse_rows: int = 10
    """Rows of the log between those that also tell of collapse: entropy, agreement, effective rank."""
    knn_epochs: int = 5
    """Epochs between k-nearest-neighbour figures of the validation set; 0 for none."""
    knn_images: int = 50_000
    """Images that these figures take of each split, at most."""
    knn_k: int = 20
    """Neighbours that vote."""
    profile: bool = False
    """Write trace.json.gz of the eighth to the twelfth step, for chrome://tracing or ui.perfetto.dev."""


class Pretraining:
    """A run: everything that it trains, and where it stands."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = join(config.device)
        config.precision = effective(config.precision, self.device)  # so that the run's files say it
        self.rank, self.world_size = cgh.distributed.rank_and_world_size()
        check_batch(config, self.world_size)
        self.stop = Stop()
        self.run = Run(config.folder)
        if self.rank == 0:
            self.run.lock()
        if dist.is_initialized():
            dist.barrier()
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not config.deterministic

        self.batches, self.augment = load_views(config, self.rank, self.world_size, self.device)
        self.per_epoch = self.batches.steps_per_epoch
        self.steps = config.epochs * self.per_epoch
        self.rate = learning_rate(config, self.per_epoch)
        infonce_steps = round(config.infonce_epochs * self.per_epoch)
        self.model, self.method = build_model(config, infonce_steps, self.steps)
        self.model.to(self.device)
        if (
            self.device.type == "cuda"
        ):  # where the kernels multiply in that precision all the same, and read half as much
            self.model.memory.to(PRECISIONS[config.precision] or torch.float32)
        self.losses = Losses(self.method.pairs)
        self.optimizer = build_optimizer(self.model, config)
        self.shares = [group["lr"] / (config.lr or 1.0) for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.step = 0  # optimiser steps done
        self.epoch = 0  # epochs done, their k-nearest-neighbour figure included
        log_size = self.resume()
        self.wrapped = wrap(self.model, config)

        self.neighbours = load_neighbours(config) if config.knn_epochs else []
        self.warned = False  # of a collapse
        self.clock = Clock()
        self.saved = time.monotonic()
        self.log = None
        if self.rank == 0:
            write_json(self.run.folder / "config.json", plain(config))
            self.log = Log(self.run.folder, figures_of(self.method), self.steps, self.step, log_size)
            if note := without_splits(self.model, config, self.world_size):
                self.log.note(note)

    def resume(self) -> int:
        """Go on from the run's last checkpoint, if it has one; return the size of the log at that moment."""
        state = self.run.load()
        if state is None:
            if self.config.resume_from:
                self.resume_from(self.config.resume_from)
            return 0
        check_same(recipe(state["config"]), recipe(plain(self.config)), self.run)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch = state["step"], state["epoch"]
        return int(state["log_size"])

    def resume_from(self, path: Path) -> None:
        """Go on from a checkpoint of another run, or of the reference implementation.

        Raises:
            ValueError: it does not fit the model, or its epochs have other steps.
        """
        state = cgh.checkpoint.load(path)
        steps = self.per_epoch
        if "net" in state:
            resumed = reference.resume(path, self.model, self.optimizer, self.per_epoch)
            self.step, self.epoch = resumed.step, resumed.epoch
        elif missing := {"model", "optimizer", "scaler", "step", "epoch", "steps_per_epoch"} - state.keys():
            raise ValueError(
                f"--resume-from {path} has no {', '.join(sorted(missing))}: it is no checkpoint of a run. To start a "
                "backbone with its weights, use --init."
            )
        else:
            check_match(state["model"], self.model.state_dict(), f"--resume-from {path}")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.epoch, steps = state["step"], state["epoch"], state["steps_per_epoch"]
        if steps != self.per_epoch or self.step > self.steps:
            raise ValueError(
                f"--resume-from {path} is at step {self.step}, with {steps} in an epoch; here an epoch has "
                f"{self.per_epoch} and the run {self.steps}. Give its images and --batch, and enough --epochs."
            )

    def save(self) -> None:
        """Write a checkpoint, unless what it would hold is broken."""
        self.losses.check()
        if not get_total_norm(self.model.student.parameters()).isfinite():
            raise FloatingPointError(f"after step {self.step} the student's weights are not finite. {REMEDY}")
        if self.log:
            self.run.behind.save(
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "epoch": self.epoch,
                    "step": self.step,
                    "steps_per_epoch": self.per_epoch,
                    "log_size": self.log.size(),
                    "config": plain(self.config),
                }
            )
        self.saved = time.monotonic()

    def train(self) -> bool:
        """Train to the end, or until a signal asks to stop; return whether it is the end."""
        config = self.config
        with profiler(self.run.folder) if config.profile and self.rank == 0 else contextlib.nullcontext() as profile:
            while self.epoch < config.epochs:
                start = self.step - self.epoch * self.per_epoch
                for crops, _ in self.clock.waiting(self.batches.epoch(self.epoch, start)):
                    self.train_step(crops)
                    if profile:
                        profile.step()
                    if self.stop():
                        self.save()
                        return False
                    due = time.monotonic() - self.saved >= 60 * config.checkpoint_minutes
                    if due or (config.checkpoint_steps and self.step % config.checkpoint_steps == 0):
                        self.save()
                if config.knn_epochs and (self.epoch + 1) % config.knn_epochs == 0:
                    self.save()  # what follows may take longer than the notice that a scheduler gives
                    self.write_neighbours()
                self.epoch += 1
                self.save()
        return True

    def train_step(self, crops: tuple[Tensor, ...]) -> None:
        """One step of the optimiser, the teacher and the memory."""
        for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = self.rate(self.step) * share
        seed = (self.config.seed * self.steps + self.step) * self.world_size + self.rank
        views = self.augment([view.to(self.device, non_blocking=True) for view in crops], seed)
        self.optimizer.zero_grad()
        output = joined([self.part_of_step(views, part) for part in range(self.config.accumulate)])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.losses.add(self.step, output)
        self.clock.count(self.config.batch)
        if self.step % self.config.log_steps == 0 or self.step in (1, self.steps):
            self.write_step(output)  # before the memory takes the batch in, as the losses saw it
        self.model.update(output)
        if self.log:
            self.log.advance(self.step)

    def part_of_step(self, views: Sequence[Tensor], part: int) -> cgh.CGHOutput:
        """Add the gradients of every so-and-so-many-th image, which the ranks average after the last part."""
        parts, dtype = self.config.accumulate, PRECISIONS[self.config.precision]
        early = part + 1 < parts and isinstance(self.wrapped, DistributedDataParallel)
        try:
            with self.wrapped.no_sync() if early else contextlib.nullcontext():
                with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                    output: cgh.CGHOutput = self.wrapped(*(view[part::parts] for view in views))
                self.scaler.scale(output.loss / parts).backward()
        except ValueError as error:
            raise ValueError(f"step {self.step + 1}: {error} {REMEDY}") from error
        return output

    def write_step(self, output: cgh.CGHOutput) -> None:
        """Log the losses of this step, and where the time went since the last row."""
        losses = torch.tensor(self.losses.check(), device=self.device)
        figures = {"epoch": self.step / self.per_epoch, "lr": self.optimizer.param_groups[-1]["lr"]}
        figures |= dict(zip(self.losses.names, cgh.distributed.mean(losses).tolist(), strict=True))
        if not output.weights.infonce:
            del figures["loss/infonce"]  # it is not computed any more
        if self.step % (self.config.log_steps * self.config.collapse_rows) == 0 or self.step == self.steps:
            figures |= collapse(output, self.model.memory, self.method)
            filled = self.step * self.config.batch >= self.model.memory.size and not output.weights.infonce
            signs = signs_of_collapse(figures, self.model.memory, self.method) if filled and not self.warned else None
            if self.log and signs:
                self.log.note(f"step {self.step}: {signs}")
                self.warned = True
        figures |= dict(zip(TIME, self.clock.lap(self.device), strict=True))
        if self.log:
            speed, waiting, memory = (figures[name] for name in TIME)
            show = {"loss": f"{figures['loss/total']:.3f}", "images/s": f"{speed:.0f}"}
            self.log.write(self.step, figures, show | {"waiting": f"{waiting:.0%}", "memory": f"{memory:.1f} GiB"})

    def write_neighbours(self) -> None:
        """Log how well the frozen student's features classify images of the validation set by their neighbours."""
        config, backbone = self.config, self.model.student.extractor.backbone
        if dist.is_initialized():
            for buffer in backbone.buffers():  # the statistics of one rank, those that a checkpoint has
                dist.broadcast(buffer, src=0)
        train, test = (
            cgh.evaluate.extract_features(
                backbone,
                dataset,
                batch_size=config.batch // (self.world_size * config.accumulate),
                workers=config.workers,
                device=self.device,
                autocast=PRECISIONS[config.precision],
            )
            for dataset in self.neighbours
        )
        if self.log:
            k = min(config.knn_k, len(train.features))
            top1, top5 = cgh.evaluate.knn(*train, *test, k=k)[k]
            figures = {"epoch": self.step / self.per_epoch, "knn/top1": top1, "knn/top5": top5}
            self.log.write(self.step, figures, {f"{k}-NN": f"{top1:.1f} %"})
        self.clock.restart()

    def close(self, finished: bool) -> None:
        """Wait for the last checkpoint, draw the curves, at the end, and say how the run ended."""
        self.run.behind.wait()
        if self.batches.bad_images:
            print(f"rank {self.rank} left out {self.batches.bad_images} images that cannot be decoded", flush=True)
        if self.log:
            self.log.close()
            if finished and read(self.run.folder):
                draw([self.run.folder], self.run.folder / "curves.png")
            how = "finished" if finished else "stopped; start it again with the same options, and it goes on"
            print(f"step {self.step} of {self.steps}: {how}", flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()


REMEDY = "The last checkpoint is from before, and good. Lower --lr, or use bf16 in place of fp16."


class Losses:
    """Every step's losses, kept on the device until someone looks at them, so that no step waits for the device."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._pairs = pairs
        self.names = losses_of(pairs)
        self._kept: list[tuple[int, Tensor]] = []

    def add(self, step: int, output: cgh.CGHOutput) -> None:
        terms = [output.loss, output.infonce, *(output.terms[pair] for pair in self._pairs)]
        self._kept.append((step, torch.stack(terms).detach()))

    def check(self) -> list[float]:
        """Return those of the last step, in the order of `names`, and forget the others.

        Raises:
            FloatingPointError: one is not finite, in any step since the last look.
        """
        losses: list[float] = []
        for step, values in self._kept:
            losses = values.tolist()
            broken = [f"{name} is {x}" for name, x in zip(self.names, losses, strict=True) if not math.isfinite(x)]
            if broken:
                raise FloatingPointError(f"step {step}: {', '.join(broken)}. {REMEDY}")
        self._kept = self._kept[-1:]
        return losses


def check_batch(config: Config, world_size: int) -> None:
    """Raise ValueError unless a batch divides over the ranks, its parts and the groups of batch norm."""
    if config.accumulate < 1:
        raise ValueError(f"--accumulate {config.accumulate}; it is 1, for the whole batch at once, or more.")
    if config.batch % world_size:
        raise ValueError(f"--batch {config.batch} does not divide over {world_size} ranks; make it a multiple.")
    images, pieces = config.batch // world_size, config.accumulate * config.batch_norm_splits
    if images % pieces:
        raise ValueError(
            f"--batch {config.batch} is {images} images a rank, which do not divide into --accumulate "
            f"{config.accumulate} x --batch-norm-splits {config.batch_norm_splits}; make it a multiple of "
            f"{world_size * pieces}."
        )


def without_splits(model: nn.Module, config: Config, world_size: int) -> str | None:
    """Return what one device that normalises its batch as one should be told."""
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.student.extractor.modules())
    if world_size * config.accumulate * config.batch_norm_splits > 1 or not norms:
        return None
    return (
        "one device normalises the whole batch as one, so that batch norm tells the teacher which images are together; "
        "--batch-norm-splits 8 normalises it as eight devices would."
    )


def joined(parts: Sequence[cgh.CGHOutput]) -> cgh.CGHOutput:
    """Return what one batch gave from what its parts did, image `i` of it from part `i % parts`."""
    if len(parts) == 1:
        return parts[0]

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([value.detach() for value in values]).mean(dim=0)

    def rows(embeddings: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([z[name].detach() for z in embeddings], 1).flatten(0, 1) for name in embeddings[0]}

    return cgh.CGHOutput(
        mean(part.loss for part in parts),
        mean(part.infonce for part in parts),
        {pair: mean(part.terms[pair] for part in parts) for pair in parts[0].terms},
        parts[0].weights,
        rows([part.student for part in parts]),
        rows([part.teacher for part in parts]),
    )


def losses_of(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Names of the losses that a step logs."""
    return ["loss/total", "loss/infonce", *(f"loss/{learner}_from_{guide}" for learner, guide in pairs)]


def figures_of(method: Method) -> list[str]:
    """Names of all that a run logs."""
    embeddings = [f"{who}_{context}" for who in ("student", "teacher") for context in method.contexts]
    agreement = [f"agreement/{learner}_from_{guide}" for learner, guide in method.pairs]
    collapse = [*(f"entropy/{z}" for z in embeddings), *agreement, *(f"rank/{z}" for z in embeddings)]
    return ["epoch", "lr", *losses_of(method.pairs), *collapse, *TIME, "knn/top1", "knn/top5"]


def learning_rate(config: Config, per_epoch: int) -> Callable[[int], float]:
    """Return the learning rate of a step, counted from 0, with `per_epoch` steps in an epoch."""
    base, warmup_steps = config.lr * config.batch / 256, round(config.warmup_epochs * per_epoch)
    try:
        cosine = cgh.LearningRate(base, config.epochs * per_epoch, warmup_steps)
    except ValueError as error:
        raise ValueError(
            f"--warmup-epochs {config.warmup_epochs:g} does not lie in --epochs {config.epochs}: {error}"
        ) from error

    def by_epochs(step: int) -> float:
        if step < warmup_steps:
            return cosine(step)
        epoch = step // per_epoch
        if config.schedule == "milestones":
            return base * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)
        return cosine(max(warmup_steps, epoch * per_epoch))

    return cosine if config.schedule == "cosine" else by_epochs


def build_model(config: Config, infonce_steps: int, steps: int) -> tuple[cgh.CGH, Method]:
    """Return student, teacher and memory with their losses, the same on every rank, and what learns from what.

    Layers that the configuration leaves to the architecture are put into it.
    """
    torch.manual_seed(config.seed)
    backbone = cgh.interop.build_backbone(config.arch, config.small_images, config.crop_size, config.drop_path)
    if config.init:
        trained = cgh.interop.trained_backbone(config.init, config.arch, config.small_images)
        backbone.load_state_dict(trained.state_dict())
    try:
        config.layers = config.layers or cgh.interop.default_layers(backbone)
    except ValueError as error:
        raise with_layers(error, backbone, config) from error
    method = parse(config.layers, config.pairs, config.student_temperature, config.teacher_temperature)
    momentum: float | cgh.TeacherMomentum = config.teacher_momentum
    if config.teacher_momentum_end is not None:
        momentum = cgh.TeacherMomentum(config.teacher_momentum, steps, config.teacher_momentum_end)
    if config.batch_norm_splits > 1:
        backbone = cgh.SplitBatchNorm2d.convert(backbone, config.batch_norm_splits)
    try:
        model = cgh.CGH(
            cgh.HypercolumnExtractor(backbone, method.hypercolumns, prefix_tokens=config.prefix_tokens),
            dim={
                name: config.dim if name == "global" else config.hypercolumn_dim or config.dim
                for name in method.contexts
            },
            hidden_dim=config.hidden_dim,
            memory_size=config.memory_size,
            momentum=momentum,
            student_temperature=method.student_temperature,
            teacher_temperature=method.teacher_temperature,
            infonce_temperature=config.infonce_temperature,
            pairs=method.pairs,
            warmup_steps=infonce_steps,
            centring_momentum=0.9 if config.centring else None,
            image_shape=(3, config.crop_size, config.crop_size),
            seed=config.seed,
        )
    except ValueError as error:
        if "layer" not in str(error):
            raise
        raise with_layers(error, backbone, config) from error
    return model.to(memory_format=torch.channels_last) if config.channels_last else model, method


def with_layers(error: ValueError, backbone: nn.Module, config: Config) -> ValueError:
    """Return an error about layers with the table of those that there are."""
    table = cgh.list_layers(backbone, config.crop_size, depth=LISTED_DEPTH)
    return ValueError(f"{' '.join(['--layers', *config.layers])}: {error}\n{table}")


def build_optimizer(model: cgh.CGH, config: Config) -> torch.optim.Optimizer:
    """Return an optimiser that shrinks the weights of linear layers and convolutions alone.

    Biases, norms, position embeddings, class tokens and the scales of layers keep their lengths.
    """
    if config.optimizer != "sgd" and (config.nesterov or config.reference_weight_decay):
        raise ValueError(f"--nesterov and --reference-weight-decay are of SGD, but --optimizer is {config.optimizer}.")
    if config.layer_decay != 1 and config.reference_weight_decay:
        raise ValueError(
            f"--layer-decay {config.layer_decay:g} and --reference-weight-decay: the reference has two groups of "
            "parameters alone; leave one of them out."
        )
    groups = cgh.parameter_groups(model.student, config.lr, config.weight_decay, config.layer_decay)
    # One launch, and no wait for the device where fp16 scales the loss.
    fused = True if groups[0]["params"][0].is_cuda else None
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=fused)
    if config.optimizer == "lars":  # timm's leaves what does not decay to plain SGD, as LARS's authors do
        lars: torch.optim.Optimizer = require("timm.optim", extra="timm").Lars(
            groups, lr=config.lr, momentum=config.momentum
        )
        return lars
    if config.reference_weight_decay:
        groups = reference.parameter_groups(model, config.weight_decay)
    sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    if fused and config.momentum:
        # Where a first step in fp16 overflows, it is left out, and the next would find momentum that nobody wrote.
        for group in sgd.param_groups:
            for x in group["params"]:
                sgd.state[x]["momentum_buffer"] = torch.zeros_like(x)
    return sgd


def wrap(model: cgh.CGH, config: Config) -> nn.Module:
    """Return what is called in a step: compiled if asked for, and with gradients averaged over ranks."""
    if config.compile:
        model.student.compile(dynamic=False)  # each side of multi-crop's views by itself
        model.teacher.encoder.compile(dynamic=False)
    # Batch norm keeps statistics of each rank's own.
    return distribute(model, gradient_as_bucket_view=True)


def load_views(config: Config, rank: int, world_size: int, device: torch.device) -> tuple[Batches, views.Augmentation]:
    """Return the crops that this rank's workers make, and what makes views of them on the device."""
    crops: Any = views.Crops(config.crop_size)
    if config.multi_crop:
        sizes = [size * config.crop_size // 224 for size in views.MULTI_CROP["local_sizes"]]
        crops = views.Crops(config.crop_size, local_sizes=sizes, local_scales=views.MULTI_CROP["local_scales"])
    in_workers = device.type == "cpu"
    if in_workers:
        crops = T.Compose([crops, views.Colour(blur=config.blur, weak=not config.both_strong)])
    batch = config.batch // world_size
    batches = Batches(config.data, crops, batch, config.seed, rank, world_size, config.workers)
    augment = views.Augmentation(
        colour=not in_workers,
        blur=config.blur,
        weak=not config.both_strong,
        dtype=PRECISIONS[config.precision] or torch.float32,
        memory_format=torch.channels_last if config.channels_last else torch.contiguous_format,
    )
    return batches, augment.to(device)


def load_images(config: Config, split: Literal["train", "val"]) -> Dataset[tuple[Tensor, int]]:
    """Return images of a split as they are evaluated, evenly chosen where there are more than asked for."""
    resize = config.crop_size if config.small_images else config.crop_size * 256 // 224
    crop = [T.Resize(resize, T.InterpolationMode.BICUBIC), T.CenterCrop(config.crop_size)]  # as knn.py does
    dataset = labelled(images(config.data, split, T.Compose([*crop, normalise()])))
    return Subset(dataset, range(0, len(dataset), -(-len(dataset) // config.knn_images)))


def load_neighbours(config: Config) -> list[Dataset[tuple[Tensor, int]]]:
    """Return training and validation images, as they are evaluated during the run."""
    try:
        return [load_images(config, split) for split in ("train", "val")]
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"{error} The accuracy by nearest neighbours takes images with labels, in train and val: --knn-epochs 0 "
            "pre-trains without it."
        ) from error


@torch.no_grad()
def collapse(output: cgh.CGHOutput, memory: cgh.MemoryBank, method: Method) -> dict[str, float]:
    """Return figures that show a collapse: of 64 images' relations, and of the embeddings of the batch of all ranks.

    Entropy is in nats: 0 where an image relates to one row of the memory, the logarithm of its size where it relates to
    all alike. Agreement is the share of images whose nearest row is the same for learner and guide. The rank is
    RankMe's, at most the batch and the width of an embedding.
    """
    figures: dict[str, Tensor] = {}
    relations = {}
    for who, embeddings, temperatures in (
        ("student", output.student, method.student_temperature),
        ("teacher", output.teacher, method.teacher_temperature),
    ):
        for context in method.contexts:
            z = embeddings[context].detach()
            relation = cgh.RelationMatrix(temperatures[context])(z[:64], memory[context])
            relations[who, context] = relation
            figures[f"entropy/{who}_{context}"] = diagnostics.relation_entropy(relation)
            figures[f"rank/{who}_{context}"] = diagnostics.effective_rank(cgh.distributed.gather(z))
    for learner, guide in method.pairs:
        agreement = diagnostics.top_neighbour_agreement(relations["student", learner], relations["teacher", guide])
        figures[f"agreement/{learner}_from_{guide}"] = agreement
    return {name: value.item() for name, value in figures.items()}


def signs_of_collapse(figures: Mapping[str, float], memory: cgh.MemoryBank, method: Method) -> str | None:
    """Return what tells of a collapse, once the memory is full of embeddings and InfoNCE has gone.

    Unit vectors that say nothing, but point every way in D dimensions, have similarities of variance 1 / D, and so
    relations about 1 / (2 D temperature^2) nats below the logarithm of the memory's size. Relations nearer to it than
    half of that, and than 1 % of it, come from embeddings that point one way, and so does an effective rank below 2.
    """
    signs = []
    for who, temperatures in (("student", method.student_temperature), ("teacher", method.teacher_temperature)):
        for context in method.contexts:
            size, dim = memory[context].shape
            entropy, most = figures[f"entropy/{who}_{context}"], math.log(size)
            if most - entropy < min(1 / (4 * dim * temperatures[context] ** 2), most / 100):
                signs.append(f"entropy/{who}_{context} is {entropy:.4g} of at most {most:.4g}")
            if (rank := figures[f"rank/{who}_{context}"]) < 2:
                signs.append(f"rank/{who}_{context} is {rank:.3g}")
    if not signs:
        return None
    return (
        f"the embeddings seem to collapse, every image related to all others alike: {', '.join(signs)}. Look at "
        "entropy, rank and knn/top1 over the run (plot.py). The usual causes are a learning rate that is too high, a "
        "warm-up by InfoNCE that is too short, and one device without --batch-norm-splits."
    )


def profiler(folder: Path) -> torch.profiler.profile:
    """Return a profiler that writes `trace.json.gz` of five steps, once the run is warm."""
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=5, warmup=2, active=5, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(folder / "trace.json.gz")),
    )


def recipe(configuration: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that decides the weights; the data may have moved."""
    data = {name: value for name, value in configuration["data"].items() if name != "root"}
    # What a checkpoint of before an option existed was trained with is the option's default.
    defaults = {field.name: field.default for field in fields(Recipe)}
    known = {name: configuration.get(name, default) for name, default in defaults.items()}
    return json.loads(json.dumps(known | {"data": data}))


@dataclass
class Chosen:
    """The recipe alone, which decides the defaults of all other options."""

    recipe: Literal["imagenet", "cifar", "small"] = "imagenet"


def parse_arguments(args: Sequence[str] | None = None) -> Config:
    """Return what the command line says, by the defaults of the recipe that it names."""
    chosen, _ = read_arguments(Chosen, args, return_unknown_args=True, add_help=False)
    default = Config(
        folder=tyro.MISSING,
        data=DataConfig(root=tyro.MISSING),
        recipe=chosen.recipe,
        **RECIPES[chosen.recipe],
    )
    config = read_arguments(Config, args, default=default)
    short = min(5.0, config.epochs / 2)  # the paper's, or what leaves a short trial something to train on
    config.warmup_epochs = short if config.warmup_epochs is None else config.warmup_epochs
    config.infonce_epochs = short if config.infonce_epochs is None else config.infonce_epochs
    return config


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    training = Pretraining(parse_arguments(args))
    try:
        finished = training.train()
    except BaseException:
        if training.log:
            training.log.close()
        raise
    training.close(finished)


if __name__ == "__main__":
    command(main)
