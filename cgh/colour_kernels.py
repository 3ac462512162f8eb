"""`cgh.colours` as Triton kernels for CUDA, with the normalisation: a pass or two over the bytes, and two for the blur.

A program holds `BLOCK` pixels of one image, whose parameters it reads for itself. The mean grey that the contrast needs
comes from a pass of its own, as sums of blocks that are added in the same order every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cgh.colours import AFTER, BEFORE, COLUMNS, DRAWN, LUMA, RADIUS, SIGMA, TURNS, WEIGHTS, P, ranges

BLOCK = 1024
"""Pixels of an image that a program holds at a time."""

IMAGES = 128
"""Images whose parameters a program works out."""

# Triton lets kernels read globals of this type alone.
_COLUMNS = tl.constexpr(COLUMNS)
_DRAWN = tl.constexpr(DRAWN)
_RADIUS = tl.constexpr(RADIUS)
_JITTERED, _GREYED, _BLURRED = (tl.constexpr(p) for p in P)
_LEAST_SIGMA, _SIGMAS = tl.constexpr(SIGMA[0]), tl.constexpr(SIGMA[1] - SIGMA[0])
_TURNS = tl.constexpr(TURNS)
_WEIGHTS = tl.constexpr(WEIGHTS)
_BEFORE = tl.constexpr(BEFORE)
_AFTER = tl.constexpr(AFTER)
_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in LUMA)


def parameters_of(uniform: Tensor, jitter: Sequence[float]) -> Tensor:
    """Return what `cgh.colours.Draws(uniform, jitter).parameters()` does, `(N, COLUMNS)`, by one kernel."""
    parameters = torch.empty(len(uniform), COLUMNS, device=uniform.device)
    limits = [limit for pair in ranges(jitter) for limit in pair]
    with torch.cuda.device_of(uniform):
        _parameters[(triton.cdiv(len(uniform), IMAGES),)](uniform, parameters, len(uniform), *limits, IMAGES=IMAGES)
    return parameters


def augment(
    view: Tensor,
    uniform: Tensor | None,
    jitter: Sequence[float],
    blurs: bool,
    mean: Tensor,
    std: Tensor,
    output: Tensor,
) -> None:
    """Write a view into `output`: distorted and blurred as drawn if anything was, then normalised.

    Args:
        view: uint8 `(N, 3, H, W)`, of any strides.
        uniform: of `cgh.colours.draw`, `(N, DRAWN)`, contiguous.
        jitter: as in `cgh.colours.Draws`.
        blurs: whether to blur.
        mean: of the channels, from 0 to 255.
        std: likewise.
        output: `(N, 3, H, W)`, of any strides and floating point dtype.
    """
    n, _, height, width = view.shape
    blocks = triton.cdiv(height * width, BLOCK)
    colour, blurs = uniform is not None, uniform is not None and blurs
    parameters = mean if uniform is None else parameters_of(uniform, jitter)
    with torch.cuda.device_of(view):
        sums = torch.empty(n, blocks, device=view.device) if colour else mean
        first = torch.empty(n, 3, height, width, device=view.device) if blurs else output
        sizes = height, width, blocks
        if colour:
            _grey_sums[n, blocks](view, *view.stride(), parameters, sums, *sizes, BLOCK=BLOCK)
        _colour[n, blocks](
            view,
            *view.stride(),
            parameters,
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
def _factor(uniform, number: tl.constexpr, inside, low, high, jittered, neutral):
    x = low + (high - low) * tl.load(uniform + 3 + number, mask=inside, other=0.0)
    return tl.where(jittered, x, neutral)


@triton.jit
def _parameters(
    uniform,
    parameters,
    images,
    brightness_low,
    brightness_high,
    contrast_low,
    contrast_high,
    saturation_low,
    saturation_high,
    turns_low,
    turns_high,
    IMAGES: tl.constexpr,
):
    """The parameters of some images, from what was drawn for each."""
    image = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    inside = image < images
    uniform += image * _DRAWN
    parameters += image * _COLUMNS
    jittered = tl.load(uniform, mask=inside, other=1.0) < _JITTERED
    grey = tl.where(tl.load(uniform + 1, mask=inside, other=1.0) < _GREYED, 1.0, 0.0)
    blurred = tl.load(uniform + 2, mask=inside, other=1.0) < _BLURRED
    brightness = _factor(uniform, 0, inside, brightness_low, brightness_high, jittered, 1.0)
    contrast = _factor(uniform, 1, inside, contrast_low, contrast_high, jittered, 1.0)
    saturation = _factor(uniform, 2, inside, saturation_low, saturation_high, jittered, 1.0)
    turns = _factor(uniform, 3, inside, turns_low, turns_high, jittered, 0.0)

    # The order is that of four numbers; a step after the hue goes to the slots that stand after it.
    first = tl.load(uniform + 7, mask=inside, other=0.0)
    second = tl.load(uniform + 8, mask=inside, other=0.0)
    third = tl.load(uniform + 9, mask=inside, other=0.0)
    hue = tl.load(uniform + 10, mask=inside, other=0.0)
    first_slot = _slot(first, second, third, hue)
    second_slot = _slot(second, first, third, hue)
    third_slot = _slot(third, first, second, hue)
    for slot in tl.static_range(_BEFORE + _AFTER - 1):
        a = tl.where(first_slot == slot, brightness, 1.0)
        a = tl.where(second_slot == slot, contrast, a)
        a = tl.where(third_slot == slot, saturation, a)
        tl.store(parameters + 3 * slot, a, mask=inside)
        tl.store(parameters + 3 * slot + 1, tl.where(third_slot == slot, 1 - saturation, 0.0), mask=inside)
        tl.store(parameters + 3 * slot + 2, tl.where(second_slot == slot, 1 - contrast, 0.0), mask=inside)
    tl.store(parameters + _TURNS - 3, 1 - grey, mask=inside)
    tl.store(parameters + _TURNS - 2, grey, mask=inside)
    tl.store(parameters + _TURNS - 1, tl.zeros_like(grey), mask=inside)
    tl.store(parameters + _TURNS, turns, mask=inside)

    sigma = _LEAST_SIGMA + _SIGMAS * tl.load(uniform + 11, mask=inside, other=0.0)
    radius = tl.where(blurred, tl.ceil(3 * sigma), 0.0)
    tl.store(parameters + _WEIGHTS - 1, radius, mask=inside)
    total = tl.zeros_like(sigma)
    for distance in tl.static_range(_RADIUS + 1):
        weight = tl.where(distance <= radius, tl.exp(-distance * distance / (2 * sigma * sigma)), 0.0)
        total += weight if distance == 0 else 2 * weight
    for distance in tl.static_range(_RADIUS + 1):
        weight = tl.where(distance <= radius, tl.exp(-distance * distance / (2 * sigma * sigma)), 0.0)
        tl.store(parameters + _WEIGHTS + distance, weight / total, mask=inside)


@triton.jit
def _slot(own, other, another, hue):
    """The slot of an affine step: its place among the four, and further on where it stands after the hue."""
    place = (other < own).to(tl.int32) + (another < own).to(tl.int32) + (hue < own).to(tl.int32)
    return place + (_BEFORE - 1) * (hue < own).to(tl.int32)


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
