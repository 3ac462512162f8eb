"""The terms of a loss with their gradients: from relations that are held, by kernels, or by streaming.

Each way has the same two functions: `cgh.kept` where relations are few, `cgh.kernels` on CUDA in half precision,
`cgh.streaming` for all else. To `torch.compile` and `torch.func` a loss by one of the last two is one operator, so that
no loop over the memory is unrolled and no launch of a kernel traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import reduce

import torch
from torch import Tensor

from cgh import kept, streaming
from cgh.contexts import Banks, Contexts
from cgh.streaming import Query, Term, common_dtype


def cross_entropies(
    pairs: Sequence[tuple[str, str]], students: Sequence[Query], teachers: Sequence[Query], memory: Banks
) -> list[Term]:
    """Return by pair values whose mean is `CE(p | t) = -sum_j t_j log p_j`, and the gradient of that mean.

    Args:
        pairs: (learner, guide), names of the banks of a student and of a teacher.
        students: of each learner, embeddings `(V * N, D)` of `V` views, one view after the other.
        teachers: of each guide, embeddings `(N, E)`.
        memory: banks `(K, D)` and `(K, E)`, of any floating point dtype.

    Example:
        >>> import torch
        >>> from cgh.streaming import Query
        >>> from cgh.terms import cross_entropies
        >>> student, teacher = (Query(torch.randn(4, 6), "global", temperature) for temperature in (0.1, 0.04))
        >>> [(values, gradient)] = cross_entropies(
        ...     [("global", "global")], [student], [teacher], {"global": torch.randn(100, 6)}
        ... )
        >>> gradient.shape
        torch.Size([4, 6])
    """
    queries = [*students, *teachers]
    names = list(dict.fromkeys(query.bank for query in queries))
    with torch.no_grad():
        if kept.keeps(queries, memory):
            return kept.cross_entropies(pairs, students, teachers, memory)
        compute = _cross_entropies_operator if _are_abstract() else _cross_entropies
        found = compute(
            [query.embeddings.detach() for query in queries],
            [query.bank for query in queries],
            [query.temperature for query in queries],
            [None if query.centre is None else query.centre.detach() for query in queries],
            [learner for learner, _ in pairs],
            [guide for _, guide in pairs],
            names,
            [memory[name].detach() for name in names],
            _products(queries),
        )
    return list(zip(found[: len(pairs)], found[len(pairs) :], strict=True))


def infonce(queries: Sequence[Query], positives: Contexts, memory: Banks) -> list[Term]:
    """Return by context values whose mean is MoCo's loss, and the gradient of that mean.

    Args:
        queries: of each context, the student's embeddings `(N, D)`.
        positives: the teacher's `(N, D)`.
        memory: banks `(K, D)`, of any floating point dtype.

    Example:
        >>> import torch
        >>> from cgh.streaming import Query
        >>> from cgh.terms import infonce
        >>> z, t, bank = ({"global": torch.randn(rows, 6)} for rows in (4, 4, 100))
        >>> [(values, gradient)] = infonce([Query(z["global"], "global", 0.2)], t, bank)
        >>> gradient.shape
        torch.Size([4, 6])
    """
    names = [query.bank for query in queries]
    with torch.no_grad():
        if kept.keeps(queries, memory):
            return kept.infonce(queries, positives, memory)
        compute = _infonce_operator if _are_abstract() else _infonce
        found = compute(
            [query.embeddings.detach() for query in queries],
            names,
            [query.temperature for query in queries],
            [positives[name].detach() for name in names],
            [memory[name].detach() for name in names],
            _products(queries),
        )
    return list(zip(found[: len(names)], found[len(names) :], strict=True))


def _are_abstract() -> bool:
    """Return whether tensors have no memory that a kernel could read: to a compiler, and to transforms of `torch.func`.

    Only an operator can take those. Elsewhere its own way would take longer than all kernels of a small loss.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _products(queries: Sequence[Query]) -> torch.dtype:
    """Return the dtype of matrix products on CUDA: autocast's, or that of the embeddings; float64 stays."""
    if common_dtype(queries) == torch.float64:
        return torch.float64
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return reduce(torch.promote_types, (query.embeddings.dtype for query in queries))


def _kernels_take(embeddings: Sequence[Tensor], products: torch.dtype) -> bool:
    """Return whether to try the kernels, with products in a dtype."""
    return products.itemsize == 2 and streaming.backend(embeddings[0]) == "triton"


def _cross_entropies(
    embeddings: Sequence[Tensor],
    reads: Sequence[str],
    temperatures: Sequence[float],
    centres: Sequence[Tensor | None],
    learners: Sequence[str],
    guides: Sequence[str],
    names: Sequence[str],
    banks: Sequence[Tensor],
    products: torch.dtype,
) -> list[Tensor]:
    """Return all values, then all gradients, of queries that are taken apart: of each learner, then of each guide."""
    queries = [Query(*parts) for parts in zip(embeddings, reads, temperatures, centres, strict=True)]
    pairs, memory = list(zip(learners, guides, strict=True)), dict(zip(names, banks, strict=True))
    students, teachers = queries[: len(set(learners))], queries[len(set(learners)) :]
    if _kernels_take(embeddings, products):
        from cgh import kernels

        with suppress(kernels.TooLargeError):
            return _flat(kernels.cross_entropies(pairs, students, teachers, memory, products))
    return _flat(streaming.cross_entropies(pairs, students, teachers, memory))


_cross_entropies_operator = torch.library.custom_op(
    "cgh::cross_entropies",
    _cross_entropies,
    mutates_args=(),
    schema="(Tensor[] embeddings, str[] reads, float[] temperatures, Tensor?[] centres, str[] learners, str[] guides, "
    "str[] names, Tensor[] banks, ScalarType products) -> Tensor[]",
)


@_cross_entropies_operator.register_fake
def _(
    embeddings: Sequence[Tensor],
    reads: Sequence[str],
    temperatures: Sequence[float],
    centres: Sequence[Tensor | None],
    learners: Sequence[str],
    *_: object,
) -> list[Tensor]:
    return _like([embeddings[reads.index(learner)] for learner in learners], embeddings)


def _infonce(
    embeddings: Sequence[Tensor],
    names: Sequence[str],
    temperatures: Sequence[float],
    positives: Sequence[Tensor],
    banks: Sequence[Tensor],
    products: torch.dtype,
) -> list[Tensor]:
    """Return all values, then all gradients, of queries and mappings that are taken apart."""
    queries = [Query(*parts) for parts in zip(embeddings, names, temperatures, strict=True)]
    contexts, memory = (dict(zip(names, tensors, strict=True)) for tensors in (positives, banks))
    if _kernels_take(embeddings, products):
        from cgh import kernels

        with suppress(kernels.TooLargeError):
            return _flat(kernels.infonce(queries, contexts, memory, products))
    return _flat(streaming.infonce(queries, contexts, memory))


_infonce_operator = torch.library.custom_op(
    "cgh::infonce",
    _infonce,
    mutates_args=(),
    schema="(Tensor[] embeddings, str[] names, float[] temperatures, Tensor[] positives, Tensor[] banks, "
    "ScalarType products) -> Tensor[]",
)


@_infonce_operator.register_fake
def _(embeddings: Sequence[Tensor], *_: object) -> list[Tensor]:
    return _like(embeddings, embeddings)


def _flat(terms: Sequence[Term]) -> list[Tensor]:
    return [values for values, _ in terms] + [gradient for _, gradient in terms]


def _like(rows: Sequence[Tensor], embeddings: Sequence[Tensor]) -> list[Tensor]:
    """Return what `_flat` does of terms of such rows, without values."""
    dtype = reduce(torch.promote_types, (x.dtype for x in embeddings), torch.float32)
    return [x.new_empty(len(x), dtype=dtype) for x in rows] + [x.new_empty(x.shape, dtype=dtype) for x in rows]
