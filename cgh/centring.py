"""Centring: the mean of the teacher's similarities, to be taken off them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from typing_extensions import override

from cgh import distributed
from cgh.contexts import Banks, Contexts, check_banks, check_contexts, check_values
from cgh.state import LocalTensors


class Centring(LocalTensors):
    """A moving mean, over batches, of the teacher's similarity to every row of the memory.

    `CrossContextLoss(centring=...)` takes it off the teacher's similarities before they are divided by the temperature:
    `softmax((t . M - centre) / temperature)`. An option of the reference implementation, off by default there.

    Args:
        names: of the contexts.
        size: rows of the memory.
        momentum: of the moving mean.

    Raises:
        ValueError: a momentum outside [0, 1]; on `update`, contexts that do not fit the memory.

    Example:
        >>> import torch, cgh
        >>> memory = cgh.MemoryBank({"global": 8, "hypercolumn": 8}, size=100)
        >>> centring = cgh.Centring(memory, size=100)
        >>> criterion = cgh.CrossContextLoss(centring=centring)
        >>> t = {name: torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for name in memory}
        >>> loss = criterion(t, t, memory)
        >>> centring.update(t, memory)  # after the loss, before memory.enqueue(t)
        >>> centring["global"].shape
        torch.Size([100])
    """

    def __init__(self, names: Iterable[str], size: int, momentum: float = 0.9) -> None:
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum}; it lies between 0 and 1.")
        super().__init__({name: torch.zeros(size) for name in names})
        self.momentum = momentum

    @torch.no_grad()
    def update(self, t: Contexts, memory: Banks) -> None:
        """Move the centres towards the mean similarity of the teacher's embeddings `t`, over all ranks."""
        check_contexts(t, "teacher", list(self))
        check_values({name: t[name] for name in self}, "teacher")
        check_banks(t, memory, "teacher", list(self))
        for name in self:
            if len(memory[name]) != len(self[name]):
                raise ValueError(
                    f"memory[{name!r}] has {len(memory[name])} rows, and the centre {len(self[name])}: one for each."
                )
            # The mean of t . M over the batch is (the mean of t) . M: no matrix.
            mean = distributed.mean(t[name].mean(dim=0))
            centre = (memory[name] @ mean.to(memory[name])).to(self[name])
            # What is not finite is not taken in, and nothing waits to see whether it is.
            centre = torch.where(mean.isfinite().all(), centre, self[name])
            self[name].lerp_(centre, 1 - self.momentum)

    @override
    def extra_repr(self) -> str:
        return f"{list(self)}, momentum={self.momentum}"
