"""Relations to a memory in one pass over it, chunk by chunk, so that no `(N, K)` matrix is ever stored.

With logits `s_j = z . M_j / temperature`, a loss on relations needs only two things of a row of the relation matrix:
`log sum_j exp(s_j)`, and the mean row of a bank under the relation, `sum_j softmax(s)_j M_j`. For

    CE(p | t) = -sum_j t_j log p_j = log sum_j exp(s_j) - z . (sum_j t_j M_j) / temperature,

so the mean row under the teacher's relation gives the value, and together with the mean row under the student's the
gradient `(sum_j p_j M_j - sum_j t_j M_j) / temperature`. Both are running sums. Where the lengths of the rows leave
`|s_j|` small, as unit rows do, their exponentials are added up as they are; elsewhere the sums are rescaled whenever a
row's largest logit grows. No exponential overflows either way.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache, reduce
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from cgh.contexts import Banks

BUFFER = {"cpu": 2 * 2**20, "cuda": 16 * 2**20}
"""Logits of all queries that are held at a time: on a CPU 8 MB of float32, which stay in its cache; on CUDA more, so
that fewer kernels are launched."""

MIN_CHUNK = 1024
"""Rows of a bank are read in multiples of it: fewer at a time, and rescaling the sums costs more than the products; odd
numbers of them, and a GPU multiplies slowly."""

LARGEST = 60.0
"""Logits up to it need no maximum taken off: a million exponentials of it are within float32, and so is that of its
negative."""

HAS_TRITON = find_spec("triton") is not None


@cache
def has_kernels(device: torch.device) -> bool:
    """Return whether Triton's kernels run on a device: on CUDA, but for GPUs that are older than it supports.

    Example:
        >>> import torch
        >>> from cgh.streaming import has_kernels
        >>> has_kernels(torch.device("cpu"))
        False
    """
    return HAS_TRITON and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


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
    """What a loss needs of the relation of a query's rows, in at least float32, without gradient."""

    rows: Tensor
    """`z / temperature`, `(R, D)`."""
    logsumexp: Tensor
    """`log sum_j exp(rows . M_j)`, `(R,)`."""
    means: dict[str, Tensor]
    """By bank, `sum_j softmax(rows . M)_j bank_j`, `(R, D of that bank)`."""


Term: TypeAlias = tuple[Tensor, Tensor]
"""A part of a loss, a scalar, and its gradient with respect to the rows of a query."""


def backend(x: Tensor) -> Literal["torch", "triton"]:
    """Return how relations of embeddings like `x` are computed: by plain torch, or with a Triton kernel on CUDA.

    float64, other devices, GPUs before compute capability 7.0 and a torch without Triton take plain torch.

    Example:
        >>> import torch
        >>> backend(torch.randn(4, 8))
        'torch'
    """
    # A compiler for CUDA, which has kernels of Triton itself, takes no call of its driver into a graph.
    kernels = x.is_cuda and (HAS_TRITON if torch.compiler.is_compiling() else has_kernels(x.device))
    return "triton" if kernels and x.dtype != torch.float64 else "torch"


def common_dtype(queries: Sequence[Query]) -> torch.dtype:
    """Return the dtype that the embeddings of all queries fit into, at least float32."""
    return reduce(torch.promote_types, (query.embeddings.dtype for query in queries), torch.float32)


def stream(memory: Banks, queries: Sequence[Query]) -> list[Relation]:
    """Return every query's relation, from one pass over the banks.

    Sums are at least float32, whatever the embeddings and the banks hold, and so are products in plain torch; with
    Triton (see `backend`), products are in autocast's dtype, or in that of embeddings in half precision.

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
    dtype = common_dtype(queries)
    rows = [query.embeddings.detach().to(dtype) / query.temperature for query in queries]
    names = list(dict.fromkeys(name for query in queries for name in (query.bank, *query.averages)))
    wanted = list(dict.fromkeys((number, name) for number, query in enumerate(queries) for name in query.averages))
    how = backend(rows[0])
    products = dtype
    if how == "triton":
        given = reduce(torch.promote_types, (query.embeddings.dtype for query in queries))
        products = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else given
    # The operator's own way takes longer than all kernels of a small loss.
    compute = _stream if torch.compiler.is_compiling() else _relations
    results = compute(
        rows,
        [memory[name].detach() for name in names],
        [None if query.centre is None else query.centre.detach() / query.temperature for query in queries],
        [names.index(query.bank) for query in queries],
        [number for number, _ in wanted],
        [names.index(name) for _, name in wanted],
        how,
        products,
    )
    logsumexps, means = results[: len(queries)], dict(zip(wanted, results[len(queries) :], strict=True))
    return [
        Relation(rows[number], logsumexps[number], {name: means[number, name] for name in query.averages})
        for number, query in enumerate(queries)
    ]


def _relations(
    queries: Sequence[Tensor],
    banks: Sequence[Tensor],
    centres: Sequence[Tensor | None],
    reads: Sequence[int],
    sources: Sequence[int],
    targets: Sequence[int],
    how: str,
    products: torch.dtype,
) -> list[Tensor]:
    """Return the log-sum-exp of every query, then the means of `banks[target]` under `queries[source]`.

    Query `i` is compared with `banks[reads[i]]`. `how` is a `backend`; `products` is the dtype of the matrix products.
    """
    if how == "triton" and products.itemsize == 2:
        found = _fused(queries, banks, centres, reads, sources, targets, products)
        if found is not None:
            return found
    return _chunked(queries, banks, centres, reads, sources, targets, how)


# An operator of its own, so that torch.compile takes the loop over the chunks as one call and does not unroll it.
_stream = torch.library.custom_op(
    "cgh::stream",
    _relations,
    mutates_args=(),
    schema="(Tensor[] queries, Tensor[] banks, Tensor?[] centres, int[] reads, int[] sources, int[] targets, "
    "str how, ScalarType products) -> Tensor[]",
)


@_stream.register_fake
def _(
    queries: Sequence[Tensor],
    banks: Sequence[Tensor],
    centres: Sequence[Tensor | None],
    reads: Sequence[int],
    sources: Sequence[int],
    targets: Sequence[int],
    how: str,
    products: torch.dtype,
) -> list[Tensor]:
    return [query.new_empty(len(query)) for query in queries] + [
        queries[s].new_empty(len(queries[s]), banks[t].shape[1]) for s, t in zip(sources, targets, strict=True)
    ]


def _fused(
    queries: Sequence[Tensor],
    banks: Sequence[Tensor],
    centres: Sequence[Tensor | None],
    reads: Sequence[int],
    sources: Sequence[int],
    targets: Sequence[int],
    products: torch.dtype,
) -> list[Tensor] | None:
    """Return what `_stream` does, by a kernel for each relation; None if a query is too wide for it."""
    from cgh import kernels

    rows = [query.to(products) for query in queries]
    logsumexps, means = dict[int, Tensor](), dict[tuple[int, int], Tensor]()
    # A query whose mean row nobody wants is averaged over its own bank all the same.
    for source, target in (
        *zip(sources, targets, strict=True),
        *((number, read) for number, read in enumerate(reads) if number not in sources),
    ):
        found = kernels.relate(rows[source], banks[reads[source]], banks[target], centres[source])
        if found is None:
            return None
        logsumexps[source], means[source, target] = found
    return [logsumexps[number] for number in range(len(queries))] + [
        means[pair] for pair in zip(sources, targets, strict=True)
    ]


def _chunked(
    queries: Sequence[Tensor],
    banks: Sequence[Tensor],
    centres: Sequence[Tensor | None],
    reads: Sequence[int],
    sources: Sequence[int],
    targets: Sequence[int],
    how: str,
) -> list[Tensor]:
    """Return what `_stream` does, chunk by chunk, with products in the dtype of the queries."""
    step = exponentiate
    if how == "triton":
        from cgh import kernels

        step = kernels.exponentiate
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
    size, device, dtype = len(banks[0]), queries[0].device.type, queries[0].dtype
    chunk = min(size, chunk_rows(ends[-1], device))
    buffer = queries[0].new_empty(ends[-1] * chunk)
    maximum = queries[0].new_full((ends[-1], 1), -torch.inf)
    total, shrink = torch.zeros_like(maximum), torch.empty_like(maximum)
    # The sums of a query stand side by side, and those of all queries in one tensor, to be rescaled in one go.
    places, widths = [], [0] * len(queries)
    for source, target in zip(sources, targets, strict=True):
        start, widths[source] = widths[source], widths[source] + banks[target].shape[1]
        places.append((spans[source], slice(start, widths[source])))
    sums = queries[0].new_zeros(ends[-1], max(widths))
    # Lengths are compared on the host, which must not wait for a GPU.
    small = how == "torch" and device == "cpu"

    for start in range(0, size, chunk):
        rows = [bank[start : start + chunk].to(dtype) for bank in banks]
        shifts = [None if centre is None else centre[start : start + chunk] for centre in centres]
        weights = buffer[: ends[-1] * len(rows[0])].view(ends[-1], -1)
        small = small and all(
            _largest(stacked, rows[bank], [shifts[number] for number in readers[bank]]) <= LARGEST
            for bank, _, stacked in blocks
        )
        if start == 0 and small:
            maximum.zero_()
        for bank, span, stacked in blocks:
            logits = weights[span]
            torch.mm(stacked, rows[bank].T, out=logits)
            for number in readers[bank]:
                if (shift := shifts[number]) is not None:
                    weights[spans[number]] -= shift
            if small:
                total[span] += logits.exp_().sum(dim=1, keepdim=True)
            else:
                step(logits, maximum[span], total[span], shrink[span])
        if not small:
            sums *= shrink
        for target, place in zip(targets, places, strict=True):
            sums[place].addmm_(weights[place[0]], rows[target])
        del rows  # before the next are converted: one chunk of the banks at a time

    logsumexp = (maximum + total.log()).squeeze(1)
    sums /= total
    return [logsumexp[spans[number]].clone() for number in range(len(queries))] + [
        sums[place].clone(memory_format=torch.contiguous_format) for place in places
    ]


def chunk_rows(rows: int, device: str) -> int:
    """Return how many rows of a bank are read at a time by so many `rows` of all queries, on a type of device.

    Example:
        >>> from cgh.streaming import chunk_rows
        >>> chunk_rows(1024, "cpu")
        2048
    """
    return max(1, BUFFER.get(device, BUFFER["cpu"]) // rows // MIN_CHUNK) * MIN_CHUNK


def exponentiate(logits: Tensor, maximum: Tensor, total: Tensor, shrink: Tensor) -> None:
    """Continue a running softmax by one chunk of logits, in place.

    Args:
        logits: `(R, chunk)`; becomes `exp(logits - maximum)`.
        maximum: `(R, 1)`, of the logits so far; brought up to date.
        total: `(R, 1)`, the sum of `exp(logits - maximum)` so far; brought up to date.
        shrink: `(R, 1)`, gets what sums over the earlier chunks have to be multiplied with, as `maximum` has grown.
    """
    shrink.copy_(maximum)
    torch.maximum(maximum, logits.amax(dim=1, keepdim=True), out=maximum)
    shrink.sub_(maximum).exp_()
    logits.sub_(maximum).exp_()
    total.mul_(shrink).add_(logits.sum(dim=1, keepdim=True))


def _largest(rows: Tensor, bank: Tensor, shifts: Sequence[Tensor | None]) -> float:
    """Return what no `|rows . bank - shift|` exceeds."""
    bound = torch.linalg.vector_norm(rows, dim=1).max() * torch.linalg.vector_norm(bank, dim=1).max()
    return float(bound + max((shift.abs().max() for shift in shifts if shift is not None), default=0.0))


def attach(values: Sequence[Tensor], rows: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return scalars with their gradients, each with respect to the rows `(R, D)` at its place.

    They can be differentiated once.

    Example:
        >>> import torch
        >>> from cgh.streaming import attach
        >>> rows = torch.ones(2, 3, requires_grad=True)
        >>> [attached] = attach([torch.tensor(5.0)], [rows], [torch.full((2, 3), 4.0)])
        >>> attached.backward()
        >>> rows.grad[0]
        tensor([4., 4., 4.])
    """
    rows = [x.to(gradient.dtype) for x, gradient in zip(rows, gradients, strict=True)]
    attached: tuple[Tensor, ...] = _Attach.apply(*values, *rows, *gradients)
    return attached


class _Attach(torch.autograd.Function):
    """Values with gradients that were computed along with them."""

    @staticmethod
    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.clone() for value in inputs[: len(inputs) // 3])

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        count = len(output)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[count : 2 * count])
        ctx.gradients = inputs[2 * count :]  # not saved as the rows are, which would go with the first value's backward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [None if grad is None else grad * gradient for grad, gradient in zip(grads, ctx.gradients, strict=True)]
        # Applying a function costs more than a small product: only where the gradient is recorded.
        if torch.is_grad_enabled():
            found = [x if x is None else _Once.apply(x, rows) for x, rows in zip(found, ctx.saved_tensors, strict=True)]
        return (*[None] * len(grads), *found, *[None] * len(grads))


# It is looked up at every call, and building it anew takes longer than a small loss.
_Attach.forward.__signature__ = inspect.signature(_Attach.forward)  # type: ignore[attr-defined]  # functions take any


class _Once(torch.autograd.Function):
    """A gradient that depends on `rows` and cannot be differentiated with respect to them."""

    generate_vmap_rule = True

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
