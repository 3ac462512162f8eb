"""Relations to a memory in one pass over it, chunk by chunk, so that no `(N, K)` matrix is ever stored.

With logits `s_j = z . M_j / temperature`, a loss on relations needs only two things of a row of the relation matrix:
`log sum_j exp(s_j)`, and the mean row of a bank under the relation, `sum_j softmax(s)_j M_j`. For

    CE(p | t) = -sum_j t_j log p_j = log sum_j exp(s_j) - z . (sum_j t_j M_j) / temperature,

so the mean row under the teacher's relation gives the value, and together with the mean row under the student's the
gradient `(sum_j p_j M_j - sum_j t_j M_j) / temperature`. Both are running sums, rescaled whenever a row's largest logit
grows, so that no exponential overflows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from cgh.contexts import Banks

BUFFER = 2**22
"""Logits held at a time, over all queries: 16 MB of float32, which stays in a CPU's cache."""

MIN_CHUNK = 1024
"""Rows of a bank read at a time at least: with fewer, rescaling the sums costs more than the products."""


class Query(NamedTuple):
    """Embeddings whose relation to a bank is asked for."""

    embeddings: Tensor
    """`(R, D)`."""
    bank: str
    """The name of the bank that they are compared with."""
    temperature: float
    averages: Sequence[str] = ()
    """Names of the banks whose mean row under the relation is wanted; row `j` of each belongs to the same image."""
    centre: Tensor | None = None
    """`(K,)`, taken off the similarities."""


class Relation(NamedTuple):
    """What a loss needs of the relation of a query's rows, in at least float32."""

    rows: Tensor
    """`z / temperature`, `(R, D)`."""
    logsumexp: Tensor
    """`log sum_j exp(rows . M_j)`, `(R,)`, differentiable once with respect to the embeddings."""
    means: dict[str, Tensor]
    """By bank, `sum_j softmax(rows . M)_j bank_j`, `(R, D of that bank)`, without gradient."""


def stream(memory: Banks, queries: Sequence[Query]) -> list[Relation]:
    """Return every query's relation, from one pass over the banks.

    The gradient is computed in the pass, so the banks may be overwritten before `backward`. Products are computed in
    float32 (float64 for float64 embeddings) whatever the banks hold, and sums as well.

    Args:
        memory: banks `(K, D)` of one length, of any floating point dtype.
        queries: at least one.

    Example:
        >>> import torch
        >>> from cgh.streaming import Query, stream
        >>> z, bank = torch.randn(4, 8), torch.randn(100, 8)
        >>> [relation] = stream({"global": bank}, [Query(z, "global", temperature=0.5, averages=["global"])])
        >>> p = torch.softmax(z @ bank.T / 0.5, dim=1)
        >>> torch.allclose(relation.means["global"], p @ bank, atol=1e-5)
        True
    """
    dtype = reduce(torch.promote_types, (query.embeddings.dtype for query in queries), torch.float32)
    rows = [query.embeddings.to(dtype) / query.temperature for query in queries]
    learns = [torch.is_grad_enabled() and x.requires_grad for x in rows]
    names = list(dict.fromkeys(name for query in queries for name in (query.bank, *query.averages)))
    wanted = list(
        dict.fromkeys(
            (number, name)
            for number, query in enumerate(queries)
            for name in (*query.averages, *([query.bank] if learns[number] else []))
        )
    )
    logsumexps_and_means = _stream(
        [x.detach() for x in rows],
        [memory[name].detach() for name in names],
        [None if query.centre is None else query.centre.detach() / query.temperature for query in queries],
        [names.index(query.bank) for query in queries],
        [number for number, _ in wanted],
        [names.index(name) for _, name in wanted],
    )
    means = dict(zip(wanted, logsumexps_and_means[len(queries) :], strict=True))
    return [
        Relation(
            rows[number],
            _Attach.apply(rows[number], logsumexp, means[number, query.bank]) if learns[number] else logsumexp,
            {name: means[number, name] for name in query.averages},
        )
        for number, (query, logsumexp) in enumerate(zip(queries, logsumexps_and_means, strict=False))
    ]


# An operator of its own, so that torch.compile takes the loop over the chunks as one call and does not unroll it.
@torch.library.custom_op(
    "cgh::stream",
    mutates_args=(),
    schema="(Tensor[] queries, Tensor[] banks, Tensor?[] centres, int[] reads, int[] sources, int[] targets)"
    " -> Tensor[]",
)
def _stream(
    queries: Sequence[Tensor],
    banks: Sequence[Tensor],
    centres: Sequence[Tensor | None],
    reads: Sequence[int],
    sources: Sequence[int],
    targets: Sequence[int],
) -> list[Tensor]:
    """Return the log-sum-exp of every query, then the means of `banks[target]` under `queries[source]`.

    Query `i` is compared with `banks[reads[i]]`.
    """
    size, dtype = len(banks[0]), queries[0].dtype
    # The rows that read one bank lie side by side, so that one product with it gives the logits of them all.
    readers = [[number for number, read in enumerate(reads) if read == bank] for bank in range(len(banks))]
    order = [number for numbers in readers for number in numbers]
    ends = list(accumulate(len(queries[number]) for number in order))
    spans = {number: slice(end - len(queries[number]), end) for number, end in zip(order, ends, strict=True)}
    blocks = [
        (bank, slice(spans[numbers[0]].start, spans[numbers[-1]].stop), torch.cat([queries[n] for n in numbers]))
        for bank, numbers in enumerate(readers)
        if numbers
    ]
    chunk = min(size, max(MIN_CHUNK, BUFFER // ends[-1]))
    buffer = queries[0].new_empty(ends[-1] * chunk)
    maximum = queries[0].new_full((ends[-1], 1), -torch.inf)
    total = torch.zeros_like(maximum)
    sums = [queries[s].new_zeros(len(queries[s]), banks[t].shape[1]) for s, t in zip(sources, targets, strict=True)]

    for start in range(0, size, chunk):
        rows = [bank[start : start + chunk].to(dtype) for bank in banks]
        logits = buffer[: ends[-1] * len(rows[0])].view(ends[-1], -1)
        for bank, span, stacked in blocks:
            torch.mm(stacked, rows[bank].T, out=logits[span])
        for number, centre in enumerate(centres):
            if centre is not None:
                logits[spans[number]] -= centre[start : start + chunk]
        shrink = _exponentiate_(logits, maximum, total)
        for source, target, weighted in zip(sources, targets, sums, strict=True):
            weighted.mul_(shrink[spans[source]]).addmm_(logits[spans[source]], rows[target])

    logsumexp = (maximum + total.log()).squeeze(1)
    return [logsumexp[spans[number]].clone() for number in range(len(queries))] + [
        weighted / total[spans[source]] for source, weighted in zip(sources, sums, strict=True)
    ]


@_stream.register_fake
def _(
    queries: Sequence[Tensor],
    banks: Sequence[Tensor],
    centres: Sequence[Tensor | None],
    reads: Sequence[int],
    sources: Sequence[int],
    targets: Sequence[int],
) -> list[Tensor]:
    return [query.new_empty(len(query)) for query in queries] + [
        queries[s].new_empty(len(queries[s]), banks[t].shape[1]) for s, t in zip(sources, targets, strict=True)
    ]


def _exponentiate_(logits: Tensor, maximum: Tensor, total: Tensor) -> Tensor:
    """Turn a chunk's logits `(R, chunk)` into `exp(logits - maximum)`, with the running `maximum` and `total` `(R, 1)`.

    Returns:
        what the sums over earlier chunks have to be multiplied with, `(R, 1)`.
    """
    previous = maximum.clone()
    torch.maximum(maximum, logits.amax(dim=1, keepdim=True), out=maximum)
    shrink = previous.sub_(maximum).exp_()
    logits.sub_(maximum).exp_()
    total.mul_(shrink).add_(logits.sum(dim=1, keepdim=True))
    return shrink


class _Attach(torch.autograd.Function):
    """A value with the gradient that was computed along with it."""

    @staticmethod
    def forward(rows: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        rows, _, gradient = inputs
        ctx.save_for_backward(rows, gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, gradient = ctx.saved_tensors
        return _Once.apply(grad.unsqueeze(1) * gradient, rows), None, None


class _Once(torch.autograd.Function):
    """A gradient that depends on `rows` and cannot be differentiated with respect to them."""

    @staticmethod
    def forward(gradient: Tensor, rows: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError(
            "the loss keeps no relation matrix and so has no second derivative: call backward() without create_graph, "
            "or use cgh.relation.cross_context_term and cgh.relation.infonce_term, which keep it."
        )
