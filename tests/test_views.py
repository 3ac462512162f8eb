"""The paper's views: what torchvision and Pillow make, at the rates and strengths of the paper, image by image."""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as TF

from cgh import colours, views

# Older versions resize bytes as floats on some processors, which rounds some of them otherwise.
AS_FLOATS = int(tuple(map(int, torchvision.__version__.split(".")[:2])) < (0, 29))


def photographs(n: int, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth, colourful bytes `(n, 3, side, side)`."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, side, mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8)


def undone(view: Tensor) -> Tensor:
    """A normalised view, back from 0 to 1."""
    return view * torch.tensor(views.IMAGENET_STD).view(3, 1, 1) + torch.tensor(views.IMAGENET_MEAN).view(3, 1, 1)


def strong_of(images: Tensor, seed: int = 0, **options: object) -> Tensor:
    return undone(views.Augmentation(**options)([images, images], seed)[0])  # type: ignore[arg-type]


# Crops


def test_crops_are_torchvisions_bit_for_bit() -> None:
    image = photographs(1, 200)[0, :, :150]
    torch.manual_seed(3)
    ours = views.Crops(64)(image)
    torch.manual_seed(3)
    for view in ours:
        top, left, height, width = T.RandomResizedCrop(64, (0.2, 1.0)).make_params([image]).values()
        expected = TF.resized_crop(image, top, left, height, width, [64, 64], antialias=True)
        flipped = torch.rand(()) < 0.5
        expected = expected.flip(-1) if flipped else expected
        torch.testing.assert_close(view.int(), expected.int(), rtol=0, atol=AS_FLOATS)


def test_crops_have_the_papers_sizes_and_areas() -> None:
    ramp = torch.linspace(0, 255, 256).to(torch.uint8)
    image = torch.stack([ramp.expand(256, -1), ramp[:, None].expand(-1, 256), torch.zeros(256, 256, dtype=torch.uint8)])
    crops = views.Crops(224, local_sizes=(96,), local_scales=((0.086, 0.429),))
    areas, flips = [], 0
    for _ in range(200):
        seen = crops(image)
        spans = [view[:2].float().amax((1, 2)) - view[:2].float().amin((1, 2)) + 1 for view in seen]
        areas.append([(span / 256).prod().item() for span in spans])
        flips += int(seen[0][0, 0, 0] > seen[0][0, 0, -1])
    strong, weak, local = torch.tensor(areas).T
    for area, low, high in ((strong, 0.2, 1.0), (weak, 0.2, 1.0), (local, 0.086, 0.429)):
        assert low - 0.02 < area.min() < low + 0.1
        assert high - 0.15 < area.max() < high + 0.02
    assert 70 < flips < 130
    assert [view.shape[-1] for view in views.Crops(**views.MULTI_CROP)(image)] == [224, 224, 192, 160, 128, 96]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "a view of 0 pixels"),
        ({"scale": (0.2, 1.2)}, "from 0.2 to 1.2 of the area"),
        ({"scale": (0.5, 0.2)}, "from 0.5 to 0.2 of the area"),
        ({"local_sizes": (96,)}, "1 local_sizes and 0 local_scales"),
    ],
)
def test_crops_that_are_none(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        views.Crops(**options)  # type: ignore[arg-type]


def test_batch_crops_cut_each_image_by_itself() -> None:
    ramp = torch.linspace(0, 255, 64).to(torch.uint8)
    image = torch.stack([ramp.expand(64, -1), ramp[:, None].expand(-1, 64), torch.zeros(64, 64, dtype=torch.uint8)])
    images = image.expand(400, -1, -1, -1)
    strong, weak = views.BatchCrops(32)(images, seed=0)
    assert strong.shape == weak.shape == (400, 3, 32, 32)
    crop = T.RandomResizedCrop(32, (0.2, 1.0))
    boxes = [crop.make_params([image]) for _ in range(400)]
    theirs = torch.tensor([box["height"] * box["width"] / 64**2 for box in boxes])
    for view in (strong, weak):
        # Pixel centres span the crop less one of its 32 pixels.
        spans = (view[:, :2].amax((2, 3)).float() - view[:, :2].amin((2, 3))) / 255 * 63 / 64 * 32 / 31
        area, ratio = spans.prod(dim=1), spans[:, 0] / spans[:, 1]
        assert 0.18 < area.min() < 0.25
        assert 0.9 < area.max() <= 1.05
        assert area.mean() == pytest.approx(theirs.mean().item(), abs=0.04)
        assert 0.7 < ratio.min() < 0.8
        assert 1.25 < ratio.max() < 1.45
        assert len(view.unique(dim=0)) == 400
        assert 150 < (view[:, 0, 0, 0] > view[:, 0, 0, -1]).sum() < 250
    assert not torch.equal(strong, weak)
    again = views.BatchCrops(32)(images, seed=0)
    assert torch.equal(strong, again[0])
    assert torch.equal(weak, again[1])


def test_a_batch_crop_of_everything_is_the_image() -> None:
    images = photographs(8)
    for view in views.BatchCrops(32, scale=(1.0, 1.0))(images, seed=0):
        for seen, image in zip(view, images, strict=True):
            assert torch.equal(seen, image) or torch.equal(seen, image.flip(-1))


# Colours and blur


def test_the_weak_view_is_normalised_and_no_more() -> None:
    images = photographs(4)
    _, weak = views.Augmentation()([images, images], seed=0)
    expected = TF.normalize(TF.to_dtype(images, torch.float32, scale=True), views.IMAGENET_MEAN, views.IMAGENET_STD)
    assert torch.allclose(weak, expected, atol=1e-5)
    plain, _ = views.Augmentation(colour=False)([images, images], seed=0)
    assert torch.equal(plain, weak)


def test_without_a_weak_view_both_are_distorted() -> None:
    images = torch.randint(256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = views.Augmentation(colour=False, blur=False)([images, images], seed=0)
    both = views.Augmentation(blur=False, weak=False)([images, images], seed=0)
    for distorted, untouched in zip(both, plain, strict=True):
        assert (distorted != untouched).flatten(1).any(dim=1).float().mean() > 0.5
    assert not torch.equal(*both), "each view has draws of its own"
    torch.manual_seed(0)
    first, second = views.Colour(blur=False, weak=False)((images[0], images[0]))
    assert not torch.equal(first, second)


def test_a_seed_decides_and_nothing_else() -> None:
    images, augment = photographs(16), views.Augmentation()
    state = torch.get_rng_state()
    first = augment([images, images, images], seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, augment([images, images, images], seed=1), strict=True))
    assert not torch.equal(first[0], augment([images, images], seed=2)[0])
    assert not torch.equal(first[0], first[2])  # local views have draws of their own


def test_rates_are_the_papers() -> None:
    n = 2000
    images = photographs(1, 16).expand(n, -1, -1, -1)
    original = images[0] / 255
    strong = strong_of(images, blur=False)
    grey = (strong.amax(1) - strong.amin(1)).amax((1, 2)) < 1e-3
    assert grey.float().mean() == pytest.approx(0.2, abs=0.03)
    same = (strong - original).abs().amax((1, 2, 3)) < 1e-3
    assert same.float().mean() == pytest.approx(0.2 * 0.8, abs=0.03)  # neither jittered nor grey
    assert len(strong[~same].unique(dim=0)) > 0.75 * n  # each by factors of its own

    sharp = strong_of(images, blur=False, jitter=(0, 0, 0, 0))
    blurred = (strong_of(images, jitter=(0, 0, 0, 0)) - sharp).abs().amax((1, 2, 3)) > 1e-3
    assert 0.42 < blurred.float().mean() < 0.5  # of the half, one in twelve by too little to be seen


@pytest.mark.parametrize(("strength", "at"), [(0.4, 0), (0.4, 1), (0.4, 2), (0.1, 3)])
def test_each_jitter_is_torchvisions_within_its_strength(strength: float, at: int) -> None:
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)[at]
    jitter = [0.0] * 4
    jitter[at] = strength
    images = photographs(64)
    strong = strong_of(images, blur=False, jitter=jitter)
    colourful = (strong.amax(1) - strong.amin(1)).amax((1, 2)) > 1e-3
    neutral = 0.0 if at == 3 else 1.0
    factors = neutral + strength * torch.linspace(-1, 1, 101)
    errors = torch.stack([(adjust(images / 255, factor) - strong).abs().amax((1, 2, 3)) for factor in factors.tolist()])
    assert errors[:, colourful].amin(0).max() < 0.015
    best = factors[errors[:, colourful].argmin(0)]
    assert best.min() < neutral - 0.8 * strength
    assert best.max() > neutral + 0.8 * strength


def test_the_order_of_the_jitters_is_each_images_own() -> None:
    order = colours.Draws(colours.draw(2400), views.JITTER).order
    kinds, counts = order.unique(dim=0, return_counts=True)
    assert len(kinds) == 24
    assert counts.min() > 60


def test_colours_are_torchvisions_image_by_image() -> None:
    n, jitter = 96, (0.9, 0.9, 0.9, 0.4)  # strong enough to leave [0, 1] between the steps
    draws = colours.Draws(colours.draw(n, torch.Generator().manual_seed(0)), jitter)
    images = photographs(n) / 255
    steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    expected = []
    for i, x in enumerate(images):
        if draws.jitters[i]:
            for step in draws.order[i].tolist():
                x = steps[step](x, draws.factors[i, step].item())
        if draws.greys[i]:
            x = TF.rgb_to_grayscale(x, 3)
        if draws.blurs[i]:
            sigma = draws.sigma[i].item()
            x = TF.gaussian_blur(x, 2 * math.ceil(3 * sigma) + 1, sigma)
        expected.append(x)
    parameters = draws.parameters()
    found = colours.blur(colours.distort(images.clone(), parameters), parameters)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=2e-5)


def test_the_workers_colours_are_those_of_the_device() -> None:
    for seed in range(40):
        image = photographs(1, 48, seed)[0]
        torch.manual_seed(seed)
        ours, untouched = views.Colour()([image, image])
        assert torch.equal(untouched, image)
        assert ours.dtype == torch.uint8
        device = strong_of(image[None], seed)[0]
        assert (ours / 255 - device).abs().amax() < 0.51 / 255  # half a byte from rounding


def test_views_come_in_the_dtype_and_layout_asked_for() -> None:
    batch = [photographs(8, 16), photographs(8, 16, seed=1)]
    expected = views.Augmentation()(batch, seed=0)
    augment = views.Augmentation(dtype=torch.bfloat16, memory_format=torch.channels_last)
    for view, whole in zip(augment(batch, seed=0), expected, strict=True):
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view, whole.to(torch.bfloat16))


def test_the_halves_of_a_call_are_the_call() -> None:
    images, augment, crop = photographs(8), views.Augmentation(), views.BatchCrops(16)
    cut = crop.transform(images, crop.draw(images.shape, seed=3))
    for half, whole in zip(cut, crop(images, seed=3), strict=True):
        assert torch.equal(half, whole)
    for half, whole in zip(augment.transform(cut, augment.draw(8, seed=3)), augment(cut, seed=3), strict=True):
        assert torch.equal(half, whole)


def test_a_default_device_is_none_of_the_views_business() -> None:
    images = photographs(8)
    expected = views.Augmentation()(views.BatchCrops(16)(images, seed=0), seed=0)
    augment = views.Augmentation()
    with torch.device("meta"):
        found = augment(views.BatchCrops(16)(images, seed=0), seed=0)
        assert views.Crops(16)(images[0])[0].device.type == "cpu"
        assert views.Colour()([images[0]])[0].device.type == "cpu"
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_on_the_device_reads_nothing_back() -> None:
    # A tensor on "meta" has no values: an operation that needs them, as one that waits for a GPU does, raises.
    images, augment, crop = photographs(8).to("meta"), views.Augmentation().to("meta"), views.BatchCrops(16)
    strong, weak, local = augment([*crop(images, seed=0), images], seed=0)
    assert strong.shape == weak.shape == (8, 3, 16, 16)
    assert local.shape == (8, 3, 32, 32)


def test_hues_turn_as_in_hsv() -> None:
    image = torch.rand(3, 32, 32)
    image[:, :4] = image[:1, :4]  # grey
    image[1, 4:8] = image[0, 4:8]
    image[:, 8:12] = image[:, 8:12].round()  # corners of the cube
    turns = torch.tensor([-0.5, -0.1, 0.0, 0.07, 0.1, 0.3, 0.5])
    turned = colours.turn_hue(image.expand(len(turns), -1, -1, -1), turns[:, None, None])
    for ours, turn in zip(turned, turns.tolist(), strict=True):
        assert torch.allclose(ours, TF.adjust_hue(image, turn), atol=1e-5)
    red = torch.tensor([1.0, 0.25, 0.25]).view(1, 3, 1, 1)
    hsv = colorsys.rgb_to_hsv(*colours.turn_hue(red, turns[4].view(1, 1, 1)).flatten().tolist())
    assert hsv == pytest.approx((0.1, 0.75, 1.0), abs=1e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_the_blur_is_pillows(sigma: float) -> None:
    image = photographs(1, 64)[0]
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(sigma))
    expected = torch.from_numpy(np.array(pillow)).permute(2, 0, 1) / 255
    ours = colours.blur_one(image / 255, sigma)
    inside = (slice(None), slice(8, -8), slice(8, -8))  # Pillow extends the border where we mirror it
    assert (ours - expected)[inside].abs().amax() < 3 / 255
    widest = TF.gaussian_blur(image / 255, 2 * colours.RADIUS + 1, sigma)
    assert (ours - widest).abs().amax() < 0.002


def test_what_is_no_batch_and_no_jitter() -> None:
    augment = views.Augmentation()
    with pytest.raises(TypeError, match=r"view 0 is torch.float32; images are uint8"):
        augment([torch.rand(2, 3, 8, 8)], seed=0)
    with pytest.raises(ValueError, match=r"view 1 has shape \(3, 8, 8\)"):
        augment([photographs(1, 8), photographs(1, 8)[0]], seed=0)
    with pytest.raises(TypeError, match=r"the batch is torch.float32"):
        views.BatchCrops(8)(torch.rand(2, 3, 8, 8), seed=0)
    with pytest.raises(ValueError, match=r"jitter is \(0.4, 0.4, 0.1\); give the strengths"):
        views.Colour(jitter=(0.4, 0.4, 0.1))
    with pytest.raises(ValueError, match=r"jitter is \(nan, 0.4, 0.4, 0.1\)"):
        views.Augmentation(jitter=(math.nan, 0.4, 0.4, 0.1))
    with pytest.raises(ValueError, match=r"std \(0.2, 0.0, 0.2\)"):
        views.Augmentation(std=(0.2, 0.0, 0.2))
    for mean, std in [((123.7, 116.3, 103.5), views.IMAGENET_STD), (views.IMAGENET_MEAN, (0.2, math.nan, 0.2))]:
        with pytest.raises(ValueError, match="each is of three channels in 0 to 1"):
            views.Augmentation(mean, std)
    with pytest.raises(ValueError, match=r"mean is \(0.5,\)"):
        views.Augmentation(mean=(0.5,))
    with pytest.raises(ValueError, match=r"dtype is torch.uint8"):
        views.Augmentation(dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"view 0 is on cpu and the augmentation on meta"):
        views.Augmentation().to("meta")([photographs(1)], seed=0)
    with pytest.raises(ValueError, match=r"a view of 32 pixels from 0.0 to 1.0 of the area"):
        views.BatchCrops(scale=(0.0, 1.0))
    for call in (lambda x: views.Augmentation()([x], seed=0), lambda x: views.BatchCrops(16)(x, seed=0)):
        with pytest.raises(ValueError, match=r"has shape \(0, 3, 8, 8\); images are \(N, 3, H, W\), at least one"):
            call(torch.zeros(0, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("crops", [views.Crops, views.BatchCrops])
def test_views_are_square(crops: Callable[..., object]) -> None:
    for size in ((32, 32), 32.5):
        with pytest.raises(TypeError, match=f"size is {re.escape(repr(size))}; views are square"):
            crops(size)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.rand(3, 16, 16), TypeError, "is torch.float32; images are uint8"),
        (torch.zeros(3, 16, 16, dtype=torch.int64), TypeError, "is torch.int64"),
        (torch.zeros(3, 16, 16, dtype=torch.bool), TypeError, "is torch.bool"),
        (photographs(1, 16)[0, :1], ValueError, r"has shape \(1, 16, 16\); an image is \(3, H, W\)"),
        (photographs(1, 16)[0, [0, 1, 2, 0]], ValueError, r"has shape \(4, 16, 16\)"),
        (photographs(1, 16)[0, 0], ValueError, r"has shape \(16, 16\)"),
        (photographs(1, 16), ValueError, r"has shape \(1, 3, 16, 16\)"),
        (torch.zeros(3, 0, 16, dtype=torch.uint8), ValueError, r"has shape \(3, 0, 16\)"),
        (np.zeros((16, 16, 3), np.uint8), TypeError, "is a ndarray; it is a uint8 tensor"),
        (Image.new("RGB", (16, 16)), TypeError, "is a Image; it is a uint8 tensor"),
    ],
)
def test_what_is_no_image(image: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"the image {message}"):
        views.Crops(8)(image)
    with pytest.raises(error, match=f"view 1 {message}"):
        views.Colour()([photographs(1)[0], image])


def test_views_that_are_too_small_to_blur() -> None:
    small, least = photographs(2, 6), photographs(2, 7)
    with pytest.raises(ValueError, match=r"view 0 is 6 x 6 pixels, and the blur reaches 6 .* 7 pixels or more"):
        views.Augmentation()([small, small], seed=0)
    with pytest.raises(ValueError, match=r"view 2 is 6 x 6 pixels"):
        views.Colour()([least[0], small[0], small[0]])
    views.Augmentation()([least, small], seed=0)  # the weak view is not blurred
    views.Augmentation(blur=False)([small, small], seed=0)
    views.Colour(blur=False)([small[0], small[0]])
