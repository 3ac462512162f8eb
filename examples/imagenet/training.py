"""Training a classifier on labelled images, an epoch between checkpoints: what linear.py and semisup.py share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from evaluation import Evaluation, batch_per_rank, normalise, plain, weights_digest
from log import Log
from run import PRECISIONS, Run, check_same, distribute, write_json
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import cgh
from cgh.evaluate import Classifier, accuracy, extract_features

FIGURES = ("epoch", "lr", "loss", "top1", "top5")


@dataclass(kw_only=True)
class Training(Evaluation):
    """What an evaluation that trains is told beside."""

    folder: Path
    """The run's folder, for all that it writes; started again with the same options, it goes on from there."""
    weights: Path = field()
    """A checkpoint of pretrain.py or of the reference implementation, or torchvision's or timm's weights."""
    epochs: int
    """Passes over the images."""
    validation_epochs: int = 1
    """Between validations, beside the one at the end; 0 for that one alone."""
    seed: int = 0
    """Of the new layer, the order of the images and their crops."""


class RandomCrops(Dataset[tuple[Tensor, int]]):
    """Random resized crops and flips of a data set; seed, epoch and index alone decide them, whoever loads them."""

    def __init__(self, dataset: Dataset[tuple[Tensor, int]], size: int, seed: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, 0
        crop = T.RandomResizedCrop(size, antialias=True)
        self.transform = T.Compose([crop, T.RandomHorizontalFlip(), normalise()])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        (seed,) = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)
        torch.default_generator.manual_seed(int(seed))
        return self.transform(image), label


def train_classifier(
    config: Training,
    model: Classifier,
    learnt: nn.Module,
    recipe: Callable[[int], tuple[Optimizer, LRScheduler]],
    train: Dataset[tuple[Tensor, int]],
    val: Dataset[tuple[Tensor, int]],
    device: torch.device,
) -> dict[str, float]:
    """Train for the epochs that are left; return on rank 0 the last validation and the best, in percent.

    The best of many looks at the validation set is optimistic: the last is the figure to compare.

    Args:
        config: what to do.
        model: the classifier, on the device.
        learnt: the part of it that learns, which checkpoints hold.
        recipe: steps in an epoch -> optimiser, and schedule to be stepped after every batch.
        train: decoded images and their classes.
        val: images as they are evaluated, and their classes.
        device: where the model is.
    """
    rank, world_size = cgh.distributed.rank_and_world_size()
    torch.backends.cudnn.deterministic = True  # a run that is resumed has the bits of one that never stopped
    crops = RandomCrops(train, config.crop_size, config.seed)
    sampler: DistributedSampler[Any] = DistributedSampler(crops, world_size, rank, seed=config.seed)
    batches = DataLoader(
        crops, batch_per_rank(config), sampler=sampler, num_workers=config.workers, pin_memory=device.type == "cuda"
    )
    optimizer, schedule = recipe(len(batches))
    precision = PRECISIONS[config.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    run = Run(config.folder)
    if rank == 0:
        run.lock()
    state = run.load()
    if state:
        # What a checkpoint of before an option existed was trained with is the option's default.
        defaults = json.loads(json.dumps({f.name: f.default for f in fields(config)}, default=str))
        check_same(defaults | state["config"], recipe_of(config), run)
        learnt.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        scaler.load_state_dict(state["scaler"])
    start, log_size, results = (state["epoch"], state["log_size"], state["results"]) if state else (0, 0, {})
    log = None
    if rank == 0:
        write_json(config.folder / "config.json", plain(config))
        steps = config.epochs * len(batches)
        log = Log(config.folder, FIGURES, steps, start * len(batches), log_size, task=config.folder.name)
    parallel = distribute(model)

    for epoch in range(start, config.epochs):
        model.train()
        crops.epoch = epoch
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        rates = schedule.get_last_lr()
        for step, (images, labels) in enumerate(batches, epoch * len(batches) + 1):
            with torch.autocast(device.type, precision, enabled=precision is not None):
                logits = parallel(images.to(device, non_blocking=True))
                loss = F.cross_entropy(logits, labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            total += loss.detach()
            if log:
                log.advance(step)
        loss = cgh.distributed.mean(total / len(batches)).item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"epoch {epoch + 1}: the loss is {loss}. The last checkpoint is from before it, and good; lower the "
                "learning rate, or use bf16 in place of fp16."
            )
        if dist.is_initialized():
            for buffer in learnt.buffers():  # batch norms that are not synchronised: rank 0's, which a checkpoint has
                dist.broadcast(buffer, src=0)
        figures = {"epoch": epoch + 1, "lr": rates[-1], "loss": loss}
        due = config.validation_epochs and (epoch + 1) % config.validation_epochs == 0
        if due or epoch + 1 == config.epochs:
            outputs = extract_features(model, val, batch_per_rank(config), config.workers, device, precision)
            if rank == 0:
                top1, top5 = accuracy(*outputs)
                results |= {"top1": top1, "top5": top5, "epoch": epoch + 1}
                if top1 > results.get("best_top1", -1.0):
                    results |= {"best_top1": top1, "best_epoch": epoch + 1}
                figures |= {"top1": top1, "top5": top5}
        if log:
            log.write(epoch * len(batches) + len(batches), figures, {k: f"{x:.4g}" for k, x in figures.items()})
            run.save(
                {
                    "model": learnt.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "scaler": scaler.state_dict(),
                    "epoch": epoch + 1,
                    "step": (epoch + 1) * len(batches),
                    "log_size": log.size(),
                    "results": results,
                    "config": recipe_of(config),
                }
            )
    if log:
        log.close()
    return results


def recipe_of(config: Training) -> dict[str, Any]:
    """Return the part of the configuration that decides what is learnt; the data may have moved."""
    recipe = plain(config) | {"weights": weights_digest(config)}
    recipe["data"] = {name: recipe["data"][name] for name in ("dataset", "subset", "skip_bad_images")}
    return {name: value for name, value in recipe.items() if name not in ("folder", "device", "workers")}
