"""The methods that the study compares: one learner, of which each is a configuration."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import cgh

TWO = {"hypercolumn": ("layer3", "layer4")}
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


class Learner(nn.Module):
    """Student, teacher, memory and losses of a method.

    Args:
        method: what is learned from what.
        settings: temperatures and the like.
        steps: of the whole training.
        size: side of the views in pixels.
        width: channels of the network's first stage.
        dim: of the embeddings.
        hidden: width inside the heads.
        seed: of the memory's start. The weights draw from torch's global generator.

    Shape:
        strong and weak views `(N, 3, S, S)` -> the loss and the teacher's embeddings; call `update` with these after
        the optimiser's step.
    """

    def __init__(
        self, method: Method, settings: Settings, steps: int, size: int, width: int, dim: int, hidden: int, seed: int
    ) -> None:
        super().__init__()
        self.contexts = method.contexts
        features = cgh.HypercolumnExtractor(resnet18(width), method.hypercolumns)
        # A method of one context has the other's head too, unused, so that all start from the same weights.
        self.student = cgh.ContextEncoder(features, dim, hidden, image_shape=(3, size, size))
        self.teacher = cgh.EMATeacher(self.student, settings.momentum)
        self.memory = cgh.MemoryBank(dict.fromkeys(method.contexts, dim), settings.memory_size, seed=seed)
        self.infonce = cgh.InfoNCELoss(settings.infonce_temperature)
        self.relations = None
        if method.pairs:
            student = dict.fromkeys(method.contexts, settings.student_hypercolumn)
            teacher = dict.fromkeys(method.contexts, settings.teacher_hypercolumn)
            self.relations = cgh.CrossContextLoss(
                student | {"global": settings.student_global},
                teacher | {"global": settings.teacher_global},
                method.pairs,
            )
        self.weights = cgh.LossWeights(round(settings.warmup * steps))

    def forward(self, strong: Tensor, weak: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        student = self.student(strong, contexts=self.contexts)
        teacher = self.teacher(weak, contexts=self.contexts)
        if self.relations is None:
            return self.infonce(student, teacher, self.memory), teacher
        weights = self.weights(step)
        loss = 2 * weights.relation * self.relations(student, teacher, self.memory)
        if weights.infonce:
            loss = loss + weights.infonce * self.infonce(student, teacher, self.memory)
        return loss, teacher

    def update(self, teacher: Mapping[str, Tensor]) -> None:
        """Move the teacher and fill the memory."""
        self.teacher.update(self.student)
        self.memory.enqueue(teacher)

    def optimizer(self, weight_decay: float) -> torch.optim.SGD:
        """SGD with momentum 0.9; norms and biases do not decay."""
        parameters = list(self.student.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


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
