"""Schedules: the learning rate and the weights of the loss terms, both at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from 0 to `base`, then a cosine to 0.

    Args:
        base: the highest learning rate; the paper's is 0.05 x batch / 256.
        steps: optimiser steps in all.
        warmup_steps: steps of warm-up, the paper's 5 epochs' worth.

    Raises:
        ValueError: `base` below zero, or not `0 <= warmup_steps <= steps`; on a call, a step outside
            `0 <= step <= steps`.

    Example:
        >>> import cgh
        >>> schedule = cgh.LearningRate(base=0.05, steps=1000, warmup_steps=100)
        >>> schedule(0), schedule(50), schedule(100), schedule(1000)
        (0.0, 0.025, 0.05, 0.0)
    """

    base: float
    steps: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not self.base >= 0:
            raise ValueError(f"base is {self.base}; a learning rate is 0 or more.")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps} of {self.steps} steps; it lies between 0 and steps.")

    def __call__(self, step: int) -> float:
        if not 0 <= step <= self.steps:
            raise ValueError(f"step is {step} of {self.steps}; it lies between 0 and steps.")
        if step < self.warmup_steps:
            return self.base * step / self.warmup_steps
        if step == self.steps:
            return 0.0
        return self.base * 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / (self.steps - self.warmup_steps)))

    def scheduler(self, optimizer: Optimizer, last_step: int = -1) -> LambdaLR:
        """Return this schedule as one of torch's, to be stepped after every step of the optimiser.

        Args:
            optimizer: the highest rate of each of its groups is the one that the group has, as made with `lr=base`.
            last_step: as `last_epoch` of torch's.

        Example:
            >>> import torch, cgh
            >>> schedule = cgh.LearningRate(base=0.05, steps=1000, warmup_steps=100)
            >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=schedule.base)
            >>> scheduler = schedule.scheduler(optimizer)
            >>> for _ in range(50):
            ...     optimizer.step()
            ...     scheduler.step()
            >>> optimizer.param_groups[0]["lr"]
            0.025
        """
        # Of an object torch saves the attributes: a run resumed with more steps would get its old schedule back.
        return LambdaLR(optimizer, replace(self, base=1.0).__call__, last_step)


@dataclass(frozen=True)
class TeacherMomentum:
    """The teacher's momentum, rising from `base` to `final` in a cosine over the updates, as in BYOL and DINO.

    Args:
        base: at the first update.
        steps: updates in all.
        final: once all are made, one update after the last.

    Raises:
        ValueError: a momentum outside 0 to 1, or `steps` below 1.

    Example:
        >>> import cgh, torch
        >>> momentum = cgh.TeacherMomentum(base=0.996, steps=1000)
        >>> momentum(0), momentum(500), momentum(1000)
        (0.996, 0.998, 1.0)
        >>> teacher = cgh.EMATeacher(torch.nn.Linear(4, 2), momentum)
    """

    base: float
    steps: int
    final: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.base <= 1 or not 0 <= self.final <= 1 or self.steps < 1:
            raise ValueError(
                f"base is {self.base}, final {self.final} and steps {self.steps}; momenta lie between 0 and 1, and "
                "there is at least one step."
            )

    def __call__(self, updates: int) -> float:
        done = min(updates / self.steps, 1.0)
        return self.final - (self.final - self.base) * 0.5 * (1 + math.cos(math.pi * done))


class Weights(NamedTuple):
    """What each loss counts in the total."""

    infonce: float | Tensor
    """The weight of InfoNCE, `1 - a`."""
    relation: float | Tensor
    """The weight of each of the two relation terms, `a / 2`."""


@dataclass(frozen=True)
class LossWeights:
    """The warm-up that fades InfoNCE out and the relation terms in: `a` runs linearly from 0 to 1.

    Args:
        warmup_steps: steps until InfoNCE is gone, the paper's 5 epochs' worth; 0 is relations from the first step.

    Raises:
        ValueError: `warmup_steps` or a step below zero.

    Example:
        >>> import cgh
        >>> weights = cgh.LossWeights(warmup_steps=100)
        >>> weights(0), weights(50), weights(100)
        (Weights(infonce=1.0, relation=0.0), Weights(infonce=0.5, relation=0.25), Weights(infonce=0.0, relation=0.5))
    """

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it is 0 or more.")

    def __call__(self, step: int) -> Weights:
        """Return the weights at a step as numbers."""
        if step < 0:
            raise ValueError(f"step is {step}; it is 0 or more.")
        a = step / self.warmup_steps if step < self.warmup_steps else 1.0
        return Weights(infonce=1.0 - a, relation=a / 2)

    def of(self, step: Tensor) -> Weights:
        """Return the weights at a step that is a scalar of a device, floating point, as such scalars."""
        a = (step / self.warmup_steps).clamp(max=1.0) if self.warmup_steps else step * 0 + 1
        return Weights(infonce=1.0 - a, relation=a / 2)
