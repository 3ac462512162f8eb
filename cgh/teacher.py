"""The teacher: an exponential moving average of the student."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from cgh.wrappers import unwrap


class EMATeacher(nn.Module):
    """A copy of the student whose parameters follow it as an exponential moving average.

    `teacher = momentum * teacher + (1 - momentum) * student`, after each optimiser step. Only parameters are averaged:
    buffers, such as batch-norm statistics, are the teacher's own, from its own batches.

    Args:
        student: the module to copy; wrappers, such as DistributedDataParallel or `torch.compile`'s, stay behind.
        momentum: between 0 (a copy of the student) and 1 (frozen), or a function from the number of updates made so
            far to it.

    Shape:
        That of the student; the outputs need no gradient.

    Raises:
        ValueError: a momentum outside [0, 1], or a student whose parameters have other names or shapes.

    Example:
        >>> import torch, cgh
        >>> student = torch.nn.Linear(4, 2)
        >>> teacher = cgh.EMATeacher(student, momentum=0.999)
        >>> _ = torch.nn.init.zeros_(student.weight)
        >>> teacher.update(student)
        >>> teacher(torch.randn(3, 4)).requires_grad
        False
    """

    def __init__(self, student: nn.Module, momentum: float | Callable[[int], float] = 0.999) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(unwrap(student)).requires_grad_(False)
        self.encoder.zero_grad(set_to_none=True)
        self.momentum = momentum if callable(momentum) else _check_momentum(momentum)
        self.updates = 0

    @override
    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the student would, by the teacher's parameters and without gradient."""
        return self.encoder(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move every parameter towards the student's, in one grouped in-place operation."""
        ours, theirs = dict(self.encoder.named_parameters()), dict(unwrap(student).named_parameters())
        shapes, expected = ({n: tuple(p.shape) for n, p in parameters.items()} for parameters in (theirs, ours))
        if shapes != expected:
            names = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))
            raise ValueError(
                f"student and teacher differ in {len(names)} parameters, the first {names[0]!r}: "
                f"student {shapes.get(names[0])}, teacher {expected.get(names[0])}. Update from the module it copied."
            )
        momentum = _check_momentum(self.momentum(self.updates)) if callable(self.momentum) else self.momentum
        torch._foreach_lerp_(list(ours.values()), [theirs[name] for name in ours], 1.0 - momentum)
        self.updates += 1

    @override
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.updates)

    @override
    def set_extra_state(self, state: Tensor) -> None:
        self.updates = int(state)


def _check_momentum(momentum: float) -> float:
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; it lies between 0 (a copy of the student) and 1 (frozen).")
    return momentum
