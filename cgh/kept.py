"""Losses of few relations: on a CPU they are held until the gradient is known, which is within the forward pass.

That takes fewer products, and fewer operators, than reading the memory in one pass, see `cgh.streaming`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cgh.contexts import Banks, Contexts
from cgh.streaming import Query, Term, common_dtype

LIMIT = 4 * 2**20
"""Relations of a query that are few enough to be held."""


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
    rows = max(query.embeddings.shape[0] for query in queries)
    return queries[0].embeddings.is_cpu and rows * memory[queries[0].bank].shape[0] <= LIMIT


def cross_entropies(
    pairs: Sequence[tuple[str, str]], students: Sequence[Query], teachers: Sequence[Query], memory: Banks
) -> list[Term]:
    """Return by pair `CE(p | t) = -sum_j t_j log p_j`, the mean over the rows of the learner, and its gradient.

    Takes and returns what `cgh.terms.cross_entropies` does, the values one scalar.

    Example:
        >>> import torch
        >>> from cgh.kept import cross_entropies
        >>> from cgh.streaming import Query
        >>> student, teacher = (Query(torch.randn(4, 6), "global", temperature) for temperature in (0.1, 0.04))
        >>> pairs, memory = [("global", "global")], {"global": torch.randn(100, 6)}
        >>> [(value, gradient)] = cross_entropies(pairs, [student], [teacher], memory)
        >>> value.shape, gradient.shape
        (torch.Size([]), torch.Size([4, 6]))
    """
    dtype = common_dtype([*students, *teachers])
    found = {}
    with torch.autocast("cpu", enabled=False):
        banks = {query.bank: memory[query.bank].to(dtype) for query in (*students, *teachers)}
        targets = {query.bank: _target(query, query.embeddings.to(dtype), banks[query.bank]) for query in teachers}
        for query in students:
            guides = {guide: targets[guide] for learner, guide in pairs if learner == query.bank}
            rows = query.embeddings.to(dtype)
            for guide, term in _terms(rows, banks[query.bank], query.temperature, guides).items():
                found[query.bank, guide] = term
    return [found[pair] for pair in pairs]


def _target(query: Query, rows: Tensor, bank: Tensor) -> Tensor:
    """Return the relations that a teacher sees, `(N, K)`."""
    logits = rows / query.temperature @ bank.T
    if query.centre is not None:
        logits -= query.centre / query.temperature
    return logits.softmax(dim=1)


def _terms(rows: Tensor, bank: Tensor, temperature: float, targets: Mapping[str, Tensor]) -> dict[str, Term]:
    """Return by target a learner's cross-entropy and its gradient with respect to `rows`."""
    logarithms = (rows / temperature @ bank.T).log_softmax(dim=1)
    views = logarithms.view(-1, *next(iter(targets.values())).shape)
    values = [torch.sum(views * target) / -len(rows) for target in targets.values()]
    relation, found = views.exp_(), {}
    for number, ((guide, target), value) in enumerate(zip(targets.items(), values, strict=True), start=1):
        # In place where nothing else needs it: taking new memory costs as much as computing.
        difference = relation.sub_(target) if number == len(targets) else relation - target
        scale = 1 / (temperature * len(rows))
        gradient = torch.addmm(bank[0], difference.view(len(rows), -1), bank, beta=0, alpha=scale)
        found[guide] = value, gradient
    return found


def infonce(queries: Sequence[Query], positives: Contexts, memory: Banks) -> list[Term]:
    """Return MoCo's loss of each context, the mean over its rows, and its gradient.

    It is a cross-entropy whose target is one-hot. Takes and returns what `cgh.terms.infonce` does, the values one
    scalar.

    Example:
        >>> import torch
        >>> from cgh.kept import infonce
        >>> from cgh.streaming import Query
        >>> z, t, bank = ({"global": torch.randn(rows, 6)} for rows in (4, 4, 100))
        >>> [(value, gradient)] = infonce([Query(z["global"], "global", 0.2)], t, bank)
        >>> value.shape, gradient.shape
        (torch.Size([]), torch.Size([4, 6]))
    """
    dtype = common_dtype(queries)
    with torch.autocast("cpu", enabled=False):
        return [
            _against_positives(
                query.embeddings.to(dtype),
                positives[query.bank].to(dtype),
                memory[query.bank].to(dtype),
                query.temperature,
            )
            for query in queries
        ]


def _against_positives(rows: Tensor, positives: Tensor, bank: Tensor, temperature: float) -> Term:
    """Return MoCo's loss of one context and its gradient with respect to `rows`."""
    z = rows / temperature
    logits = torch.cat([torch.sum(z * positives, dim=1, keepdim=True), z @ bank.T], dim=1)
    logarithms = logits.log_softmax(dim=1)
    value = logarithms[:, 0].sum() / -len(z)
    positive, relation = logarithms.exp_().tensor_split([1], dim=1)
    return value, torch.addcmul(relation @ bank, positive - 1, positives) / (temperature * len(z))
