"""Hypercolumns from any backbone: the pooled feature of an image, and the maps of chosen layers at one size."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override


class Features(NamedTuple):
    """What a backbone sees in a batch of images."""

    pooled: Tensor
    """The backbone's output before its classifier, `(N, W)`."""
    hypercolumn: Tensor
    """The chosen maps at the size of the last, concatenated along channels, `(N, C, H, W)`."""


class Widths(NamedTuple):
    """Channels of each of the `Features`."""

    pooled: int
    hypercolumn: int


class HypercolumnExtractor(nn.Module):
    """The pooled feature and the hypercolumn of every image, from one pass through any backbone.

    Each chosen layer's map is resized bilinearly to the height and width of the last one, and all are concatenated
    along channels (the hypercolumn of Hariharan et al., 2015).

    The backbone is used in place, not copied. If it is one of torchvision's or timm's, its classifier is taken off
    first (see `remove_classifier`). Any other module is left as it is: its output has to be the pooled feature
    `(N, W)`, so replace a classifier of its own with `torch.nn.Identity()` before.

    Args:
        backbone: any module that maps images to `(N, W)`.
        layers: dotted names of submodules whose outputs are maps `(N, C, H, W)`, coarsest last.

    Shape:
        images `(N, 3, H, W)`, floating point -> `Features(pooled=(N, W), hypercolumn=(N, C, H', W'))`.

    Raises:
        ValueError: a layer does not exist (close names are listed), is named twice or does not run; an output has
            another shape than said above; the batch is empty; gradient checkpointing hides a layer's gradient.
        TypeError: `layers` is a string, or images are not floating point.

    Example:
        >>> import torch, torchvision, cgh
        >>> features = cgh.HypercolumnExtractor(torchvision.models.resnet18(), layers=["layer3", "layer4"])
        >>> f = features(torch.randn(2, 3, 64, 64))
        >>> f.pooled.shape, f.hypercolumn.shape
        (torch.Size([2, 512]), torch.Size([2, 768, 2, 2]))
    """

    def __init__(self, backbone: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        if isinstance(layers, str):
            raise TypeError(f"layers is the string {layers!r}; pass a list of names, such as [{layers!r}].")
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"layers is {list(layers)}; name at least one layer, each once.")
        remove_classifier(backbone)
        modules = dict(backbone.named_modules())
        for layer in layers:
            if layer not in modules or not layer:
                close = difflib.get_close_matches(layer, modules, n=5, cutoff=0.4) or [
                    n for n, _ in backbone.named_children()
                ]
                raise ValueError(
                    f"the backbone ({type(backbone).__name__}) has no layer {layer!r}; close names: "
                    f"{', '.join(close)}. All of them: [name for name, _ in backbone.named_modules()]."
                )
        self.backbone = backbone
        self.layers = tuple(layers)
        # A slot exists only while forward runs, so nothing stays alive after it, nor when the backbone runs by itself.
        self._slots: dict[str, object] = {}
        for layer in self.layers:
            modules[layer].register_forward_hook(_Capture(self._slots, layer))

    @override
    def forward(self, images: Tensor) -> Features:
        try:
            self._slots.update(dict.fromkeys(self.layers))
            pooled = self.pooled(images)
            maps = [self._check_map(layer, pooled) for layer in self.layers]
        finally:
            self._slots.clear()
        size = maps[-1].shape[-2:]
        resized = [
            x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps
        ]
        return Features(pooled, torch.cat(resized, dim=1))

    def pooled(self, images: Tensor) -> Tensor:
        """Return the pooled feature `(N, W)` alone, which costs no hypercolumn."""
        if not images.is_floating_point():
            raise TypeError(
                f"images are {images.dtype}; make them floating point, such as images.float() / 255, and normalise."
            )
        if not len(images):
            raise ValueError(f"the batch is empty: images have shape {tuple(images.shape)}.")
        pooled = self.backbone(images)
        if not isinstance(pooled, Tensor) or pooled.ndim != 2 or len(pooled) != len(images):
            raise ValueError(
                f"the backbone ({type(self.backbone).__name__}) gave {_describe(pooled)} for {len(images)} images; "
                "it must give a pooled feature (N, W): end it with nn.AdaptiveAvgPool2d(1) and nn.Flatten()."
            )
        return pooled

    @torch.no_grad()
    def widths(self, image_shape: Sequence[int] | None = None) -> Widths:
        """Find the channels of both features by running one black image, in evaluation mode.

        Args:
            image_shape: `(channels, height, width)` that the backbone takes; by default 224 pixels a side, and the
                channels of its first convolution.

        Raises:
            ValueError: the backbone cannot run on such an image.
        """
        if image_shape is None:
            first = next((m for m in self.backbone.modules() if isinstance(m, nn.Conv2d)), None)
            image_shape = (first.in_channels if first else 3, 224, 224)
        like = next(self.backbone.parameters(), torch.empty(()))
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            features = self(like.new_zeros((1, *image_shape)))
        except RuntimeError as error:
            raise ValueError(
                f"the backbone ({type(self.backbone).__name__}) failed on a {tuple(image_shape)} image: {error}. "
                "Pass image_shape=(channels, height, width) of your images."
            ) from error
        finally:
            for module, training in modes.items():
                module.training = training
        return Widths(features.pooled.shape[1], features.hypercolumn.shape[1])

    def _check_map(self, layer: str, pooled: Tensor) -> Tensor:
        x = self._slots[layer]
        if x is None:
            raise ValueError(f"layer {layer!r} did not run in the backbone's forward; choose layers that do.")
        if not isinstance(x, Tensor) or x.ndim != 4 or len(x) != len(pooled):
            raise ValueError(f"layer {layer!r} gave {_describe(x)}; a hypercolumn is made of maps (N, C, H, W).")
        trainable = any(p.requires_grad for p in self.backbone.get_submodule(layer).parameters())
        if trainable and pooled.requires_grad and not x.requires_grad:
            raise ValueError(
                f"layer {layer!r} has trainable parameters but ran without gradient, as inside reentrant gradient "
                "checkpointing; checkpoint with use_reentrant=False."
            )
        return x

    @override
    def extra_repr(self) -> str:
        return f"layers={list(self.layers)}"


def remove_classifier(backbone: nn.Module) -> None:
    """Take the classifier off a torchvision or timm model, in place, so that it gives its pooled feature.

    A timm model does it itself (`reset_classifier(0)`). Of torchvision's `fc`, `classifier`, `head` or `heads`, what
    comes before the first linear layer and its dropout stays (ConvNeXt's norm, say), and the rest goes. Modules from
    elsewhere are not touched: what a name means there cannot be known.

    Example:
        >>> import torch, torchvision
        >>> from cgh.hypercolumn import remove_classifier
        >>> backbone = torchvision.models.resnet18()
        >>> remove_classifier(backbone)
        >>> backbone(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 512])
    """
    packages = {cls.__module__.split(".")[0] for cls in type(backbone).__mro__}
    if "timm" in packages:
        backbone.reset_classifier(0)  # type: ignore[operator]  # every timm model has it
    elif "torchvision" in packages:
        for name in ("fc", "classifier", "head", "heads"):
            classifier = getattr(backbone, name, None)
            if isinstance(classifier, nn.Linear):
                setattr(backbone, name, nn.Identity())
            elif isinstance(classifier, nn.Sequential) and any(isinstance(m, nn.Linear) for m in classifier):
                start = next(i for i, m in enumerate(classifier) if isinstance(m, (nn.Linear, nn.Dropout)))
                setattr(backbone, name, classifier[:start])


class _Capture:
    """A forward hook that writes its layer's output to its slot, if open: an object, so that it copies and pickles."""

    def __init__(self, slots: dict[str, object], layer: str) -> None:
        self.slots = slots
        self.layer = layer

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.layer in self.slots:
            self.slots[self.layer] = output


def _describe(x: object) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
