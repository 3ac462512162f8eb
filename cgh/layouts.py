"""What the axes of a layer's output mean: recognised where the shape leaves no doubt, named by the user where it does.

Three layouts hold a map: `NCHW`, channels last `NHWC`, and `NLC`, the tokens of a transformer, row by row, after its
prefix tokens (class and register tokens, which belong to no place). A backbone is taken to shrink both sides of an
image alike, so a map has the image's proportions, up to rounding.
"""

from __future__ import annotations

import math

from einops import rearrange
from torch import Tensor, nn

LAYOUTS = ("NCHW", "NHWC", "NLC")
PREFIX_TOKENS = {
    "class_token",
    "cls_token",
    "dist_token",
    "distillation_token",
    "reg_token",
    "reg_tokens",
    "register_tokens",
}


def declared_prefix_tokens(backbone: nn.Module) -> tuple[int, ...]:
    """Return the numbers of prefix tokens that a backbone's layers may have, by what it says of itself.

    timm's models count their prefix tokens; elsewhere they are parameters `(1, P, C)` of the usual names. A layer may
    lack them, as where they join late, so 0 is among the numbers. Of a backbone that says nothing there are none.

    Example:
        >>> import torchvision
        >>> from cgh.layouts import declared_prefix_tokens
        >>> declared_prefix_tokens(torchvision.models.vit_b_16())
        (0, 1)
    """
    if isinstance(count := getattr(backbone, "num_prefix_tokens", None), int):
        return tuple(sorted({0, count}))
    tokens = [p for name, p in backbone.named_parameters() if name.rpartition(".")[2] in PREFIX_TOKENS and p.ndim == 3]
    return (0, sum(p.shape[1] for p in tokens)) if tokens else ()


def takes_maps(layer: nn.Module) -> bool:
    """Return whether all of a layer's parameters are those of 2-d convolutions and norms, which take `NCHW` alone."""
    owners = [m for m in layer.modules() if m._parameters]
    return bool(owners) and all(
        isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm)) for m in owners
    )


def find_layout(
    shape: tuple[int, ...], image: tuple[int, int], convolutional: bool, prefix_tokens: tuple[int, ...]
) -> str | None:
    """Return the layout of a layer's output where there is no doubt, else None.

    Args:
        shape: of the output.
        image: height and width of the images.
        convolutional: `takes_maps` of the layer.
        prefix_tokens: how many the layer may have; of several, one alone has to fit the images.

    Example:
        >>> from cgh.layouts import find_layout
        >>> find_layout((2, 7, 7, 96), image=(224, 224), convolutional=False, prefix_tokens=())
        'NHWC'
    """
    if len(shape) == 4:
        channels_first, channels_last = _fits(shape[2:], image), _fits(shape[1:3], image)
        if convolutional:
            return "NCHW" if channels_first or not channels_last else None
        if channels_first != channels_last:
            return "NCHW" if channels_first else "NHWC"
    if len(shape) == 3 and len(_grids(shape[1], image, prefix_tokens)) == 1:
        return "NLC"
    return None


def to_map(x: Tensor, layout: str, image: tuple[int, int], prefix_tokens: tuple[int, ...]) -> Tensor | None:
    """Return `x` as a map `(N, C, H, W)`, or None where it is no such thing.

    Args:
        x: a layer's output.
        layout: one of `LAYOUTS`.
        image: height and width of the images; tokens form the grid of these proportions.
        prefix_tokens: how many the layer may have; none where that is empty.

    Example:
        >>> import torch
        >>> from cgh.layouts import to_map
        >>> to_map(torch.randn(2, 1 + 14 * 7, 192), "NLC", image=(224, 112), prefix_tokens=(0, 1)).shape
        torch.Size([2, 192, 14, 7])
    """
    if layout == "NLC":
        grids = _grids(x.shape[1], image, prefix_tokens or (0,)) if x.ndim == 3 else []
        if len(grids) != 1:
            return None
        prefix, height, width = grids[0]
        return rearrange(x[:, prefix:], "n (h w) c -> n c h w", h=height, w=width)
    if x.ndim != 4:
        return None
    return x if layout == "NCHW" else rearrange(x, "n h w c -> n c h w")


def _fits(sides: tuple[int, ...], image: tuple[int, int]) -> bool:
    """Whether a map of these sides has the image's proportions, both sides being rounded alike."""
    return abs(sides[0] * image[1] - sides[1] * image[0]) < max(image)


def _grids(tokens: int, image: tuple[int, int], prefix_tokens: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Every (prefix, height, width) that `tokens` may be."""
    grids = []
    for prefix in prefix_tokens:
        count = tokens - prefix
        # At most one grid of a count has the image's proportions; its short side is the root, rounded down or up.
        root = math.isqrt(max(count, 0) * min(image) // max(image))
        for short in (root, root + 1):
            if short and count > 0 and count % short == 0:
                sides = (short, count // short) if image[0] <= image[1] else (count // short, short)
                if _fits(sides, image):
                    grids.append((prefix, *sides))
    return grids
