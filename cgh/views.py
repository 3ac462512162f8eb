"""Views of an image, strong, weak and local: cropped on the host, coloured and blurred on the device.

The paper's augmentations, split where it is fast. `Crops` cuts every view from one decoded image, in bytes, in a
loader's workers. `Augmentation` does the rest to the whole batch, on the accelerator if there is one, each image with
parameters of its own. Without an accelerator `Colour` does it in the workers. `BatchCrops` is for images that lie on
the device already.

`cgh` does not import this module: `from cgh import views`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF
from typing_extensions import override

from cgh.extras import require

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of red, green and blue in ImageNet, from 0 to 1."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of red, green and blue in ImageNet, from 0 to 1."""

JITTER = (0.4, 0.4, 0.4, 0.1)
"""The paper's strengths of brightness, contrast, saturation and hue."""

RATIO = (3 / 4, 4 / 3)
P = (0.8, 0.2, 0.5)  # of jitter, grey and blur
SIGMA = (0.1, 2.0)
KERNEL = 2 * math.ceil(3 * SIGMA[1]) + 1  # three standard deviations a side, at the widest
WEAK = 1  # where the weak view stands among the views


class LocalCrops(TypedDict):
    """The arguments of `Crops` that describe local views."""

    local_sizes: tuple[int, ...]
    local_scales: tuple[tuple[float, float], ...]


MULTI_CROP: LocalCrops = {
    "local_sizes": (192, 160, 128, 96),
    "local_scales": ((0.172, 0.86), (0.143, 0.715), (0.114, 0.571), (0.086, 0.429)),
}
"""The paper's multi-crop, `Crops(**MULTI_CROP)`, beside a strong view of 224 pixels."""


class Crops:
    """Cuts the views of one image: random resized crops with random flips, as bytes.

    Draws from torch's global generator, as torchvision's transforms do.

    Args:
        size: side of the strong and the weak view in pixels.
        scale: least and greatest area of their crops, as a share of the image's.
        local_sizes: sides of multi-crop's further views; see `MULTI_CROP`.
        local_scales: areas of their crops, one pair for each.

    Shape:
        uint8 `(3, H, W)` -> `(strong, weak, *local)`, uint8 `(3, size, size)` each, channels last in memory.

    Raises:
        ValueError: sides below one, scales that are no shares, or not as many scales as sides.

    Example:
        >>> import torch
        >>> from cgh import views
        >>> image = torch.randint(256, (3, 375, 500), dtype=torch.uint8)
        >>> strong, weak = views.Crops(224)(image)
        >>> strong.shape
        torch.Size([3, 224, 224])
        >>> [view.shape[-1] for view in views.Crops(**views.MULTI_CROP)(image)]
        [224, 224, 192, 160, 128, 96]
    """

    def __init__(
        self,
        size: int = 224,
        scale: tuple[float, float] = (0.2, 1.0),
        local_sizes: Sequence[int] = (),
        local_scales: Sequence[tuple[float, float]] = (),
    ) -> None:
        if len(local_sizes) != len(local_scales):
            raise ValueError(f"{len(local_sizes)} local_sizes and {len(local_scales)} local_scales; give one for each.")
        self.views = [(size, scale), (size, scale), *zip(local_sizes, local_scales, strict=True)]
        for side, (low, high) in self.views:
            if side < 1 or not 0 < low <= high <= 1:
                raise ValueError(
                    f"a view of {side} pixels from {low} to {high} of the area; "
                    "a side is at least 1, and shares rise within (0, 1]."
                )

    def __call__(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._crop(image, size, scale) for size, scale in self.views)

    @staticmethod
    def _crop(image: Tensor, size: int, scale: tuple[float, float]) -> Tensor:
        top, left, height, width = RandomResizedCrop.get_params(image, list(scale), list(RATIO))
        crop = image[None, :, top : top + height, left : left + width]
        # torchvision's resized_crop, bit for bit; contiguous pixels are what makes PyTorch's fast kernel fast.
        crop = crop.contiguous(memory_format=torch.channels_last)
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        return TF.horizontal_flip(crop) if torch.rand(()) < 0.5 else crop


class BatchCrops:
    """Cuts a strong and a weak view of every image of a batch at once, on the device where it lies.

    For small images that fit there. Bilinear without antialiasing, which a crop that is enlarged does not need.

    Args:
        size: side of the views in pixels.
        scale: least and greatest area of a crop, as a share of the image's.

    Shape:
        uint8 `(N, 3, H, W)` -> `(strong, weak)`, uint8 `(N, 3, size, size)` each.

    Example:
        >>> import torch
        >>> from cgh import views
        >>> images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> strong, weak = views.BatchCrops(32)(images, seed=0)
        >>> strong.shape, strong.dtype
        (torch.Size([8, 3, 32, 32]), torch.uint8)
    """

    def __init__(self, size: int = 32, scale: tuple[float, float] = (0.2, 1.0)) -> None:
        self.size, self.scale = size, scale

    def __call__(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the views; `seed` alone decides them."""
        _check_batch(images, "the batch")
        # Not the stream of Augmentation, so that a step may use one seed for both.
        generator = torch.Generator().manual_seed(~seed)
        return self._crop(images, generator), self._crop(images, generator)

    def _crop(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        # As torchvision: the first of ten boxes that fits, or else the whole image.
        area = _uniform(*self.scale, n, 10, generator=generator) * height * width
        ratio = torch.exp(_uniform(math.log(RATIO[0]), math.log(RATIO[1]), n, 10, generator=generator))
        boxes = torch.stack([(area * ratio).sqrt() / width, (area / ratio).sqrt() / height], dim=2)
        fits = (boxes <= 1).all(dim=2)
        extent = boxes[torch.arange(n), fits.int().argmax(dim=1)].where(fits.any(dim=1, keepdim=True), 1.0)
        centre = (1 - extent) * (2 * torch.rand(n, 2, generator=generator) - 1)
        flip = torch.stack([1 - 2 * (torch.rand(n, generator=generator) < 0.5).float(), torch.ones(n)], dim=1)
        theta = torch.cat([torch.diag_embed(extent * flip), centre[:, :, None]], dim=2).to(images.device)
        grid = F.affine_grid(theta, [n, 3, self.size, self.size], align_corners=False)
        crops = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        return crops.round().clamp(0, 255).to(torch.uint8)


class Augmentation(nn.Module):
    """Jitters colours, greys and blurs strong and local views, then normalises all views, a whole batch at once.

    The paper's: colour jitter of 0.4, 0.4, 0.4, 0.1 (brightness, contrast, saturation, hue) for 80 % of the images, in
    an order of each image's own; grey for 20 %; Gaussian blur of 0.1 to 2 pixels for 50 %. What Pillow does, except
    that nothing is rounded to bytes on the way and that the blur is the Gaussian itself, where Pillow's is made of
    boxes. Needs kornia (the extra "examples").

    Args:
        mean: of the channels, from 0 to 1.
        std: likewise.
        colour: jitter, grey and blur; without, views are normalised only, after workers that apply `Colour`.
        blur: blur; small images do better without.
        jitter: strengths of brightness, contrast, saturation and hue.

    Shape:
        `[strong, weak, *local]`, uint8 `(N, 3, S, S)` each, and a seed -> a tuple of the same in float32.

    Raises:
        TypeError: views that are not uint8.
        ValueError: views that are not `(N, 3, S, S)`, or a jitter that has not four strengths.
        ImportError: kornia is not installed.

    Example:
        >>> import torch
        >>> from cgh import views
        >>> augment = views.Augmentation()
        >>> batch = torch.randint(256, (2, 8, 3, 32, 32), dtype=torch.uint8)
        >>> strong, weak = augment([batch[0], batch[1]], seed=0)
        >>> strong.shape, strong.dtype
        (torch.Size([8, 3, 32, 32]), torch.float32)
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        *,
        colour: bool = True,
        blur: bool = True,
        jitter: Sequence[float] = JITTER,
    ) -> None:
        super().__init__()
        self.colour, self.blur, self.jitter = colour, blur, _check_jitter(jitter)
        # As bytes, which spares those views a division that are normalised only.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)
        if colour:
            require("kornia", "examples")

    @override
    @torch.no_grad()
    def forward(self, views: Sequence[Tensor], seed: int) -> tuple[Tensor, ...]:
        """Return the views as the network wants them; `seed` alone decides, and no other generator is touched."""
        generator = torch.Generator().manual_seed(seed)
        output = []
        for i, view in enumerate(views):
            _check_batch(view, f"view {i}")
            x = _planes(view)
            if self.colour and i != WEAK:
                self._distort(x.div_(255), _Draws(len(x), self.jitter, generator))
                x.mul_(255)
            output.append(x.sub_(self.mean).div_(self.std))
        return tuple(output)

    def _distort(self, x: Tensor, draws: _Draws) -> None:
        enhance, filters = require("kornia.enhance", "examples"), require("kornia.filters", "examples")
        steps = (
            enhance.adjust_brightness_accumulative,
            enhance.adjust_contrast_with_mean_subtraction,
            enhance.adjust_saturation_with_gray_subtraction,
            lambda part, turns: enhance.adjust_hue(part, 2 * math.pi * turns),
        )
        for turn in draws.order.T:
            for i, step in enumerate(steps):
                _change(x, draws.jitters & (turn == i), step, draws.factors[:, i])
        _change(x, draws.greys, lambda part: TF.rgb_to_grayscale(part, 3))
        if self.blur:
            sigma = draws.sigma[:, None].expand(-1, 2)
            _change(x, draws.blurs, lambda part, sigma: filters.gaussian_blur2d(part, KERNEL, sigma), sigma)


class Colour:
    """Jitters colours, greys and blurs strong and local views in a loader's workers, where there is no accelerator.

    What `Augmentation` does, which then has to normalise only (`colour=False`). Draws from torch's global generator.

    Args:
        blur: blur; small images do better without.
        jitter: strengths of brightness, contrast, saturation and hue.

    Shape:
        `(strong, weak, *local)`, uint8 `(3, S, S)` each -> a tuple of the same.

    Example:
        >>> import torch
        >>> from torchvision.transforms import v2 as T
        >>> from cgh import views
        >>> transform = T.Compose([views.Crops(224), views.Colour()])
        >>> strong, weak = transform(torch.randint(256, (3, 375, 500), dtype=torch.uint8))
        >>> strong.shape, strong.dtype
        (torch.Size([3, 224, 224]), torch.uint8)
    """

    def __init__(self, *, blur: bool = True, jitter: Sequence[float] = JITTER) -> None:
        self.blur, self.jitter = blur, _check_jitter(jitter)

    def __call__(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(view if i == WEAK else self._distort(view) for i, view in enumerate(views))

    def _distort(self, view: Tensor) -> Tensor:
        draws = _Draws(1, self.jitter)
        x = _planes(view).div_(255)
        if draws.jitters:
            steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, _turn_hue)
            factors = draws.factors[0].tolist()
            for i in draws.order[0].tolist():
                x = steps[i](x, factors[i])
        if draws.greys:
            x = TF.rgb_to_grayscale(x, 3)
        if self.blur and draws.blurs:
            x = _gaussian_blur(x, draws.sigma.item())
        # By way of int16, because PyTorch converts to bytes one by one.
        return x.mul(255).add_(0.5).to(torch.int16).to(torch.uint8)


class _Draws:
    """What is drawn for the colours and the blur of `n` images.

    Attributes:
        jitters, greys, blurs: whether, `(n,)`.
        factors: of brightness, contrast, saturation, and turns of the hue, `(n, 4)`.
        order: of these four, `(n, 4)`.
        sigma: of the blur, in pixels, `(n,)`.
    """

    def __init__(self, n: int, jitter: Sequence[float], generator: torch.Generator | None = None) -> None:
        self.jitters, self.greys, self.blurs = (_uniform(0, 1, n, generator=generator) < p for p in P)
        *strengths, hue = jitter
        ranges = [(max(0, 1 - strength), 1 + strength) for strength in strengths] + [(-hue, hue)]
        self.factors = torch.stack([_uniform(*limits, n, generator=generator) for limits in ranges], dim=1)
        self.order = _uniform(0, 1, n, 4, generator=generator).argsort(dim=1)
        self.sigma = _uniform(*SIGMA, n, generator=generator)


def _check_batch(images: Tensor, name: str) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"{name} is {images.dtype}; images are uint8, as they are decoded.")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{name} has shape {tuple(images.shape)}; images are (N, 3, H, W).")


def _check_jitter(jitter: Sequence[float]) -> tuple[float, ...]:
    if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
        raise ValueError(
            f"jitter is {tuple(jitter)}; give the strengths of brightness, contrast and saturation, "
            "each at least 0, and of the hue, at most 0.5."
        )
    return tuple(jitter)


def _planes(view: Tensor) -> Tensor:
    """Bytes as float32, one plane a channel, which is how the arithmetic is fast."""
    return view.to(torch.float32, memory_format=torch.contiguous_format)


def _turn_hue(x: Tensor, turns: float) -> Tensor:
    """Turn the hues of an image `(3, H, W)`, to the same result as by way of HSV, in a seventh of the time.

    Hues lie on a hexagon of side `chroma`, with red, green and blue at every second corner. A channel grows as its
    corner comes nearer: it is `low + clamp(2 chroma - distance, 0, chroma)`. Hence its distance now, to which the turn
    is added with the sign of the side on which the hue lies.
    """
    red, green, blue = x
    high, low = x.amax(0), x.amin(0)
    chroma = high - low
    distance = torch.sub((high + x.sum(0)).sub_(low, alpha=2), x, alpha=2)
    distance.copysign_(torch.stack([green - blue, blue - red, red - green])).add_(chroma, alpha=6 * turns).abs_()
    distance = torch.minimum(distance, torch.sub(6 * chroma, distance))
    return torch.sub(2 * chroma, distance).clamp_min_(0).minimum(chroma).add_(low)


def _gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Blur an image `(3, H, W)`: sums of shifted images, faster than a convolution with so few channels."""
    radius = math.ceil(3 * sigma)
    weights = torch.exp(-(torch.arange(radius + 1) ** 2) / (2 * sigma**2))
    centre, *others = (weights / (2 * weights.sum() - 1)).tolist()
    for dim, pad in ((1, (0, 0, radius, radius)), (2, (radius, radius, 0, 0))):
        padded, size = F.pad(x, pad, mode="reflect"), x.shape[dim]
        x = centre * x
        for i, weight in enumerate(others, start=1):
            for shifted in (radius - i, radius + i):
                x.add_(padded.narrow(dim, shifted, size), alpha=weight)
    return x


def _uniform(low: float, high: float, *shape: int, generator: torch.Generator | None) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _change(x: Tensor, chosen: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Change the chosen images of a batch in place, each by its own parameters."""
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        index = rows.to(x.device)
        x[index] = change(x[index], *(parameter[rows].to(x) for parameter in parameters))
