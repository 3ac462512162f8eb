"""Fine-tune a ResNet as torchvision's Faster R-CNN; the defaults are the paper's protocol for VOC 07+12.

python examples/detection/finetune_torchvision.py --folder runs/voc --weights runs/imagenet/checkpoint.pt \
    --train VOC2007:trainval VOC2012:trainval --test VOC2007:test
torchrun --nproc-per-node 8 examples/detection/finetune_torchvision.py --folder runs/coco ...
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import detectors
import torch
import torch.distributed as dist
import torchvision.transforms.v2 as T
from datasets import Annotations, Detections, read
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler, Subset
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN

import cgh
from cgh import plot
from cgh.distributed import rank_and_world_size

sys.path.append(str(Path(__file__).parents[1] / "imagenet"))  # whose runs are kept and logged in the same way
from command import command, read_arguments
from log import Log
from run import Run, Stop, check_same, join, leave_signals_to_the_run, mixed_seed, write_json

LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
AVERAGES = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}  # COCO's, and their names in torchmetrics

Item = tuple[Tensor, dict[str, Any]]


@dataclass(kw_only=True)
class Recipe:
    """What decides the weights; a run goes on only with what it was started with."""

    train: tuple[str, ...]
    """What to train on: ROOT:SPLIT in VOC layout or IMAGES:FILE.json in COCO's, several joined."""
    classes: tuple[str, ...] | None = None
    """Their names; by default those found in the training data."""
    skip_bad_boxes: bool = False
    """Leave out and count the boxes that are outside their image or have no area."""
    weights: Path | None = None
    """A checkpoint of pretrain.py or of the reference implementation, or torchvision's weights (.pth, .safetensors)."""
    arch: str | None = None
    """torchvision's name of the ResNet; by default what the weights say or show, and resnet50 without any."""
    backbone: Literal["pretrained", "frozen", "scratch"] = "pretrained"
    """Learn on from the weights, keep them as they are, or start the same ResNet from scratch."""
    detector: Literal["c4", "fpn"] = "c4"
    """Layer3 proposes and layer4 is the head of each box, or a feature pyramid."""
    fpn_stages: tuple[detectors.Stage, ...] = detectors.STAGES
    """What the pyramid stands on; without layer1 it is much faster, and blinder to small objects."""
    fpn_channels: int = 256
    """Of each level of the pyramid."""
    steps: int = 24_000
    """Of the optimiser."""
    batch: int = 16
    """Images in a step, over all ranks."""
    lr: float = 0.02
    """Learning rate for a batch of 16; it is scaled by batch / 16."""
    warmup_steps: int = 100
    """In which the learning rate rises from 0."""
    decay_steps: tuple[int, ...] | None = None
    """After which it falls to a tenth; by default 3/4 and 11/12 of all."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """Of all weights."""
    sizes: tuple[int, ...] = tuple(range(480, 801, 32))
    """Shorter sides in pixels, one drawn for each image; the last is used in evaluation."""
    max_size: int = 1333
    """Longest side in pixels."""
    boxes_per_image: int = 512
    """Proposals of each image that the head learns from in a step."""
    proposals: int = 1000
    """Of each image that the head looks at in evaluation."""
    seed: int = 0
    """Of the fresh weights, the order of the images and every draw."""


@dataclass(kw_only=True)
class Config(Recipe):
    """Fine-tune a ResNet as torchvision's Faster R-CNN; the defaults are the paper's protocol for VOC 07+12."""

    folder: Path
    """The run's folder, for all that it writes; started again with the same options, it goes on from there."""
    test: tuple[str, ...]
    """What to evaluate on, written as --train."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute; auto is a GPU where there is one."""
    workers: int = 4
    """Processes that load images, on each rank."""
    checkpoint_steps: int = 500
    """Between checkpoints."""
    log_steps: int = 20
    """Between rows of the log."""
    evaluate_steps: int | None = None
    """Between evaluations; by default there is one, at the end."""
    pictures: int = 8
    """Images of the test set to draw at the end, with what was found over what is there."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "boxes_per_image", "checkpoint_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it is 1 or more.")
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"--sizes is {self.sizes}; give the shorter side of the images in pixels, one or several.")
        if self.weights is None and self.backbone != "scratch":
            raise ValueError(f"--backbone {self.backbone} needs --weights; --backbone scratch needs none.")


class Batches(Sampler[list[int]]):
    """This rank's batches from a step on: each depends on the seed and the step alone, so a run goes on exactly."""

    def __init__(self, images: int, config: Recipe, start: int) -> None:
        self.images, self.config, self.start = images, config, start

    def __iter__(self) -> Iterator[list[int]]:
        rank, world_size = rank_and_world_size()
        batch = self.config.batch
        for step in range(self.start, self.config.steps):
            yield [self._image(position) for position in range(step * batch + rank, (step + 1) * batch, world_size)]

    def _image(self, position: int) -> int:
        epoch, place = divmod(position, self.images)
        return int(_order(self.images, self.config.seed, epoch)[place])


@functools.lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def _order(images: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(images, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch, 0)))


def learning_rate(config: Recipe, step: int) -> float:
    """Return the learning rate of a step, counted from 0: a linear rise, then a fall to a tenth at each decay."""
    decays = (config.steps * 3 // 4, config.steps * 11 // 12) if config.decay_steps is None else config.decay_steps
    rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return config.lr * config.batch / 16 * rise * 0.1 ** sum(step >= decay for decay in decays)


def build_model(config: Recipe, num_classes: int) -> FasterRCNN:
    """Return the detector as training starts with it.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: they are no ResNet's, or there are no such stages.
    """
    torch.manual_seed(config.seed)
    if config.weights is None:
        backbone = cgh.interop.resnet(config.arch or "resnet50")
    else:
        backbone = cgh.interop.trained_backbone(config.weights, config.arch)
    resnet = detectors.prepare(backbone, config.backbone)
    options: dict[str, Any] = {
        "min_size": config.sizes,
        "max_size": config.max_size,
        "box_batch_size_per_image": config.boxes_per_image,
        "rpn_post_nms_top_n_test": config.proposals,
    }
    if config.detector == "c4":
        return detectors.c4(resnet, num_classes, **options)
    return detectors.fpn(resnet, num_classes, config.fpn_stages, config.fpn_channels, **options)


flip = T.RandomHorizontalFlip()


def losses_of(model: nn.Module, batch: list[Item], device: torch.device) -> dict[str, Tensor]:
    """Return the four losses of a batch; boxes around crowds are not learned from."""
    images, targets = [], []
    for image, target in itertools.starmap(flip, batch):
        alone = ~target["crowd"]
        images.append(as_input(image, device))
        boxes = target["boxes"].as_subclass(Tensor)
        targets.append({"boxes": boxes[alone].to(device), "labels": target["labels"][alone].to(device)})
    losses: dict[str, Tensor] = model(images, targets)
    return losses


def as_input(image: Tensor, device: torch.device) -> Tensor:
    """Return a uint8 image as the detectors take it, 0 to 1, on their device."""
    return image.as_subclass(Tensor).to(device).float() / 255


def detect(model: FasterRCNN, image: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Return the boxes `(n, 4)`, labels `(n,)` from 1 on and scores `(n,)` found in a uint8 image, on the CPU."""
    [found] = model([as_input(image, device)])
    return {name: x.cpu() for name, x in found.items()}


@torch.no_grad()
def evaluate(model: FasterRCNN, test: Annotations, device: torch.device, workers: int) -> dict[str, float]:
    """Return COCO's averages in percent, over the classes and of each; crowds and difficult boxes count neither way."""
    rank, world_size = rank_and_world_size()
    mine = Subset(Detections(test), range(rank, len(test.records), world_size))
    loader = DataLoader(mine, num_workers=workers, collate_fn=list, worker_init_fn=leave_signals_to_the_run)
    model.eval()
    pairs = []
    for [(image, target)] in loader:
        ignored = (target["crowd"] | target["difficult"]).long()
        truth = {"boxes": target["boxes"].as_subclass(Tensor), "labels": target["labels"], "iscrowd": ignored}
        pairs.append((detect(model, image, device), truth))
    model.train()
    if world_size > 1:
        shares: list[Any] = [None] * world_size
        dist.all_gather_object(shares, pairs)
        pairs = [shares[index % world_size][index // world_size] for index in range(len(test.records))]
    metric = MeanAveragePrecision(backend="pycocotools", class_metrics=True, sync_on_compute=False)
    metric.update(*map(list, zip(*pairs, strict=True)))
    result = metric.compute()
    averages = {name: _percent(float(result[key])) for name, key in AVERAGES.items()}
    labels, of_class = (result[key].reshape(-1).tolist() for key in ("classes", "map_per_class"))
    names = (f"AP/{test.classes[label - 1]}" for label in labels)
    return averages | dict(zip(names, map(_percent, of_class), strict=True))


def _percent(ap: float) -> float:
    """An average precision; -1 is that of nothing to be found, as of a class that the test set lacks."""
    return 100 * ap if ap >= 0 else math.nan


@torch.no_grad()
def draw(model: FasterRCNN, test: Annotations, device: torch.device, folder: Path, count: int) -> None:
    """Write pictures of the first `count` images, with what was found over what is there."""
    model.eval()
    for index, (truth, (image, _)) in enumerate(zip(test.records[:count], Detections(test), strict=False)):
        found = detect(model, image, device)
        seen = (found["boxes"], found["labels"] - 1, found["scores"])
        picture = plot.detections(image.as_subclass(Tensor), seen, (truth.boxes, truth.labels), test.classes)
        plot.save(picture, folder / f"{index:03}-{truth.image.stem}.png")


def finetune(config: Config) -> dict[str, float]:
    """Train to the end, or until a signal asks to stop, and return the last evaluation.

    Raises:
        FileNotFoundError: of what `read` and `build_model` say.
        ValueError: likewise; no GPU where one is asked for; a batch that does not divide over the ranks; a folder that
            holds another run; a loss that is not a number.
    """
    device = join(config.device)
    rank, world_size = rank_and_world_size()
    if config.batch % world_size:
        raise ValueError(f"--batch {config.batch} is not divisible over {world_size} ranks; choose a multiple of it.")
    run, stop = Run(config.folder), Stop()
    if rank == 0:
        run.lock()
    if dist.is_initialized():
        dist.barrier()

    train = read(config.train, config.classes, config.skip_bad_boxes)
    test = read(config.test, train.classes, config.skip_bad_boxes)
    model = build_model(config, len(train.classes))
    synchronised = world_size > 1 and device.type == "cuda"
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device).train()
    optimizer = torch.optim.SGD(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=0.0,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    effective = as_plain(config) | {"classes": train.classes, "world_size": world_size}
    step, log_size = 0, 0
    if (state := run.load()) is not None:
        check_same(state["config"], {field.name: effective[field.name] for field in fields(Recipe)}, run)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, log_size = state["step"], state["log_size"]
    wrapped = DistributedDataParallel(model, [device] if device.type == "cuda" else None) if world_size > 1 else model

    log = None
    if rank == 0:
        norms = "synchronised over the ranks" if synchronised else "plain (synchronised ones need several GPUs)"
        print(f"training on {train}\nevaluating on {test}\n{world_size} x {device.type}, batch norms are {norms}")
        write_json(run.folder / "config.json", effective)
        figures = ["lr", "loss", *LOSSES, *AVERAGES, *(f"AP/{name}" for name in train.classes)]
        log = Log(run.folder, figures, config.steps, step, log_size, task="fine-tuning")

    def measure() -> dict[str, float]:
        if world_size > 1:
            for buffer in model.buffers():  # plain norms have statistics of their own on each rank
                dist.broadcast(buffer, 0)
        result = evaluate(model, test, device, config.workers)
        if log is not None:
            log.write(step, result, {name: f"{result[name]:.1f}" for name in AVERAGES})
        return result

    loader = DataLoader(
        Detections(train),
        batch_sampler=Batches(len(train.records), config, step),
        num_workers=config.workers,
        collate_fn=list,
        worker_init_fn=leave_signals_to_the_run,
    )
    for batch in loader:
        torch.manual_seed(mixed_seed(config.seed, step * world_size + rank, 1))  # flips, sizes and choices of proposals
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = losses_of(wrapped, batch, device)
        loss = torch.stack([losses[name] for name in LOSSES]).sum()
        if not loss.isfinite():
            raise ValueError(
                f"the loss of step {step} is {loss.item()}; start anew with a lower --lr than {config.lr}."
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        stopped = stop()
        if log is not None:
            log.advance(step)
            if step % config.log_steps == 0 or step == config.steps:
                row = {"lr": rate, "loss": loss.item()} | {name: losses[name].item() for name in LOSSES}
                log.write(step, row, {"loss": f"{row['loss']:.3f}"})
        if config.evaluate_steps and step % config.evaluate_steps == 0 and step < config.steps:
            measure()
        if log is not None and (step % config.checkpoint_steps == 0 or step == config.steps or stopped):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            run.save(state | {"step": step, "log_size": log.size(), "config": effective})
        if stopped:
            break
    result = {}
    if step == config.steps:
        result = measure()
        if rank == 0:
            draw(model, test, device, run.folder / "pictures", config.pictures)
    if log is not None:
        log.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def as_plain(config: Config) -> dict[str, Any]:
    """Return the configuration as JSON knows it."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return plain


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    finetune(read_arguments(Config, args))


if __name__ == "__main__":
    command(main)
