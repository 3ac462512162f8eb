"""Colour jitter, grey and Gaussian blur for a batch of images, each by parameters of its own.

The host draws uniform numbers, a row an image, which reach the device in one transfer and become parameters there.
Every image takes the same few operations: one that is left as it is has parameters that leave it so. Nothing waits for
the device, and nothing's shape depends on what was drawn. On CUDA all of it is the kernels of `cgh.colour_kernels`.

Brightness, contrast and saturation are all `a x + s grey(x) + m mean(grey(x))`, clamped to [0, 1]; so is grey itself.
The hue, which is dear, is turned at one place: three such steps come before it and three after, as many of them the
identity as the image's own order leaves empty.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

P = (0.8, 0.2, 0.5)
"""Of jitter, grey and blur."""
SIGMA = (0.1, 2.0)
"""Of the blur, in pixels."""
RADIUS = math.ceil(3 * SIGMA[1])
"""Pixels that the widest blur reaches: three standard deviations, as every one does."""
LUMA = (0.2989, 0.587, 0.114)
"""What red, green and blue count in grey, as torchvision has it."""
BEFORE, AFTER = 3, 4
"""Affine steps before and after the hue is turned, of which the last makes grey."""
TURNS = 3 * (BEFORE + AFTER)
"""Where in a row of parameters the turns of the hue stand, after the affine steps' `a`, `s` and `m`."""
WEIGHTS = TURNS + 2
"""Where the blur's weights stand, from the centre outwards; before them, how many there are besides the centre's."""
COLUMNS = WEIGHTS + RADIUS + 1
DRAWN = 12
"""Uniform numbers of an image: whether jitter, grey and blur; four factors, their four places, and the blur's sigma."""


def draw(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return what `Draws` of `count` images are made of, on the host, from torch's global generator by default."""
    return torch.rand(count, DRAWN, generator=generator, device="cpu")


class Draws:
    """What uniform numbers decide of the colours and the blur of images, where these numbers are.

    Args:
        uniform: of `draw`, `(count, DRAWN)`.
        jitter: strengths of brightness, contrast, saturation and hue.

    Attributes:
        jitters, greys, blurs: whether, `(count,)`.
        factors: of brightness, contrast, saturation, and turns of the hue, `(count, 4)`.
        order: of these four, `(count, 4)`.
        sigma: of the blur, in pixels, `(count,)`.
    """

    def __init__(self, uniform: Tensor, jitter: Sequence[float]) -> None:
        self.jitters, self.greys, self.blurs = (uniform[:, i] < p for i, p in enumerate(P))
        columns = zip(uniform[:, 3:7].unbind(1), ranges(jitter), strict=True)
        self.factors = torch.stack([low + (high - low) * x for x, (low, high) in columns], dim=1)
        self.order = uniform[:, 7:11].argsort(dim=1)
        self.sigma = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * uniform[:, 11]

    def parameters(self) -> Tensor:
        """Return them as what `distort` and `blur` read, `(count, COLUMNS)`."""
        brightness, contrast, saturation = self.factors[:, :3].where(self.jitters[:, None], 1.0).unbind(1)
        turns = self.factors[:, 3] * self.jitters
        zero, grey = torch.zeros_like(turns), self.greys.to(turns.dtype)
        steps = [brightness, zero, zero, contrast, zero, 1 - contrast, saturation, 1 - saturation, zero]
        place = self.order.argsort(dim=1)
        slot = place[:, :3] + (BEFORE - 1) * (place[:, :3] > place[:, 3:])
        affine = turns.new_zeros(len(turns), BEFORE + AFTER, 3)
        affine[:, :, 0] = 1.0
        affine.scatter_(1, slot[:, :, None].expand(-1, -1, 3), torch.stack(steps, dim=1).view(-1, 3, 3))
        affine[:, -1, :2] = torch.stack([1 - grey, grey], dim=1)
        radius = (3 * self.sigma).ceil() * self.blurs
        distance = torch.arange(RADIUS + 1, device=turns.device)
        weights = torch.exp(-(distance**2) / (2 * self.sigma[:, None] ** 2)) * (distance <= radius[:, None])
        weights /= 2 * weights.sum(dim=1, keepdim=True) - weights[:, :1]
        return torch.cat([affine.flatten(1), turns[:, None], radius[:, None], weights], dim=1)


def ranges(jitter: Sequence[float]) -> list[tuple[float, float]]:
    """Return the least and greatest factor of brightness, contrast and saturation, and turn of the hue."""
    *strengths, hue = jitter
    return [*((max(0.0, 1.0 - strength), 1.0 + strength) for strength in strengths), (-hue, hue)]


def distort(x: Tensor, parameters: Tensor) -> Tensor:
    """Jitter and grey images `(N, 3, H, W)` from 0 to 1; the tensor given may be overwritten."""
    steps = parameters[:, :TURNS].unflatten(1, (BEFORE + AFTER, 3))[..., None, None, None]
    for a, s, m in steps[:, :BEFORE].movedim(0, 2):
        x = _affine(x, a, s, m)
    x = turn_hue(x, parameters[:, TURNS, None, None])
    for a, s, m in steps[:, BEFORE:].movedim(0, 2):
        x = _affine(x, a, s, m)
    return x


def _affine(x: Tensor, a: Tensor, s: Tensor, m: Tensor) -> Tensor:
    """`a x + s grey(x) + m mean(grey(x))` within [0, 1], in place."""
    red, green, blue = x.split(1, dim=1)
    grey = (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    mean = grey.mean(dim=(2, 3), keepdim=True)
    return x.mul_(a).add_(grey.mul_(s).add_(m * mean)).clamp_(0, 1)


def turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hues of images `(N, 3, H, W)` by turns `(N, 1, 1)`, to the same result as by way of HSV, but faster.

    Hues lie on a hexagon of side `chroma`, with red, green and blue at every second corner. A channel grows as its
    corner comes nearer: it is `low + clamp(2 chroma - distance, 0, chroma)`. Hence its distance now, to which the turn
    is added with the sign of the side on which the hue lies.
    """
    red, green, blue = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    distance = torch.sub((high + x.sum(1)).sub_(low, alpha=2)[:, None], x, alpha=2)
    distance.copysign_(torch.stack([green - blue, blue - red, red - green], dim=1))
    distance.add_((6 * turns * chroma)[:, None]).abs_()
    chroma, low = chroma[:, None], low[:, None]
    distance = torch.minimum(distance, torch.sub(6 * chroma, distance))
    return torch.sub(2 * chroma, distance).clamp_min_(0).minimum(chroma).add_(low)


def blur(x: Tensor, parameters: Tensor) -> Tensor:
    """Blur images `(N, 3, H, W)`, mirrored at the border: one convolution a side, of each plane by itself."""
    n, _, height, width = x.shape
    weights = parameters[:, WEIGHTS:]
    kernel = torch.cat([weights[:, 1:].flip(1), weights], dim=1).repeat_interleave(3, dim=0)
    planes = x.reshape(1, 3 * n, height, width)
    has_autocast = torch.amp.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if has_autocast else contextlib.nullcontext():
        planes = F.pad(planes, (0, 0, RADIUS, RADIUS), mode="reflect")
        planes = F.conv2d(planes, kernel[:, None, :, None], groups=3 * n)
        planes = F.pad(planes, (RADIUS, RADIUS, 0, 0), mode="reflect")
        return F.conv2d(planes, kernel[:, None, None, :], groups=3 * n).view(x.shape)


def blur_one(x: Tensor, sigma: float) -> Tensor:
    """Blur an image `(3, H, W)` as `blur` does: sums of shifted images, faster for it than a convolution."""
    radius = math.ceil(3 * sigma)
    weights = torch.exp(-(torch.arange(radius + 1, device="cpu") ** 2) / (2 * sigma**2))
    centre, *others = (weights / (2 * weights.sum() - 1)).tolist()
    for dim, pad in ((1, (0, 0, radius, radius)), (2, (radius, radius, 0, 0))):
        padded, size = F.pad(x, pad, mode="reflect"), x.shape[dim]
        x = centre * x
        for i, weight in enumerate(others, start=1):
            for shifted in (radius - i, radius + i):
                x.add_(padded.narrow(dim, shifted, size), alpha=weight)
    return x
