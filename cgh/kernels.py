"""Relations to a memory on CUDA: products, softmax and mean row of a query in one Triton kernel.

A program takes some rows of a query and a part of the bank, and keeps their sums in registers while it reads that part
tile by tile: no logit is ever written. As many parts are read at once as the GPU has processors for; a second, small
kernel puts their sums together. Products are in half precision, so that tensor cores compute them, and sums in float32;
`exponentiate` is for the products that are not, see `cgh.streaming`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

BLOCK = 4096
"""Logits that a program of `exponentiate` holds at a time."""

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


def relate(query: Tensor, bank: Tensor, target: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return `log sum_j exp(s_j)` and `sum_j softmax(s)_j target_j`, `(R,)` and `(R, E)`; None if no tiling fits.

    The logits are `s = query . bank - centre`.

    Args:
        query: `(R, D)` in half precision, in which products are computed; divided by the temperature.
        bank: `(K, D)`, of any floating point dtype.
        target: `(K, E)`, which may be the bank.
        centre: `(K,)`, divided by the temperature.
    """
    (rows, width), (size, target_width) = query.shape, target.shape
    same = bank.data_ptr() == target.data_ptr() and bank.stride() == target.stride() and bank.shape == target.shape
    query, bank, target = (x if x.stride(1) == 1 else x.contiguous() for x in (query, bank, target))
    limit = limits(query.device)
    for tiling in tilings(rows, width, target_width, same, max(bank.itemsize, target.itemsize), limit.shared):
        key = (tiling, query.device, width, target_width, same, query.dtype, bank.dtype, target.dtype, centre is None)
        if key in _too_large:
            continue
        blocks, slices = divided(rows, tiling.rows), divided(target_width, tiling.columns)
        parts = max(1, limit.processors * (2 if max(width, target_width) <= 128 else 1) // (blocks * slices))
        part = divided(divided(size, parts), tiling.bank_rows) * tiling.bank_rows
        parts = divided(size, part)
        maximum, total = query.new_empty(2, parts, rows, dtype=torch.float32)
        sums = maximum.new_empty(parts, rows, target_width)
        with torch.cuda.device_of(query):
            try:
                _relate[blocks, parts, slices](
                    query, bank, target, centre, maximum, total, sums, rows, size, part,
                    query.stride(0), bank.stride(0), target.stride(0),
                    SAME=same, CENTRED=centre is not None,
                    WIDTH=width, TARGET_WIDTH=target_width, D=padded(width), E=tiling.columns,
                    ROWS=tiling.rows, BANK_ROWS=tiling.bank_rows, num_warps=tiling.warps, num_stages=tiling.stages,
                )  # fmt: skip
            except OutOfResources:
                _too_large.add(key)
                continue
            logsumexp, mean = maximum.new_empty(rows), maximum.new_empty(rows, target_width)
            _combine[(rows,)](
                maximum, total, sums, logsumexp, mean, rows, parts,
                WIDTH=target_width, D=padded(target_width), PARTS=power_of_2(parts), num_warps=4,
            )  # fmt: skip
        return logsumexp, mean
    return None


# Triton compiles from the source: it has no types, and takes none.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"


@triton.jit
def _relate(
    query, bank, target, centre, maximum, total, sums, rows, size, part, query_stride, bank_stride, target_stride,
    SAME: tl.constexpr, CENTRED: tl.constexpr,
    WIDTH: tl.constexpr, TARGET_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, BANK_ROWS: tl.constexpr,
):  # fmt: skip
    """One program for some rows, a part of the bank, and a slice of the target's columns."""
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
        logits = tl.dot(z, tl.trans(m)) * LOG2E
        if CENTRED:
            logits -= LOG2E * tl.load(centre + column, mask=there, other=0.0)[None, :]
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
def _combine(
    maximum, total, sums, logsumexp, mean, rows, parts,
    WIDTH: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program for each row: the sums over the parts of the bank, brought to one maximum."""
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    peaks = tl.load(maximum + part * rows + row, mask=part < parts, other=float("-inf"))
    peak = tl.max(peaks, axis=0)
    weights = tl.load(total + part * rows + row, mask=part < parts, other=0.0)
    weight = tl.sum(weights * tl.exp2(peaks - peak), axis=0)
    d = tl.arange(0, D)
    added = tl.zeros([D], tl.float32)
    for number in range(0, parts):
        place = number * rows + row
        factor = tl.exp2(tl.load(maximum + place) - peak)
        added += factor * tl.load(sums + place.to(tl.int64) * WIDTH + d, mask=d < WIDTH, other=0.0)
    tl.store(logsumexp + row, (peak + tl.log2(weight)) / LOG2E)
    tl.store(mean + row.to(tl.int64) * WIDTH + d, added / weight, mask=d < WIDTH)


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
