"""Relations between images and a memory, and how far one relation is from another."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from cgh.contexts import check_temperature


class RelationMatrix(nn.Module):
    """How images relate to a memory: `softmax(z . M / temperature)`, one row an image.

    Args:
        temperature: above zero; the lower, the more a row concentrates on its nearest neighbours.

    Shape:
        `(z (N, D), bank (K, D))` -> `(N, K)`, rows that sum to one.

    Raises:
        ValueError: a temperature of zero or below, or shapes that do not fit together.

    Example:
        >>> import torch, cgh
        >>> relation = cgh.RelationMatrix(temperature=0.1)
        >>> rows = relation(torch.randn(2, 8), torch.randn(100, 8))
        >>> rows.shape, bool(torch.allclose(rows.sum(1), torch.ones(2)))
        (torch.Size([2, 100]), True)
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    @override
    def forward(self, z: Tensor, bank: Tensor) -> Tensor:
        return self.logits(z, bank).softmax(dim=1)

    def logits(self, z: Tensor, bank: Tensor) -> Tensor:
        """Return `z . M / temperature`, `(N, K)`."""
        return similarity(z, bank) / self.temperature

    @override
    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


def similarity(z: Tensor, bank: Tensor) -> Tensor:
    """Return `z . M`, `(N, K)`, of embeddings `(N, D)` to the rows of a bank `(K, D)`, without gradient to the bank."""
    if z.ndim != 2 or bank.ndim != 2 or z.shape[1] != bank.shape[1]:
        raise ValueError(f"z is {tuple(z.shape)} and the bank {tuple(bank.shape)}; they must be (N, D) and (K, D).")
    return z @ bank.detach().to(z.dtype).T


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return `CE(p | t) = -sum_j t_j log p_j`, the mean over the batch.

    Args:
        logits: the student's `(N, K)`, `p = softmax(logits)`.
        target: the teacher's relations `t`, `(N, K)`, rows that sum to one.
    """
    return -torch.sum(target * logits.log_softmax(dim=1), dim=1).mean()
