"""The losses on CUDA: products, softmax and mean row of a relation in one Triton kernel, and what is left in another.

A program of the first takes some rows of a query and a part of the bank, and keeps their sums in registers while it
reads that part tile by tile: no logit is ever written. As many parts are read at once as the GPU has processors for.
The second puts their sums together, and makes of them the loss of a row and its gradient. Products are in half
precision, so that tensor cores compute them, and sums in float32; `exponentiate` is for the products that are not, see
`cgh.streaming`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from cgh.contexts import Banks, Contexts
from cgh.streaming import Query, Term

BLOCK = 4096
"""Logits that a program of `exponentiate` holds at a time."""

TILE = 16
"""Parts of the bank whose sums are put together at a time."""

LOG2E = tl.constexpr(1.4426950408889634)

WIDEST = 512
"""Rows of wider embeddings leave too little room in a processor's shared memory for this to be fast."""


class Tiling(NamedTuple):
    """How much a program of the kernel takes at a time."""

    rows: int
    """Of the query."""
    bank_rows: int
    columns: int
    """Of the mean row."""
    stages: int
    """Tiles of the bank that are loaded ahead."""
    warps: int


SMALL = (
    Tiling(64, 32, 512, 2, 8),
    Tiling(64, 32, 512, 1, 8),
    Tiling(32, 32, 512, 2, 8),
    Tiling(32, 32, 512, 1, 8),
    Tiling(32, 16, 512, 1, 8),
    Tiling(16, 16, 512, 1, 8),
)
TILINGS = {
    (True, True): (Tiling(64, 128, 128, 2, 4), Tiling(128, 64, 256, 2, 8), Tiling(64, 64, 512, 2, 8), *SMALL),
    (True, False): (Tiling(64, 128, 128, 2, 4), Tiling(64, 64, 512, 1, 8), *SMALL),
    (False, True): (Tiling(128, 64, 256, 2, 8), Tiling(128, 64, 256, 1, 8), *SMALL),
    (False, False): (Tiling(128, 64, 256, 2, 8), Tiling(128, 32, 256, 1, 8), *SMALL),
}
"""The fastest first, as measured on an H200; by whether the mean row wanted is of the query's own bank, and whether the
banks are in half precision."""


class Limits(NamedTuple):
    """What a GPU has."""

    shared: int
    """Bytes of shared memory that one program may have."""
    processors: int


# Asking takes longer than a small loss.
@cache
def limits(device: torch.device) -> Limits:
    """Return what a GPU has."""
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    # Before compute capability 8.0 a GPU has no bfloat16, and too little memory for more than small tiles.
    shared = properties["max_shared_mem"] if torch.cuda.get_device_capability(device) >= (8, 0) else 0
    return Limits(shared, properties["multiprocessor_count"])


@cache
def tilings(rows: int, width: int, target_width: int, same: bool, itemsize: int, shared: int) -> list[Tiling]:
    """Return the tilings that can fit, the fastest first; none if embeddings are too wide, or a bank is in float64.

    Args:
        rows: of the query.
        width: of the query and of its bank.
        target_width: of the bank whose mean row is wanted.
        same: whether that is the query's bank.
        itemsize: bytes of a bank's element; what is not in half precision is converted on the way.
        shared: bytes of shared memory that one program may have.

    Example:
        >>> from cgh.kernels import tilings
        >>> tilings(256, 512, 512, True, 2, shared=227 * 1024)[0], tilings(256, 4096, 4096, True, 2, shared=227 * 1024)
        (Tiling(rows=64, bank_rows=64, columns=512, stages=2, warps=8), [])
    """
    width, target_width = padded(width), padded(target_width)
    if max(width, target_width if same else 0) > WIDEST or itemsize > 4:
        return []
    fitting = []
    for tiling in TILINGS[same, itemsize == 2]:
        columns = min(target_width, tiling.columns)
        tile = tiling.bank_rows * (width + (0 if same else columns))
        if (
            (columns == target_width or not same)
            and tiling.rows * columns <= 64 * 512  # sums, in registers
            and (tiling.rows <= 64 or rows > 64)
            # Only a lower bound: what the compiler adds is found at the first launch.
            and 2 * (tiling.rows * width + tile * tiling.stages) <= shared
        ):
            warps = 4 if tiling.rows <= 64 and max(width, columns) <= 128 else tiling.warps
            fitting.append(tiling._replace(columns=columns, warps=warps))
    return fitting


def padded(width: int) -> int:
    """Return the width of the tile that holds rows of `width`: a power of two that tensor cores take."""
    return max(16, power_of_2(width))


# Triton's own functions for both take longer than all else that a launch needs.
def power_of_2(x: int) -> int:
    """Return the smallest power of two that is not less than `x`."""
    return 1 << (x - 1).bit_length()


def divided(x: int, y: int) -> int:
    """Return `x / y`, rounded up."""
    return -(-x // y)


_too_large: set[tuple[Any, ...]] = set()
"""Tilings that a first launch found not to fit: by them, device, widths, dtypes and options."""


class TooLargeError(Exception):
    """No tiling of the kernel fits: the embeddings are too wide for the GPU, or a bank is in float64."""


class Sums(NamedTuple):
    """A relation of rows to a bank, over `P` parts of the bank."""

    maximum: Tensor
    """Largest logit times `LOG2E`, `(P, R)`."""
    total: Tensor
    """Sum of the exponentials, relative to that of the maximum, `(P, R)`."""
    added: Tensor
    """Sum of the rows by their exponentials, likewise, `(P, R, E)`."""


def cross_entropies(
    pairs: Sequence[tuple[str, str]],
    students: Sequence[Query],
    teachers: Sequence[Query],
    memory: Banks,
    products: torch.dtype,
) -> list[Term]:
    """`cgh.streaming.cross_entropies` with products in half precision, `products`.

    Raises:
        TooLargeError: no tiling of the kernel fits.
    """
    found = {}
    with torch.cuda.device_of(students[0].embeddings):
        queries = _converted([*students, *teachers], memory, products)
        for learner in queries[: len(students)]:
            guides = [guide for guide in queries[len(students) :] if (learner.bank, guide.bank) in pairs]
            for guide, term in zip(guides, _cross_entropies(learner, guides, memory), strict=True):
                found[learner.bank, guide.bank] = term
    return [found[pair] for pair in pairs]


def _cross_entropies(learner: Query, guides: Sequence[Query], memory: Banks) -> Iterator[Term]:
    """Yield the term of a learner with each guide, in the dtype of the products."""
    # Rounded as in the relation, so that much of the error is the same in both parts of the loss.
    z, bank = _readable(learner.embeddings), memory[learner.bank]
    sums = relate(learner, bank, bank)
    for guide in guides:
        # Of one guide at a time: the sums are what takes memory.
        other = relate(guide, memory[guide.bank], bank)
        values, gradient = sums.total.new_empty(len(z)), sums.total.new_empty(z.shape)
        _cross_entropy[(len(z),)](
            z, *sums, *other, values, gradient, len(z), len(sums.total), len(guide.embeddings), len(other.total),
            1 / learner.temperature, z.stride(0), WIDTH=z.shape[1], D=padded(z.shape[1]),
            PARTS=power_of_2(len(sums.total)), OTHER_PARTS=power_of_2(len(other.total)), TILE=TILE, num_warps=4,
        )  # fmt: skip
        del other
        yield values, gradient


def infonce(queries: Sequence[Query], positives: Contexts, memory: Banks, products: torch.dtype) -> list[Term]:
    """`cgh.streaming.infonce` with products in half precision, `products`.

    Raises:
        TooLargeError: no tiling of the kernel fits.
    """
    terms = []
    with torch.cuda.device_of(queries[0].embeddings):
        for query, converted in zip(queries, _converted(queries, memory, products), strict=True):
            z, positive, bank = _readable(query.embeddings), _readable(positives[query.bank]), memory[query.bank]
            sums = relate(converted, bank, bank)
            values, gradient = sums.total.new_empty(len(z)), sums.total.new_empty(z.shape)
            _infonce[(len(z),)](
                z, positive, *sums, values, gradient, len(z), len(sums.total),
                1 / query.temperature, z.stride(0), positive.stride(0),
                WIDTH=z.shape[1], D=padded(z.shape[1]), PARTS=power_of_2(len(sums.total)), TILE=TILE, num_warps=4,
            )  # fmt: skip
            del sums
            terms.append((values, gradient))
    return terms


def _converted(queries: Sequence[Query], memory: Banks, products: torch.dtype) -> Sequence[Query]:
    """Return queries with their embeddings in the dtype of the products, all converted by one launch.

    Converted in the kernel of the relation, they would leave too few registers for its products.

    Raises:
        TooLargeError: one of them is too wide, which is seen before a relation of another is computed.
    """
    if any(memory[query.bank].shape[1] > WIDEST for query in queries):
        raise TooLargeError
    given = [query.embeddings for query in queries]
    if all(x.dtype == products for x in given):
        return queries
    converted = [x.new_empty(x.shape, dtype=products) for x in given]
    torch._foreach_copy_(converted, given)
    return [query._replace(embeddings=x) for query, x in zip(queries, converted, strict=True)]


def relate(query: Query, bank: Tensor, target: Tensor) -> Sums:
    """Return sums of `exp(s_j)` and of `exp(s_j) target_j`, with the logits `s = (z . bank - centre) / temperature`.

    Args:
        query: `z` is `(R, D)`, in half precision, in which products are computed.
        bank: `(K, D)`, of any floating point dtype.
        target: `(K, E)`, likewise, which may be the bank.

    Raises:
        TooLargeError: no tiling of the kernel fits.
    """
    same = bank.data_ptr() == target.data_ptr() and bank.stride() == target.stride() and bank.shape == target.shape
    z, bank, target = (_readable(x) for x in (query.embeddings, bank, target))
    (rows, width), (size, target_width) = z.shape, target.shape
    centred = query.centre is not None
    limit = limits(z.device)
    for tiling in tilings(rows, width, target_width, same, max(bank.itemsize, target.itemsize), limit.shared):
        key = (tiling, z.device, width, target_width, same, z.dtype, bank.dtype, target.dtype, centred)
        if key in _too_large:
            continue
        blocks, slices = divided(rows, tiling.rows), divided(target_width, tiling.columns)
        parts = max(1, limit.processors * (2 if max(width, target_width) <= 128 else 1) // (blocks * slices))
        part = divided(divided(size, parts), tiling.bank_rows) * tiling.bank_rows
        parts = divided(size, part)
        maximum, total = z.new_empty(2, parts, rows, dtype=torch.float32)
        added = maximum.new_empty(parts, rows, target_width)
        try:
            _relate[blocks, parts, slices](
                z, bank, target, query.centre, maximum, total, added, rows, size, part, 1 / query.temperature,
                z.stride(0), bank.stride(0), target.stride(0), SAME=same, CENTRED=centred,
                WIDTH=width, TARGET_WIDTH=target_width, D=padded(width), E=tiling.columns,
                ROWS=tiling.rows, BANK_ROWS=tiling.bank_rows, num_warps=tiling.warps, num_stages=tiling.stages,
            )  # fmt: skip
        except OutOfResources:
            _too_large.add(key)
            continue
        return Sums(maximum, total, added)
    raise TooLargeError


def _readable(x: Tensor) -> Tensor:
    """Return `x` with its rows in one piece each."""
    return x if x.stride(1) == 1 else x.contiguous()


# Triton compiles from the source: it has no types, and takes none.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"


@triton.jit
def _relate(
    query, bank, target, centre, maximum, total, sums, rows, size, part, scale,
    query_stride, bank_stride, target_stride,
    SAME: tl.constexpr, CENTRED: tl.constexpr,
    WIDTH: tl.constexpr, TARGET_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, BANK_ROWS: tl.constexpr,
):  # fmt: skip
    """One program for some rows, a part of the bank, and a slice of the target's columns; scale is 1 / temperature."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    d = tl.arange(0, D)
    e = tl.program_id(2) * E + tl.arange(0, E)
    z = tl.load(query + row[:, None] * query_stride + d[None, :], mask=here[:, None] & (d < WIDTH)[None, :], other=0.0)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    added = tl.zeros([ROWS, E], tl.float32)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, size)
    for start in range(first, last, BANK_ROWS):
        column = start + tl.arange(0, BANK_ROWS)
        there = column < last
        m = tl.load(
            bank + column[:, None].to(tl.int64) * bank_stride + d[None, :],
            mask=there[:, None] & (d < WIDTH)[None, :],
            other=0.0,
        ).to(z.dtype)
        logits = tl.dot(z, tl.trans(m)) * (LOG2E * scale)
        if CENTRED:
            logits -= (LOG2E * scale) * tl.load(centre + column, mask=there, other=0.0).to(tl.float32)[None, :]
        logits = tl.where(there[None, :], logits, float("-inf"))
        highest = tl.max(logits, axis=1)
        # At every tile: a branch would cost more, as products then do not run ahead.
        raised = tl.maximum(peak, highest)
        shrink = tl.exp2(peak - raised)
        weight *= shrink
        added *= shrink[:, None]
        peak = raised
        p = tl.exp2(logits - peak[:, None])
        weight += tl.sum(p, axis=1)
        if SAME:
            v = m
        else:
            v = tl.load(
                target + column[:, None].to(tl.int64) * target_stride + e[None, :],
                mask=there[:, None] & (e < TARGET_WIDTH)[None, :],
                other=0.0,
            ).to(z.dtype)
        added = tl.dot(p.to(z.dtype), v, added)

    place = tl.program_id(1) * rows + row
    tl.store(maximum + place, peak, mask=here)
    tl.store(total + place, weight, mask=here)
    tl.store(
        sums + place[:, None].to(tl.int64) * TARGET_WIDTH + e[None, :],
        added,
        mask=here[:, None] & (e < TARGET_WIDTH)[None, :],
    )


@triton.jit
def _gathered(
    maximum, total, sums, row, rows, parts,
    WIDTH: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp and the mean row of one row: the sums over the parts of the bank, brought to one maximum."""
    part = tl.arange(0, PARTS)
    peaks = tl.load(maximum + part * rows + row, mask=part < parts, other=float("-inf"))
    peak = tl.max(peaks, axis=0)
    weights = tl.load(total + part * rows + row, mask=part < parts, other=0.0)
    weight = tl.sum(weights * tl.exp2(peaks - peak), axis=0)
    d = tl.arange(0, D)
    added = tl.zeros([D], tl.float32)
    for start in range(0, parts, TILE):
        number = start + tl.arange(0, TILE)
        place = number * rows + row
        factor = tl.exp2(tl.load(maximum + place, mask=number < parts, other=float("-inf")) - peak)
        tile = tl.load(
            sums + place[:, None].to(tl.int64) * WIDTH + d[None, :],
            mask=(number < parts)[:, None] & (d < WIDTH)[None, :],
            other=0.0,
        )
        added += tl.sum(factor[:, None] * tile, axis=0)
    return (peak + tl.log2(weight)) / LOG2E, added / weight


@triton.jit
def _cross_entropy(
    query, maximum, total, sums, other_maximum, other_total, other_sums, values, gradient,
    rows, parts, other_rows, other_parts, scale, stride,
    WIDTH: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, OTHER_PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program for each row of a learner, whose views lie one after the other; the other sums are the guide's."""
    row = tl.program_id(0)
    d = tl.arange(0, D)
    z = tl.load(query + row.to(tl.int64) * stride + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    logsumexp, mean = _gathered(maximum, total, sums, row, rows, parts, WIDTH, D, PARTS, TILE)
    _, expected = _gathered(
        other_maximum, other_total, other_sums, row % other_rows, other_rows, other_parts, WIDTH, D, OTHER_PARTS, TILE
    )
    tl.store(values + row, logsumexp - scale * tl.sum(z * expected, axis=0))
    tl.store(gradient + row.to(tl.int64) * WIDTH + d, (mean - expected) * (scale / rows), mask=d < WIDTH)


@triton.jit
def _infonce(
    query, positive, maximum, total, sums, values, gradient, rows, parts, scale, stride, positive_stride,
    WIDTH: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program for each row."""
    row = tl.program_id(0)
    d = tl.arange(0, D)
    z = tl.load(query + row.to(tl.int64) * stride + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    t = tl.load(positive + row.to(tl.int64) * positive_stride + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    logsumexp, mean = _gathered(maximum, total, sums, row, rows, parts, WIDTH, D, PARTS, TILE)
    margin = scale * tl.sum(z * t, axis=0) - logsumexp
    y = tl.exp(-tl.abs(margin))
    # log(1 + y), of which float32 has no digit left where y is small.
    softplus = tl.where(y < 1e-3, y * (1 - y / 2), tl.log(1 + y))
    tl.store(values + row, tl.maximum(-margin, 0.0) + softplus)
    share = tl.where(margin > 0, y, 1.0) / (1 + y) * (scale / rows)  # sigmoid(-margin)
    tl.store(gradient + row.to(tl.int64) * WIDTH + d, share * (mean - t), mask=d < WIDTH)


def exponentiate(logits: Tensor, maximum: Tensor, total: Tensor, shrink: Tensor) -> None:
    """`cgh.streaming.exponentiate` in one kernel, for contiguous float32 logits.

    Plain torch reads the logits four times and writes them twice; here they are read twice, the second time from the
    cache, and their exponentials written once.
    """
    with torch.cuda.device_of(logits):
        _exponentiate[(len(logits),)](logits, maximum, total, shrink, logits.shape[1], BLOCK=BLOCK, num_warps=8)


@triton.jit
def _exponentiate(logits, maximum, total, shrink, columns, BLOCK: tl.constexpr):
    """One program for each row."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * columns
    previous = tl.load(maximum + row)

    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(logits + offsets, mask=offsets < columns, other=float("-inf")))
    peak = tl.maximum(previous, tl.max(largest, axis=0))

    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.exp(tl.load(logits + offsets, mask=offsets < columns, other=float("-inf")) - peak)
        sums += x
        tl.store(logits + offsets, x, mask=offsets < columns)

    factor = tl.exp(previous - peak)
    tl.store(maximum + row, peak)
    tl.store(shrink + row, factor)
    tl.store(total + row, tl.load(total + row) * factor + tl.sum(sums, axis=0))
