"""Losses of few relations: on a CPU they are held until the gradient is known, which is within the forward pass.

That takes fewer products, and fewer operators, than reading the memory in one pass, see `cgh.streaming`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cgh.contexts import Banks
from cgh.streaming import Query, attach, common_dtype

LIMIT = 8 * 2**20
"""Relations of all queries that are few enough to be held."""


def keeps(queries: Sequence[Query], memory: Banks) -> bool:
    """Return whether to hold the relations of `queries`: on a CPU, where they are few.

    Example:
        >>> import torch
        >>> from cgh.kept import keeps
        >>> from cgh.streaming import Query
        >>> query = Query(torch.empty(256, 8), "global", temperature=0.1)
        >>> [keeps([query], {"global": torch.empty(size, 8)}) for size in (4_096, 131_072)]
        [True, False]
    """
    rows = sum(query.embeddings.shape[0] for query in queries)
    return queries[0].embeddings.is_cpu and rows * memory[queries[0].bank].shape[0] <= LIMIT


def cross_entropies(
    pairs: Sequence[tuple[str, str]], students: Sequence[Query], teachers: Sequence[Query], memory: Banks
) -> dict[tuple[str, str], Tensor]:
    """Return by pair `CE(p | t) = -sum_j t_j log p_j`, the mean over the rows of the learner.

    Args:
        pairs: (learner, guide), names of the banks of a student and of a teacher.
        students: of each learner, embeddings `(V * N, D)` of `V` views.
        teachers: of each guide, embeddings `(N, E)`.
        memory: banks `(K, D)` and `(K, E)`.

    Example:
        >>> import torch
        >>> from cgh.kept import cross_entropies
        >>> from cgh.streaming import Query
        >>> student, teacher = (Query(torch.randn(4, 6), "global", temperature) for temperature in (0.1, 0.04))
        >>> list(cross_entropies([("global", "global")], [student], [teacher], {"global": torch.randn(100, 6)}))
        [('global', 'global')]
    """
    dtype = common_dtype([*students, *teachers])
    rows = {query.bank: query.embeddings.to(dtype) for query in students}
    found = {}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        targets = {}
        for query in teachers:
            logits = _logits(query, memory, dtype)
            if query.centre is not None:
                logits -= query.centre.detach() / query.temperature
            targets[query.bank] = logits.softmax(dim=1)
        for query in students:
            bank = memory[query.bank].detach().to(dtype)
            logarithms = _logits(query, memory, dtype).log_softmax(dim=1)
            count, views = len(logarithms), logarithms.view(-1, *logits.shape)
            guides = [guide for learner, guide in pairs if learner == query.bank]
            values = [torch.sum(views * targets[guide]) / -count for guide in guides]
            relation = views.exp_()
            for guide, value in zip(guides, values, strict=True):
                # In place where nothing else needs it: taking new memory costs as much as computing.
                last = guide == guides[-1]
                difference = relation.sub_(targets[guide]) if last else relation - targets[guide]
                scale = 1 / (query.temperature * count)
                gradient = torch.addmm(bank[0], difference.view(count, -1), bank, beta=0, alpha=scale)
                found[query.bank, guide] = value, gradient
    return {pair: attach(rows[pair[0]], *found[pair]) for pair in pairs}


def infonce(query: Query, positives: Tensor, memory: Banks) -> Tensor:
    """Return MoCo's loss of one context, the mean over the rows of `query`: a cross-entropy whose target is one-hot.

    Args:
        query: the student's embeddings `(N, D)`.
        positives: the teacher's `(N, D)`.
        memory: the bank `(K, D)`.

    Example:
        >>> import torch
        >>> from cgh.kept import infonce
        >>> from cgh.streaming import Query
        >>> infonce(Query(torch.randn(4, 6), "global", 0.2), torch.randn(4, 6), {"global": torch.randn(100, 6)}).shape
        torch.Size([])
    """
    dtype = common_dtype([query])
    rows = query.embeddings.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        z, t, bank = (
            rows.detach() / query.temperature,
            positives.detach().to(dtype),
            memory[query.bank].detach().to(dtype),
        )
        logits = torch.cat([torch.sum(z * t, dim=1, keepdim=True), z @ bank.T], dim=1)
        logarithms = logits.log_softmax(dim=1)
        value = logarithms[:, 0].sum() / -len(z)
        positive, relation = logarithms.exp_().tensor_split([1], dim=1)
        gradient = torch.addcmul(relation @ bank, positive - 1, t) / (query.temperature * len(z))
    return attach(rows, value, gradient)


def _logits(query: Query, memory: Banks, dtype: torch.dtype) -> Tensor:
    rows = query.embeddings.detach().to(dtype) / query.temperature
    return rows @ memory[query.bank].detach().to(dtype).T
