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
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from cgh.contexts import Banks, Contexts

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
"""A part of a loss: values of which it is the mean, and its gradient with respect to the rows of a query."""


def backend(x: Tensor) -> Literal["torch", "triton"]:
    """Return how relations of embeddings like `x` are computed: by plain torch, or with a Triton kernel on CUDA.

    float64, other devices, GPUs before compute capability 7.0 and a torch without Triton take plain torch.

    Example:
        >>> import torch
        >>> backend(torch.randn(4, 8))
        'torch'
    """
    return "triton" if x.dtype != torch.float64 and has_kernels(x.device) else "torch"


def common_dtype(queries: Sequence[Query]) -> torch.dtype:
    """Return the dtype that the embeddings of all queries fit into, at least float32."""
    return reduce(torch.promote_types, (query.embeddings.dtype for query in queries), torch.float32)


def cross_entropies(
    pairs: Sequence[tuple[str, str]], students: Sequence[Query], teachers: Sequence[Query], memory: Banks
) -> list[Term]:
    """Return by pair `CE(p | t) = log sum_j exp(s_j) - z . sum_j t_j M_j / temperature`, from one pass over the memory.

    Takes and returns what `cgh.terms.cross_entropies` does, the values of the rows, `(V * N,)`.

    Example:
        >>> import torch
        >>> from cgh.streaming import Query, cross_entropies
        >>> student, teacher = (Query(torch.randn(4, 6), "global", temperature) for temperature in (0.1, 0.04))
        >>> pairs, memory = [("global", "global")], {"global": torch.randn(100, 6)}
        >>> [(values, gradient)] = cross_entropies(pairs, [student], [teacher], memory)
        >>> values.shape, gradient.shape
        (torch.Size([4]), torch.Size([4, 6]))
    """
    averages = [
        *([query.bank] for query in students),
        *([learner for learner, guide in pairs if guide == query.bank] for query in teachers),
    ]
    relations = stream(memory, [*students, *teachers], averages)
    learners = {query.bank: (query, relation) for query, relation in zip(students, relations, strict=False)}
    guides = {query.bank: relation for query, relation in zip(teachers, relations[len(students) :], strict=True)}
    terms = []
    for learner, guide in pairs:
        query, relation = learners[learner]
        expected = guides[guide].means[learner]
        views = relation.rows.unflatten(0, (-1, len(expected)))
        values = relation.logsumexp - torch.sum(views * expected, dim=-1).flatten()
        gradient = (relation.means[learner].view_as(views) - expected).flatten(0, 1)
        terms.append((values, gradient / (query.temperature * len(gradient))))
    return terms


def infonce(queries: Sequence[Query], positives: Contexts, memory: Banks) -> list[Term]:
    """Return MoCo's loss of each context, from one pass over the memory.

    The softmax over the positive and the memory, at the positive, is a sigmoid. Takes and returns what
    `cgh.terms.infonce` does, the values of the rows, `(N,)`.

    Example:
        >>> import torch
        >>> from cgh.streaming import Query, infonce
        >>> z, t, bank = ({"global": torch.randn(rows, 6)} for rows in (4, 4, 100))
        >>> [(values, gradient)] = infonce([Query(z["global"], "global", 0.2)], t, bank)
        >>> values.shape, gradient.shape
        (torch.Size([4]), torch.Size([4, 6]))
    """
    terms = []
    for query, relation in zip(queries, stream(memory, queries, [[query.bank] for query in queries]), strict=True):
        positive = positives[query.bank].to(relation.rows.dtype)
        margins = torch.sum(relation.rows * positive, dim=1) - relation.logsumexp
        share = torch.sigmoid(-margins) / (query.temperature * len(margins))
        terms.append((-F.logsigmoid(margins), share.unsqueeze(1) * (relation.means[query.bank] - positive)))
    return terms


def stream(memory: Banks, queries: Sequence[Query], averages: Sequence[Sequence[str]]) -> list[Relation]:
    """Return every query's relation, from one pass over the banks, chunk by chunk.

    Products and sums are in the dtype of the embeddings, at least float32, whatever the banks hold.

    Args:
        memory: banks `(K, D)` of one length, of any floating point dtype.
        queries: at least one.
        averages: of each query, the names of the banks whose mean row under its relation is wanted; row `j` of each
            belongs to the same image.

    Example:
        >>> import torch
        >>> from cgh.streaming import Query, stream
        >>> z, bank = torch.randn(4, 8), torch.randn(100, 8)
        >>> [relation] = stream({"global": bank}, [Query(z, "global", temperature=0.5)], [["global"]])
        >>> p = torch.softmax(z @ bank.T / 0.5, dim=1)
        >>> torch.allclose(relation.means["global"], p @ bank, atol=1e-5)
        True
    """
    dtype = common_dtype(queries)
    scaled = [query.embeddings.to(dtype) / query.temperature for query in queries]
    device, how, step = scaled[0].device, backend(scaled[0]), exponentiate
    if how == "triton":
        from cgh import kernels

        step = kernels.exponentiate
    centres = [None if query.centre is None else query.centre / query.temperature for query in queries]
    banks = {
        name: memory[name] for query, names in zip(queries, averages, strict=True) for name in (query.bank, *names)
    }
    # The rows that read one bank lie side by side, so that one product with it gives the logits of them all.
    readers = {name: [number for number, query in enumerate(queries) if query.bank == name] for name in banks}
    order = [number for numbers in readers.values() for number in numbers]
    ends = list(accumulate(len(scaled[number]) for number in order))
    spans = {number: slice(end - len(scaled[number]), end) for number, end in zip(order, ends, strict=True)}
    blocks = [
        (name, slice(spans[numbers[0]].start, spans[numbers[-1]].stop), torch.cat([scaled[n] for n in numbers]))
        for name, numbers in readers.items()
        if numbers
    ]
    size = len(next(iter(banks.values())))
    chunk = min(size, chunk_rows(ends[-1], device.type))
    buffer = scaled[0].new_empty(ends[-1] * chunk)
    maximum = scaled[0].new_full((ends[-1], 1), -torch.inf)
    total, shrink = torch.zeros_like(maximum), torch.empty_like(maximum)
    # The sums of a query stand side by side, and those of all queries in one tensor, to be rescaled in one go.
    places = dict[tuple[int, str], tuple[slice, slice]]()
    for number, names in enumerate(averages):
        stop = 0
        for name in names:
            start, stop = stop, stop + banks[name].shape[1]
            places[number, name] = spans[number], slice(start, stop)
    sums = scaled[0].new_zeros(ends[-1], max(columns.stop for _, columns in places.values()))
    # Lengths are compared on the host, which must not wait for a GPU.
    small = how == "torch" and device.type == "cpu"

    for start in range(0, size, chunk):
        rows = {name: bank[start : start + chunk].to(dtype) for name, bank in banks.items()}
        shifts = [None if centre is None else centre[start : start + chunk] for centre in centres]
        width = min(chunk, size - start)
        weights = buffer[: ends[-1] * width].view(ends[-1], width)
        small = small and all(
            _largest(stacked, rows[name], [shifts[number] for number in readers[name]]) <= LARGEST
            for name, _, stacked in blocks
        )
        if start == 0 and small:
            maximum.zero_()
        for name, span, stacked in blocks:
            logits = weights[span]
            torch.mm(stacked, rows[name].T, out=logits)
            for number in readers[name]:
                if (shift := shifts[number]) is not None:
                    weights[spans[number]] -= shift
            if small:
                total[span] += logits.exp_().sum(dim=1, keepdim=True)
            else:
                step(logits, maximum[span], total[span], shrink[span])
        if not small:
            sums *= shrink
        for (_, name), place in places.items():
            sums[place].addmm_(weights[place[0]], rows[name])
        del rows  # before the next are converted: one chunk of the banks at a time

    logsumexp = (maximum + total.log()).squeeze(1)
    sums /= total
    return [
        Relation(scaled[number], logsumexp[spans[number]], {name: sums[places[number, name]] for name in names})
        for number, names in enumerate(averages)
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
    """Return the means of values with their gradients, each with respect to the rows `(R, D)` at its place.

    They can be differentiated once.

    Example:
        >>> import torch
        >>> from cgh.streaming import attach
        >>> rows = torch.ones(2, 3, requires_grad=True)
        >>> [attached] = attach([torch.tensor([4.0, 6.0])], [rows], [torch.full((2, 3), 4.0)])
        >>> attached
        tensor(5., grad_fn=<_AttachBackward>)
        >>> attached.backward()
        >>> rows.grad[0]
        tensor([4., 4., 4.])
    """
    if torch.compiler.is_compiling():
        rows = [x.view_as(x) for x in rows]  # to it, what torch.func differentiates by needs no gradient itself
    attached: tuple[Tensor, ...] = _Attach.apply(*values, *rows, *gradients)
    return attached


class _Attach(torch.autograd.Function):
    """Means with gradients that were computed along with the values."""

    @staticmethod
    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        count = len(inputs) // 3  # a compiler passes a context before them where nothing needs a gradient
        return tuple(values.mean() for values in inputs[-3 * count : -2 * count])

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        count = len(output)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[count : 2 * count])
        ctx.dtypes = [x.dtype for x in inputs[count : 2 * count]]
        ctx.gradients = inputs[2 * count :]  # not saved as the rows are, which would go with the first value's backward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [
            None if grad is None else (grad * gradient).to(dtype)
            for grad, gradient, dtype in zip(grads, ctx.gradients, ctx.dtypes, strict=True)
        ]
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
