"""`cgh.colours` as Triton kernels for CUDA, with the normalisation: a pass or two over the bytes, and two for the blur.

A program holds `BLOCK` pixels of one image, whose parameters it reads for itself. The mean grey that the contrast needs
comes from a pass of its own, as sums of blocks that are added in the same order every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cgh.colours import AFTER, BEFORE, COLUMNS, LUMA, TURNS, WEIGHTS

BLOCK = 1024
"""Pixels of an image that a program holds at a time."""

# Triton lets kernels read globals of this type alone.
_COLUMNS = tl.constexpr(COLUMNS)
_TURNS = tl.constexpr(TURNS)
_WEIGHTS = tl.constexpr(WEIGHTS)
_BEFORE = tl.constexpr(BEFORE)
_AFTER = tl.constexpr(AFTER)
_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in LUMA)


def augment(view: Tensor, parameters: Tensor | None, blurs: bool, mean: Tensor, std: Tensor, output: Tensor) -> None:
    """Write a view into `output`: distorted and blurred by its parameters if there are any, then normalised.

    Args:
        view: uint8 `(N, 3, H, W)`, of any strides.
        parameters: `(N, COLUMNS)`, contiguous; see `cgh.colours.Draws`.
        blurs: whether to blur.
        mean: of the channels, from 0 to 255.
        std: likewise.
        output: `(N, 3, H, W)`, of any strides and floating point dtype.
    """
    n, _, height, width = view.shape
    blocks = triton.cdiv(height * width, BLOCK)
    colour, blurs = parameters is not None, parameters is not None and blurs
    with torch.cuda.device_of(view):
        sums = torch.empty(n, blocks, device=view.device) if colour else mean
        first = torch.empty(n, 3, height, width, device=view.device) if blurs else output
        sizes = height, width, blocks
        if colour:
            _grey_sums[n, blocks](view, *view.stride(), parameters, sums, *sizes, BLOCK=BLOCK)
        _colour[n, blocks](
            view,
            *view.stride(),
            parameters if colour else mean,
            sums,
            mean,
            std,
            first,
            *first.stride(),
            *sizes,
            COLOUR=colour,
            BLOCKS=triton.next_power_of_2(blocks),
            BLOCK=BLOCK,
        )
        if blurs:
            second = torch.empty_like(first)
            for axis, source, target in ((0, first, second), (1, second, output)):
                _blur[3 * n, blocks](
                    source, parameters, target, *target.stride(), height, width, AXIS=axis, BLOCK=BLOCK
                )


# Triton compiles from the source: it has no types, and takes none.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"


@triton.jit
def _affine(red, green, blue, step, mean):
    """One affine step of `cgh.colours`, and the grey before it."""
    a, s, m = tl.load(step), tl.load(step + 1), tl.load(step + 2)
    grey = _RED * red + _GREEN * green + _BLUE * blue
    added = s * grey + m * mean
    red = tl.minimum(tl.maximum(a * red + added, 0.0), 1.0)
    green = tl.minimum(tl.maximum(a * green + added, 0.0), 1.0)
    blue = tl.minimum(tl.maximum(a * blue + added, 0.0), 1.0)
    return red, green, blue, grey, m


@triton.jit
def _turned(channel, side, others, chroma, low, turns):
    """One channel of `cgh.colours.turn_hue`; `side` is positive where the hue lies on the way to the next corner."""
    distance = tl.abs(others - 2 * channel)
    distance = tl.abs(tl.where(side < 0, -distance, distance) + 6 * turns * chroma)
    distance = tl.minimum(distance, 6 * chroma - distance)
    return tl.minimum(tl.maximum(2 * chroma - distance, 0.0), chroma) + low


@triton.jit
def _turn_hue(red, green, blue, turns):
    high = tl.maximum(red, tl.maximum(green, blue))
    low = tl.minimum(red, tl.minimum(green, blue))
    chroma = high - low
    others = high + red + green + blue - 2 * low
    return (
        _turned(red, green - blue, others, chroma, low, turns),
        _turned(green, blue - red, others, chroma, low, turns),
        _turned(blue, red - green, others, chroma, low, turns),
    )


@triton.jit
def _load(images, n_stride, c_stride, h_stride, w_stride, width, pixels, inside):
    """Red, green and blue of this program's pixels, from 0 to 255."""
    images += tl.program_id(0).to(tl.int64) * n_stride + (pixels // width) * h_stride + (pixels % width) * w_stride
    red = tl.load(images, mask=inside, other=0).to(tl.float32)
    green = tl.load(images + c_stride, mask=inside, other=0).to(tl.float32)
    blue = tl.load(images + 2 * c_stride, mask=inside, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _grey_sums(
    images, n_stride, c_stride, h_stride, w_stride, parameters, sums, height, width, blocks, BLOCK: tl.constexpr
):
    """The sum of this block's grey as the contrast finds it, which is where `m` is not 0."""
    pixels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < height * width
    red, green, blue = _load(images, n_stride, c_stride, h_stride, w_stride, width, pixels, inside)
    red, green, blue = red / 255, green / 255, blue / 255
    parameters += tl.program_id(0) * _COLUMNS
    found = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(_BEFORE):
        red, green, blue, grey, m = _affine(red, green, blue, parameters + 3 * i, 0.0)
        found = tl.where(m != 0, grey, found)
    red, green, blue = _turn_hue(red, green, blue, tl.load(parameters + _TURNS))
    for i in tl.static_range(_BEFORE, _BEFORE + _AFTER):
        red, green, blue, grey, m = _affine(red, green, blue, parameters + 3 * i, 0.0)
        found = tl.where(m != 0, grey, found)
    total = tl.sum(tl.where(inside, found, 0.0), axis=0)
    tl.store(sums + tl.program_id(0) * blocks + tl.program_id(1), total)


@triton.jit
def _colour(
    images,
    n_stride,
    c_stride,
    h_stride,
    w_stride,
    parameters,
    sums,
    means,
    stds,
    output,
    out_n_stride,
    out_c_stride,
    out_h_stride,
    out_w_stride,
    height,
    width,
    blocks,
    COLOUR: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of an image, distorted if `COLOUR`, and normalised."""
    image = tl.program_id(0)
    pixels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < height * width
    red, green, blue = _load(images, n_stride, c_stride, h_stride, w_stride, width, pixels, inside)
    if COLOUR:
        block = tl.arange(0, BLOCKS)
        total = tl.sum(tl.load(sums + image * blocks + block, mask=block < blocks, other=0.0), axis=0)
        mean = total / (height * width)
        red, green, blue = red / 255, green / 255, blue / 255
        parameters += image * _COLUMNS
        for i in tl.static_range(_BEFORE):
            red, green, blue, _, _ = _affine(red, green, blue, parameters + 3 * i, mean)
        red, green, blue = _turn_hue(red, green, blue, tl.load(parameters + _TURNS))
        for i in tl.static_range(_BEFORE, _BEFORE + _AFTER):
            red, green, blue, _, _ = _affine(red, green, blue, parameters + 3 * i, mean)
        red, green, blue = red * 255, green * 255, blue * 255
    red = (red - tl.load(means)) / tl.load(stds)
    green = (green - tl.load(means + 1)) / tl.load(stds + 1)
    blue = (blue - tl.load(means + 2)) / tl.load(stds + 2)
    output += image.to(tl.int64) * out_n_stride + (pixels // width) * out_h_stride + (pixels % width) * out_w_stride
    tl.store(output, red.to(output.dtype.element_ty), mask=inside)
    tl.store(output + out_c_stride, green.to(output.dtype.element_ty), mask=inside)
    tl.store(output + 2 * out_c_stride, blue.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _blur(
    planes,
    parameters,
    output,
    out_n_stride,
    out_c_stride,
    out_h_stride,
    out_w_stride,
    height,
    width,
    AXIS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of a plane, blurred along its height (`AXIS` 0) or its width (1), and mirrored at the border."""
    plane = tl.program_id(0).to(tl.int64)
    pixels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < height * width
    row, column = pixels // width, pixels % width
    planes += plane * height * width
    parameters += (plane // 3) * _COLUMNS + _WEIGHTS
    radius = tl.load(parameters - 1).to(tl.int32)
    total = tl.load(parameters) * tl.load(planes + pixels, mask=inside, other=0.0)
    for i in range(1, radius + 1):
        if AXIS == 0:
            before, after = tl.abs(row - i), row + i
            after = tl.where(after < height, after, 2 * (height - 1) - after)
            before, after = before * width + column, after * width + column
        else:
            before, after = tl.abs(column - i), column + i
            after = tl.where(after < width, after, 2 * (width - 1) - after)
            before, after = row * width + before, row * width + after
        sides = tl.load(planes + before, mask=inside, other=0.0) + tl.load(planes + after, mask=inside, other=0.0)
        total += tl.load(parameters + i) * sides
    output += (plane // 3) * out_n_stride + (plane % 3) * out_c_stride + row * out_h_stride + column * out_w_stride
    tl.store(output, total.to(output.dtype.element_ty), mask=inside)
