"""Views of an image, strong, weak and local: cropped on the host, coloured and blurred on the device.

The paper's augmentations, split where it is fast. `Crops` cuts every view from one decoded image, in bytes, in a
loader's workers. `Augmentation` does the rest to the whole batch, on the accelerator if there is one, each image with
parameters of its own. Without an accelerator `Colour` does it in the workers. `BatchCrops` is for images that lie on
the device already.

`cgh` does not import this module: `from cgh import views`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF
from typing_extensions import override

from cgh import colours, normalisation
from cgh.streaming import has_kernels

IMAGENET_MEAN = normalisation.IMAGENET_MEAN
"""Of red, green and blue in ImageNet, from 0 to 1."""
IMAGENET_STD = normalisation.IMAGENET_STD
"""Of red, green and blue in ImageNet, from 0 to 1."""

JITTER = (0.4, 0.4, 0.4, 0.1)
"""The paper's strengths of brightness, contrast, saturation and hue."""

RATIO = (3 / 4, 4 / 3)
DRAWN = 23
"""Uniform numbers of a crop of `BatchCrops`: ten areas, ten ratios, two places, and whether it is flipped."""
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
        TypeError: an image that is not uint8, or a side that is no whole number.
        ValueError: an image that is not `(3, H, W)`; sides below one, scales that are no shares, or not as many scales
            as sides.

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
        for view in self.views:
            _check_crop(*view)

    @override
    def __repr__(self) -> str:
        (size, scale), _, *local = self.views
        sizes, scales = zip(*local, strict=True) if local else ((), ())
        return f"Crops({size}, {scale}" + (f", local_sizes={sizes}, local_scales={scales})" if local else ")")

    def __call__(self, image: Tensor) -> tuple[Tensor, ...]:
        _check_images(image, "the image", ndim=3)
        return tuple(self._crop(image, size, scale) for size, scale in self.views)

    @staticmethod
    def _crop(image: Tensor, size: int, scale: tuple[float, float]) -> Tensor:
        with torch.device("cpu"):  # torchvision draws on the default device
            top, left, height, width = RandomResizedCrop.get_params(image, list(scale), list(RATIO))
            flip = torch.rand(()) < 0.5
        crop = image[None, :, top : top + height, left : left + width]
        # torchvision's resized_crop, bit for bit; contiguous pixels are what makes PyTorch's fast kernel fast.
        crop = crop.contiguous(memory_format=torch.channels_last)
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        return TF.horizontal_flip(crop) if flip else crop


class BatchCrops:
    """Cuts a strong and a weak view of every image of a batch at once, on the device where it lies.

    For small images that fit there. Bilinear without antialiasing, which a crop that is enlarged does not need. The
    host draws, and does not wait for the device.

    Args:
        size: side of the views in pixels.
        scale: least and greatest area of a crop, as a share of the image's.

    Shape:
        uint8 `(N, 3, H, W)` -> `(strong, weak)`, uint8 `(N, 3, size, size)` each.

    Raises:
        TypeError: images that are not uint8, or a side that is no whole number.
        ValueError: images that are not `(N, 3, H, W)`, none at all, a side below one, or a scale that is no share.

    Example:
        >>> import torch
        >>> from cgh import views
        >>> images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> strong, weak = views.BatchCrops(32)(images, seed=0)
        >>> strong.shape, strong.dtype
        (torch.Size([8, 3, 32, 32]), torch.uint8)
    """

    def __init__(self, size: int = 32, scale: tuple[float, float] = (0.2, 1.0)) -> None:
        _check_crop(size, scale)
        self.size, self.scale = size, scale

    @override
    def __repr__(self) -> str:
        return f"BatchCrops({self.size}, {self.scale})"

    def __call__(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the views; `seed` alone decides them."""
        _check_images(images, "the batch", ndim=4)
        return self.transform(images, _send(self.draw(images.shape, seed), images.device))

    def draw(self, shape: Sequence[int], seed: int) -> Tensor:
        """Return what decides the views of a batch of this shape, on the host: the half of a call that draws.

        PyTorch reads the last 32 bits of the seed on a CPU. Ranks and steps that are to differ need seeds that do.
        """
        # Not the stream of Augmentation, so that a step may use one seed for both.
        return torch.rand(2, shape[0], DRAWN, generator=torch.Generator().manual_seed(~seed), device="cpu")

    def transform(self, images: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return the views that `draw`, moved to the images' device, decides: the half that is the device's."""
        if has_kernels(images.device):
            from cgh import crop_kernels

            return crop_kernels.crop(images, uniform, self.size, self.scale, RATIO)
        extent, centre = self._boxes(uniform, *images.shape[-2:]).movedim(0, 1).unbind(-1)
        # From -1 to 1 across the crop, and then across the image; both views lie side by side in one grid.
        pixels = (2 * torch.arange(self.size, device=images.device) + 1) / self.size - 1
        x, y = (extent[..., None] * pixels + centre[..., None]).unbind(2)
        grid = torch.stack(torch.broadcast_tensors(x[:, :, None, :], y[:, :, :, None]), dim=-1).flatten(1, 2)
        crops = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        strong, weak = crops.round_().clamp_(0, 255).to(torch.uint8).chunk(2, dim=2)
        return strong, weak

    def _boxes(self, uniform: Tensor, height: int, width: int) -> Tensor:
        """Extents and centres of the crops, `(2, N, 2, 2)`, of images that reach from -1 to 1."""
        # As torchvision: the first of ten boxes that fits, or else the whole image.
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * uniform[..., :10]) * height * width
        low, high = (math.log(ratio) for ratio in RATIO)
        ratio = torch.exp(low + (high - low) * uniform[..., 10:20])
        boxes = torch.stack([(area * ratio).sqrt() / width, (area / ratio).sqrt() / height], dim=-1)
        fits = (boxes <= 1).all(dim=-1)
        chosen = fits.int().argmax(dim=-1)[..., None, None].expand(-1, -1, 1, 2)
        extent = boxes.gather(2, chosen)[..., 0, :].where(fits.any(dim=-1, keepdim=True), 1.0)
        centre = (1 - extent) * (2 * uniform[..., 20:22] - 1)
        extent[..., 0] *= 1 - 2 * (uniform[..., 22] < 0.5).float()
        return torch.stack([extent, centre], dim=-1)


class Augmentation(nn.Module):
    """Jitters colours, greys and blurs strong and local views, then normalises all views, a whole batch at once.

    The paper's: colour jitter of 0.4, 0.4, 0.4, 0.1 (brightness, contrast, saturation, hue) for 80 % of the images, in
    an order of each image's own; grey for 20 %; Gaussian blur of 0.1 to 2 pixels for 50 %. What Pillow does, except
    that nothing is rounded to bytes on the way and that the blur is the Gaussian itself, where Pillow's is made of
    boxes. The host draws, sends what it drew in one transfer, and does not wait for the device.

    Args:
        mean: of the channels, from 0 to 1.
        std: likewise, above 0.
        colour: jitter, grey and blur; without, views are normalised only, after workers that apply `Colour`.
        blur: blur; small images do better without.
        weak: leave the second view its colours; else it is distorted as the first.
        jitter: strengths of brightness, contrast, saturation and hue.
        dtype: of the views that come out, such as `torch.bfloat16` for a network under autocast in it.
        memory_format: likewise, such as `torch.channels_last`.

    Shape:
        `[strong, weak, *local]`, uint8 `(N, 3, S, S)` each, and a seed -> a tuple of the same in `dtype`.

    Raises:
        TypeError: views that are not uint8.
        ValueError: views that are not `(N, 3, S, S)`, are of no image, elsewhere than the module or too small to be
            blurred; a jitter that has not four strengths, a mean and std that are not three numbers from 0 to 1, or a
            `dtype` of integers.

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
        weak: bool = True,
        jitter: Sequence[float] = JITTER,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        normalisation.check_normalisation(mean, std)
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; views are floating point.")
        self.colour, self.blur, self.jitter = colour, blur, _check_jitter(jitter)
        self.weak = WEAK if weak else None
        self.dtype, self.memory_format = dtype, memory_format
        # As bytes, which spares those views a division that are normalised only.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    @override
    def extra_repr(self) -> str:
        weak = self.weak is not None
        return f"colour={self.colour}, blur={self.blur}, weak={weak}, jitter={self.jitter}, dtype={self.dtype}"

    @override
    def forward(self, views: Sequence[Tensor], seed: int) -> tuple[Tensor, ...]:
        """Return the views as the network wants them; `seed` alone decides, and no other generator is touched."""
        for i, view in enumerate(views):
            _check_images(view, f"view {i}", ndim=4)
            if view.device != self.mean.device:
                raise ValueError(f"view {i} is on {view.device} and the augmentation on {self.mean.device}; move one.")
            if self.colour and self.blur and i != self.weak:
                _check_blur(view, f"view {i}")
        count = sum(len(view) for i, view in enumerate(views) if i != self.weak)
        return self.transform(views, _send(self.draw(count, seed), self.mean.device))

    def draw(self, count: int, seed: int) -> Tensor:
        """Return what decides `count` strong and local views, on the host: the half of a call that draws.

        PyTorch reads the last 32 bits of the seed on a CPU. Ranks and steps that are to differ need seeds that do.
        """
        if not self.colour:
            return torch.empty(count, 0, device="cpu")
        return colours.draw(count, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def transform(self, views: Sequence[Tensor], uniform: Tensor) -> tuple[Tensor, ...]:
        """Return the views that `draw`, moved to the device, decides: the half that is the device's.

        Whatever was drawn it is the same few kernels, so that a CUDA graph can hold them.
        """
        output = []
        for i, view in enumerate(views):
            rows = None
            if self.colour and i != self.weak:
                rows, uniform = uniform[: len(view)], uniform[len(view) :]
            output.append(self._kernels(view, rows) if has_kernels(view.device) else self._plain(view, rows))
        return tuple(output)

    def _kernels(self, view: Tensor, uniform: Tensor | None) -> Tensor:
        from cgh import colour_kernels

        output = torch.empty(view.shape, dtype=self.dtype, device=view.device, memory_format=self.memory_format)
        colour_kernels.augment(view, uniform, self.jitter, self.blur, self.mean, self.std, output)
        return output

    def _plain(self, view: Tensor, uniform: Tensor | None) -> Tensor:
        x = _planes(view)
        if uniform is not None:
            parameters = colours.Draws(uniform, self.jitter).parameters()
            x = colours.distort(x.div_(255), parameters)
            if self.blur:
                x = colours.blur(x, parameters)
            x.mul_(255)
        return x.sub_(self.mean).div_(self.std).to(self.dtype, memory_format=self.memory_format)


class Colour:
    """Jitters colours, greys and blurs strong and local views in a loader's workers, where there is no accelerator.

    What `Augmentation` does, which then has to normalise only (`colour=False`). Draws from torch's global generator.

    Args:
        blur: blur; small images do better without.
        weak: leave the second view its colours; else it is distorted as the first.
        jitter: strengths of brightness, contrast, saturation and hue.

    Shape:
        `(strong, weak, *local)`, uint8 `(3, S, S)` each -> a tuple of the same.

    Raises:
        TypeError: views that are not uint8.
        ValueError: views that are not `(3, S, S)` or too small to be blurred, or a jitter that has not four strengths.

    Example:
        >>> import torch
        >>> from torchvision.transforms import v2 as T
        >>> from cgh import views
        >>> transform = T.Compose([views.Crops(224), views.Colour()])
        >>> strong, weak = transform(torch.randint(256, (3, 375, 500), dtype=torch.uint8))
        >>> strong.shape, strong.dtype
        (torch.Size([3, 224, 224]), torch.uint8)
    """

    def __init__(self, *, blur: bool = True, weak: bool = True, jitter: Sequence[float] = JITTER) -> None:
        self.blur, self.weak, self.jitter = blur, WEAK if weak else None, _check_jitter(jitter)

    @override
    def __repr__(self) -> str:
        return f"Colour(blur={self.blur}, weak={self.weak is not None}, jitter={self.jitter})"

    def __call__(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for i, view in enumerate(views):
            _check_images(view, f"view {i}", ndim=3)
            if self.blur and i != self.weak:
                _check_blur(view, f"view {i}")
        return tuple(view if i == self.weak else self._distort(view) for i, view in enumerate(views))

    def _distort(self, view: Tensor) -> Tensor:
        draws = colours.Draws(colours.draw(1), self.jitter)
        x = _planes(view).div_(255)
        if draws.jitters:
            steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, _turn_hue)
            factors = draws.factors[0].tolist()
            for i in draws.order[0].tolist():
                x = steps[i](x, factors[i])
        if draws.greys:
            x = TF.rgb_to_grayscale(x, 3)
        if self.blur and draws.blurs:
            x = colours.blur_one(x, draws.sigma.item())
        # By way of int16, because PyTorch converts to bytes one by one.
        return x.mul(255).add_(0.5).to(torch.int16).to(torch.uint8)


def _turn_hue(x: Tensor, turns: float) -> Tensor:
    return colours.turn_hue(x[None], torch.full((1, 1, 1), turns, device="cpu"))[0]


def _send(parameters: Tensor, device: torch.device) -> Tensor:
    """Parameters on the device, without waiting for it."""
    if device.type == "cuda" and parameters.numel():
        return parameters.pin_memory().to(device, non_blocking=True)
    return parameters.to(device)


def _planes(view: Tensor) -> Tensor:
    """Bytes as float32, one plane a channel, which is how the arithmetic is fast."""
    return view.to(torch.float32, memory_format=torch.contiguous_format)


def _check_images(images: Tensor, name: str, ndim: int) -> None:
    """Raise unless `images` are bytes, `(N, 3, H, W)` where `ndim` is 4 and `(3, H, W)` where it is 3."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} is a {type(images).__name__}; it is a uint8 tensor, as torchvision.io decodes one.")
    if images.dtype != torch.uint8:
        raise TypeError(f"{name} is {images.dtype}; images are uint8, as they are decoded.")
    if images.ndim != ndim or images.shape[-3] != 3 or not images.numel():
        expected = "images are (N, 3, H, W), at least one" if ndim == 4 else "an image is (3, H, W)"
        raise ValueError(f"{name} has shape {tuple(images.shape)}; {expected}.")


def _check_blur(images: Tensor, name: str) -> None:
    if min(images.shape[-2:]) <= colours.RADIUS:
        raise ValueError(
            f"{name} is {images.shape[-2]} x {images.shape[-1]} pixels, and the blur reaches {colours.RADIUS} beyond "
            f"each; take views of {colours.RADIUS + 1} pixels or more, or blur=False."
        )


def _check_crop(size: int, scale: tuple[float, float]) -> None:
    if not hasattr(size, "__index__"):
        raise TypeError(f"size is {size!r}; views are square: give their side as a whole number of pixels, such as 32.")
    low, high = scale
    if size < 1 or not 0 < low <= high <= 1:
        raise ValueError(
            f"a view of {size} pixels from {low} to {high} of the area; "
            "a side is at least 1, and shares rise within (0, 1]."
        )


def _check_jitter(jitter: Sequence[float]) -> tuple[float, ...]:
    if len(jitter) != 4 or not min(jitter) >= 0 or not jitter[3] <= 0.5:
        raise ValueError(
            f"jitter is {tuple(jitter)}; give the strengths of brightness, contrast and saturation, "
            "each at least 0, and of the hue, at most 0.5."
        )
    return tuple(jitter)
