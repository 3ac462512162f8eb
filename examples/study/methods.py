"""The methods that the study compares: one learner, of which each is a configuration."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations, product

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import cgh
from cgh import diagnostics
from cgh.schedules import Weights

TWO = {"hypercolumn": ("layer3", "layer4")}
TARGETS = ("entropy global", "entropy hypercolumn", "agreement")
"""What `Learner.targets` tells of a method with a global context and one hypercolumn."""
THREE = {"shallow": ("layer1", "layer2"), "deep": ("layer3", "layer4")}


@dataclass(frozen=True)
class Method:
    """What is learned from what."""

    title: str
    contexts: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...] = ()
    """(learner, guide) of the relations; none is InfoNCE from the first step to the last."""
    hypercolumns: Mapping[str, Sequence[str]] = field(default_factory=TWO.copy)


METHODS = {
    "infonce-global": Method("InfoNCE, global (MoCo)", ("global",)),
    "infonce": Method("InfoNCE, both contexts", ("global", "hypercolumn")),
    "ressl": Method("relations, global from global (ReSSL)", ("global",), (("global", "global"),)),
    "within": Method(
        "relations, each context from itself",
        ("global", "hypercolumn"),
        (("global", "global"), ("hypercolumn", "hypercolumn")),
    ),
    "across": Method(
        "relations across (CGH)", ("global", "hypercolumn"), tuple(permutations(("global", "hypercolumn"), 2))
    ),
    "both": Method(
        "relations, each context from both",
        ("global", "hypercolumn"),
        tuple(product(("global", "hypercolumn"), repeat=2)),
    ),
    "three": Method(
        "across, three contexts",
        ("global", "shallow", "deep"),
        tuple(permutations(("global", "shallow", "deep"), 2)),
        THREE,
    ),
}


@dataclass(frozen=True)
class Settings:
    """What is searched for on held-out training images; the paper's temperatures, and what is usual for CIFAR else."""

    learning_rate: float = 0.06
    """For a batch of 256; in proportion for others."""
    momentum: float = 0.99
    """The teacher's."""
    memory_size: int = 4096
    warmup: float = 0.025
    """Share of the steps over which InfoNCE fades out."""
    infonce_temperature: float = 0.2
    student_global: float = 0.10
    student_hypercolumn: float = 0.08
    """Of every context but the global one; likewise the teacher's."""
    teacher_global: float = 0.04
    teacher_hypercolumn: float = 0.08
    momentum_end: float | None = None
    """Where the teacher's momentum rises to, in a cosine over the steps; without, it stays."""
    layers: tuple[str, ...] = TWO["hypercolumn"]
    """Of the hypercolumn, in methods that have one."""
    hidden: int = 512
    """Width inside the heads."""
    symmetric: bool = False
    """Each view is once the student's and once the teacher's, for twice the cost."""


class Learner(nn.Module):
    """Student, teacher, memory and losses of a method.

    Args:
        method: what is learned from what.
        settings: temperatures and the like.
        steps: of the whole training.
        backbone: with the layers that the method's hypercolumns name.
        image_shape: of the views, `(C, S, S)`.
        dim: of the embeddings.
        seed: of the memory's start. The weights of the heads draw from torch's global generator.

    Shape:
        strong and weak views `(N, C, S, S)` and the losses' `weights` -> the loss and the teacher's embeddings; call
        `update` with these after the optimiser's step.
    """

    def __init__(
        self,
        method: Method,
        settings: Settings,
        steps: int,
        backbone: nn.Module,
        image_shape: tuple[int, int, int],
        dim: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.contexts, self.symmetric = method.contexts, settings.symmetric
        hypercolumns = {"hypercolumn": settings.layers} if method.hypercolumns == TWO else method.hypercolumns
        # A method of one context has the other's head too, unused, so that all start from the same weights.
        self.student = cgh.ContextEncoder(
            cgh.HypercolumnExtractor(backbone, hypercolumns), dim, settings.hidden, image_shape=image_shape
        )
        self.teacher = cgh.EMATeacher(self.student, momentum(settings, steps))
        self.memory = cgh.MemoryBank(dict.fromkeys(method.contexts, dim), settings.memory_size, seed=seed)
        self.infonce = cgh.InfoNCELoss(settings.infonce_temperature)
        self.student_temperature, self.teacher_temperature = (
            dict.fromkeys(method.contexts, hypercolumn) | {"global": of_global}
            for of_global, hypercolumn in (
                (settings.student_global, settings.student_hypercolumn),
                (settings.teacher_global, settings.teacher_hypercolumn),
            )
        )
        self.relations = None
        if method.pairs:
            self.relations = cgh.CrossContextLoss(self.student_temperature, self.teacher_temperature, method.pairs)
        self.weights = cgh.LossWeights(round(settings.warmup * steps))

    def forward(self, strong: Tensor, weak: Tensor, weights: Weights) -> tuple[Tensor, dict[str, Tensor]]:
        loss, teacher = self._loss(strong, weak, weights)
        if self.symmetric:
            loss = (loss + self._loss(weak, strong, weights)[0]) / 2
        return loss, teacher

    def _loss(self, first: Tensor, second: Tensor, weights: Weights) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss on the first view, by what the teacher makes of the second."""
        student = self.student(first, contexts=self.contexts)
        teacher = self.teacher(second, contexts=self.contexts)
        if self.relations is None:
            return self.infonce(student, teacher, self.memory), teacher
        loss = 2 * weights.relation * self.relations(student, teacher, self.memory)
        if isinstance(weights.infonce, Tensor) or weights.infonce:  # to look into a tensor would wait for the device
            loss = loss + weights.infonce * self.infonce(student, teacher, self.memory)
        return loss, teacher

    @torch.no_grad()
    def targets(self, weak: Tensor) -> dict[str, float]:
        """Return what the teacher's relations are like on a batch: their entropy in nats, and how far they agree.

        The agreement is the share of images whose nearest row of the memory is the same in both contexts.
        """
        teacher = self.teacher(weak, contexts=self.contexts)
        relations = {
            name: cgh.RelationMatrix(self.teacher_temperature[name])(teacher[name], self.memory[name])
            for name in self.contexts
        }
        figures = {f"entropy {name}": diagnostics.relation_entropy(p).item() for name, p in relations.items()}
        if "hypercolumn" in relations:
            agreement = diagnostics.top_neighbour_agreement(relations["global"], relations["hypercolumn"])
            figures["agreement"] = agreement.item()
        return figures

    def update(self, teacher: Mapping[str, Tensor]) -> None:
        """Move the teacher and fill the memory."""
        self.teacher.update(self.student)
        self.memory.enqueue(teacher)

    def optimizer(self, weight_decay: float) -> torch.optim.SGD:
        """SGD with momentum 0.9; the weights of linear layers and convolutions decay, and nothing else."""
        groups = cgh.parameter_groups(self.student, 0.0, weight_decay)
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)


def momentum(settings: Settings, steps: int) -> float | Callable[[int], float]:
    """Return the teacher's momentum: a number, or where it rises, a function from the updates made to it."""
    start, end = settings.momentum, settings.momentum_end
    if end is None:
        return start
    return lambda step: end - (end - start) * (1 + math.cos(math.pi * min(1.0, step / max(1, steps)))) / 2


def resnet18(width: int = 64) -> nn.Module:
    """ResNet-18 for small images: a 3x3 stem and no pooling after it, `width` channels in the first stage.

    Shape:
        images `(N, 3, S, S)` -> features `(N, 8 * width)`.
    """

    def stage(before: int, channels: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride > 1 or before != channels:
            shortcut = nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        return nn.Sequential(BasicBlock(before, channels, stride, shortcut), BasicBlock(channels, channels))

    network = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, width, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(width),
            relu=nn.ReLU(inplace=True),
            layer1=stage(width, width, 1),
            layer2=stage(width, 2 * width, 2),
            layer3=stage(2 * width, 4 * width, 2),
            layer4=stage(4 * width, 8 * width, 2),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
        )
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
