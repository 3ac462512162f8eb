"""Relations between images and a memory, and the losses' equations with the whole relation matrix in memory.

`cgh.CrossContextLoss` and `cgh.InfoNCELoss` compute the same values and gradients without the matrix, see
`cgh.streaming`. These functions are for reading, for tests, and for trying another divergence than cross-entropy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from cgh.contexts import check_temperature


class RelationMatrix(nn.Module):
    """How images relate to a memory: `softmax(z . M / temperature)`, one row an image.

    Args:
        temperature: above zero; the lower, the more a row concentrates on its nearest neighbours.

    Shape:
        `(z (N, D), bank (K, D))` -> `(N, K)`, rows that sum to one. A `centre` `(K,)` is taken off `z . M`.

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
    def forward(self, z: Tensor, bank: Tensor, centre: Tensor | float = 0.0) -> Tensor:
        """Return the relations `(N, K)` of embeddings `z` to the rows of a bank."""
        return self.logits(z, bank, centre).softmax(dim=1)

    def logits(self, z: Tensor, bank: Tensor, centre: Tensor | float = 0.0) -> Tensor:
        """Return `(z . M - centre) / temperature`, `(N, K)`."""
        return (similarity(z, bank) - centre) / self.temperature

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


def cross_context_term(
    z: Tensor,
    t: Tensor,
    learner_bank: Tensor,
    guide_bank: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    centre: Tensor | float = 0.0,
) -> Tensor:
    """Return one term of `cgh.CrossContextLoss`: the student in the learner's context, the teacher in the guide's.

    Args:
        z: the student's embeddings in the learner's context, `(N, D)`.
        t: the teacher's in the guide's context, `(N, E)`; they get no gradient.
        learner_bank: `(K, D)`.
        guide_bank: `(K, E)`.
        student_temperature: above zero.
        teacher_temperature: above zero.
        centre: `(K,)`, taken off the teacher's similarities.

    Example:
        >>> import torch
        >>> from cgh.relation import cross_context_term
        >>> z, t = torch.randn(4, 8), torch.randn(4, 6)
        >>> cross_context_term(z, t, torch.randn(100, 8), torch.randn(100, 6), 0.1, 0.08).shape
        torch.Size([])
    """
    target = RelationMatrix(teacher_temperature)(t.detach(), guide_bank, centre)
    return cross_entropy(similarity(z, learner_bank) / student_temperature, target)


def infonce_term(z: Tensor, t: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """Return one context's term of `cgh.InfoNCELoss`.

    Args:
        z: the student's embeddings `(N, D)`.
        t: the teacher's `(N, D)`, the positives; they get no gradient.
        bank: `(K, D)`, the negatives.
        temperature: above zero.
    """
    positive = torch.sum(z * t.detach(), dim=1, keepdim=True)
    logits = torch.cat([positive, similarity(z, bank)], dim=1) / temperature
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))
