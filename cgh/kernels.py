"""The step of `cgh.streaming` between its two matrix products, as one Triton kernel for CUDA.

What lies between the products is bound by memory, not by arithmetic. Plain torch reads the logits four times and writes
them twice; here they are read twice, the second time from the cache, and their exponentials written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits that a program holds at a time."""


def exponentiate(logits: Tensor, maximum: Tensor, total: Tensor, shrink: Tensor, weights: Tensor) -> None:
    """`cgh.streaming.exponentiate` in one kernel, for contiguous float32 logits and weights of any dtype."""
    with torch.cuda.device_of(logits):
        _exponentiate[(len(logits),)](
            logits, maximum, total, shrink, weights, logits.shape[1], BLOCK=BLOCK, num_warps=8
        )


# Triton compiles from the source: it has no types, and takes none.
@triton.jit  # type: ignore[untyped-decorator]
def _exponentiate(logits, maximum, total, shrink, weights, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One program for each row."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * columns
    weights += row.to(tl.int64) * columns
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
        tl.store(weights + offsets, x.to(weights.dtype.element_ty), mask=offsets < columns)

    factor = tl.exp(previous - peak)
    tl.store(maximum + row, peak)
    tl.store(shrink + row, factor)
    tl.store(total + row, tl.load(total + row) * factor + tl.sum(sums, axis=0))
