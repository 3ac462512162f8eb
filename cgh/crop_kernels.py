"""`cgh.views.BatchCrops` as one Triton kernel for CUDA: from bytes to bytes, both views of all images at once."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Pixels of a crop that a program holds at a time."""


def crop(
    images: Tensor, uniform: Tensor, size: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the views that `uniform` decides, uint8 `(N, 3, size, size)` each.

    Args:
        images: uint8 `(N, 3, H, W)`, of any strides.
        uniform: of `BatchCrops.draw`, `(2, N, DRAWN)`, contiguous.
        size: side of the views in pixels.
        scale: least and greatest area, as a share of the image's.
        ratio: least and greatest ratio of the sides.
    """
    n, _, height, width = images.shape
    views = torch.empty(2, n, 3, size, size, dtype=torch.uint8, device=images.device)
    with torch.cuda.device_of(images):
        _crop[2 * n, triton.cdiv(size * size, BLOCK)](
            images, *images.stride(), uniform, views, n, height, width, size,
            *scale, *(math.log(side) for side in ratio), DRAWN=uniform.shape[-1], BLOCK=BLOCK,
        )  # fmt: skip
    strong, weak = views
    return strong, weak


# Triton compiles from the source: it has no types, and takes none.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"


@triton.jit
def _place(pixel, size, extent, centre, side):
    """Where pixels of a crop lie in an image of `side` pixels, which reaches from -1 to 1."""
    place = ((extent * ((2 * pixel + 1).to(tl.float32) / size - 1) + centre + 1) * side - 1) / 2
    place = tl.minimum(tl.maximum(place, 0.0), side - 1.0)
    first = tl.floor(place)
    return first.to(tl.int32), tl.minimum(first.to(tl.int32) + 1, side - 1), place - first


@triton.jit
def _crop(
    images, n_stride, c_stride, h_stride, w_stride, uniform, views, n, height, width, size,
    smallest, largest, narrowest, widest, DRAWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one view of one image."""
    view = tl.program_id(0)
    uniform += view * DRAWN
    # The first of ten boxes that fits, or else the whole image. From the last to the first, so that it stays.
    across, down = 1.0, 1.0
    for i in tl.static_range(9, -1, -1):
        area = (smallest + (largest - smallest) * tl.load(uniform + i)) * height * width
        ratio = tl.exp(narrowest + (widest - narrowest) * tl.load(uniform + 10 + i))
        x, y = tl.sqrt(area * ratio) / width, tl.sqrt(area / ratio) / height
        fits = (x <= 1) & (y <= 1)
        across, down = tl.where(fits, x, across), tl.where(fits, y, down)
    x_centre = (1 - across) * (2 * tl.load(uniform + 20) - 1)
    y_centre = (1 - down) * (2 * tl.load(uniform + 21) - 1)
    across = tl.where(tl.load(uniform + 22) < 0.5, -across, across)

    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < size * size
    left, right, x = _place(pixel % size, size, across, x_centre, width)
    top, bottom, y = _place(pixel // size, size, down, y_centre, height)
    images += (view % n).to(tl.int64) * n_stride
    views += view.to(tl.int64) * 3 * size * size + pixel
    for _ in tl.static_range(3):
        above, below = images + top * h_stride, images + bottom * h_stride
        upper = (1 - x) * tl.load(above + left * w_stride, mask=inside, other=0).to(tl.float32)
        upper += x * tl.load(above + right * w_stride, mask=inside, other=0).to(tl.float32)
        lower = (1 - x) * tl.load(below + left * w_stride, mask=inside, other=0).to(tl.float32)
        lower += x * tl.load(below + right * w_stride, mask=inside, other=0).to(tl.float32)
        tl.store(views, ((1 - y) * upper + y * lower + 0.5).to(tl.uint8), mask=inside)
        images += c_stride
        views += size * size
