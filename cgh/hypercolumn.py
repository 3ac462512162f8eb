"""Hypercolumns from any backbone: the pooled feature of an image, and the maps of chosen layers at one size."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from cgh.layouts import LAYOUTS, declared_prefix_tokens, find_layout, takes_maps, to_map
from cgh.modes import check_module, evaluating
from cgh.wrappers import is_parallel, plain_names, unwrap


class Features(NamedTuple):
    """What a backbone sees in a batch of images."""

    pooled: Tensor
    """The backbone's output before its classifier, `(N, W)`."""
    hypercolumns: dict[str, Tensor]
    """The chosen maps at the size of the last, concatenated along channels, `(N, C, H, W)` by name."""

    @property
    def hypercolumn(self) -> Tensor:
        """The one hypercolumn `(N, C, H, W)`.

        Raises:
            ValueError: there are several.
        """
        if len(self.hypercolumns) > 1:
            raise ValueError(f"there are several hypercolumns, {list(self.hypercolumns)}; take .hypercolumns[name].")
        return next(iter(self.hypercolumns.values()))

    @override
    def __repr__(self) -> str:
        """Return the shapes."""
        shapes = {"pooled": tuple(self.pooled.shape)} | {name: tuple(x.shape) for name, x in self.hypercolumns.items()}
        return f"Features({', '.join(f'{name} {shape}' for name, shape in shapes.items())})"


class Widths(NamedTuple):
    """Channels of each of the `Features`."""

    pooled: int
    hypercolumns: dict[str, int]


class HypercolumnExtractor(nn.Module):
    """The pooled feature and the hypercolumn of every image, from one pass through any backbone.

    Each chosen layer's map is resized bilinearly to the height and width of the last one, and all are concatenated
    along channels (the hypercolumn of Hariharan et al., 2015).

    The backbone is used in place, not copied. If it is one of torchvision's or timm's, its classifier is taken off
    first, and stays off (see `remove_classifier`). Any other module is left as it is: its output has to be the pooled
    feature `(N, W)`, so replace a classifier of its own with `torch.nn.Identity()` before. Of an output with a
    `pooler_output`, as a Hugging Face model's, that is taken. Its layers carry hooks from then on; a copy without them,
    to export or script, is `cgh.interop.exportable(backbone)`.

    A layer's output, or the first of several that it gives, may be a map `(N, C, H, W)` ("NCHW"), a map with its
    channels last `(N, H, W, C)` ("NHWC"), or tokens `(N, L, C)` ("NLC") row by row, after prefix tokens that belong to
    no place and are left out. Which it is follows from its shape and that of the images, where that leaves no doubt;
    else it is an error that asks for `layouts` or `prefix_tokens`. `cgh.list_layers` shows what every layer gives.

    Args:
        backbone: any module that maps images to `(N, W)`.
        layers: dotted names of submodules, coarsest last; or several such lists by the names of their hypercolumns,
            such as `{"shallow": ["layer1", "layer2"], "deep": ["layer3", "layer4"]}`.
        layouts: "NCHW", "NHWC" or "NLC", one for all layers or for some by name; by default they are recognised.
        prefix_tokens: class and register tokens before those of the grid; by default timm's count, or that of the
            parameters of the usual names (`cls_token`, `register_tokens`); where neither is there, tokens are not
            recognised.

    Shape:
        images `(N, 3, H, W)`, floating point -> `Features(pooled=(N, W), hypercolumns={name: (N, C, H', W')})`. The
        name of a single list of layers is "hypercolumn".

    Raises:
        ValueError: a layer does not exist (close names are listed), is named twice or does not run; an output has
            another shape than said above, or one that could mean two things; tokens form no grid of the images'
            proportions; a hypercolumn is named "global"; the batch is empty; gradient checkpointing hides a layer's
            gradient; a later layer changes a layer's output in place; a parallel wrapper is inside, not outside.
        TypeError: the backbone is no module, `layers` is a string, or images are no tensor or not floating point.

    Example:
        >>> import torch, torchvision, cgh
        >>> features = cgh.HypercolumnExtractor(torchvision.models.resnet18(), layers=["layer3", "layer4"])
        >>> f = features(torch.randn(2, 3, 64, 64))
        >>> f.pooled.shape, f.hypercolumn.shape
        (torch.Size([2, 512]), torch.Size([2, 768, 2, 2]))
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: Sequence[str] | Mapping[str, Sequence[str]],
        layouts: str | Mapping[str, str] | None = None,
        prefix_tokens: int | None = None,
    ) -> None:
        super().__init__()
        hypercolumns = layers if isinstance(layers, Mapping) else {"hypercolumn": layers}
        if not hypercolumns or "global" in hypercolumns:
            raise ValueError(
                f"layers names the hypercolumns {list(hypercolumns)}; name at least one, and none 'global', which is "
                "the pooled feature's name."
            )
        for names in hypercolumns.values():
            if isinstance(names, str):
                raise TypeError(f"layers is the string {names!r}; pass a list of names, such as [{names!r}].")
            if not names or len(set(names)) < len(names):
                raise ValueError(f"layers is {list(names)}; name at least one layer, each once.")
        if is_parallel(backbone):
            raise ValueError(
                f"the backbone is in a {type(backbone).__name__}; pass the module inside, and wrap what you train: "
                f"{type(backbone).__name__}(model)."
            )
        check_module(backbone, "the backbone", 'cgh.interop.build_backbone("resnet18")')
        remove_classifier(backbone)
        self.backbone = backbone
        self.hypercolumns = {name: tuple(names) for name, names in hypercolumns.items()}
        self.layers = tuple(dict.fromkeys(layer for names in self.hypercolumns.values() for layer in names))
        named = dict(backbone.named_modules())
        # Layers may be named with or without the wrappers on the way, such as torch.compile's.
        paths = plain_names(backbone, named) | {name: name for name in named}
        for layer in self.layers:
            if layer not in paths or not layer:
                close = difflib.get_close_matches(layer, paths, n=5, cutoff=0.4)
                parts = close or [name for name, _ in unwrap(backbone).named_children()]
                names = f"{'close names' if close else 'its parts'}: {', '.join(parts) or 'none'}"
                usual = {"timm", "torchvision"} & _packages(unwrap(backbone))
                raise ValueError(
                    f"the backbone ({type(unwrap(backbone)).__name__}) has no layer {layer!r}; {names}. All of them: "
                    "cgh.list_layers(backbone, image_size)"
                    f"{', the usual two: cgh.interop.default_layers(backbone)' if usual else ''}."
                )
        self._paths = {layer: paths[layer] for layer in self.layers}
        self.layouts = dict.fromkeys(self.layers, layouts) if isinstance(layouts, str) else dict(layouts or {})
        for layer, layout in self.layouts.items():
            if layer not in self.layers or layout not in LAYOUTS:
                raise ValueError(
                    f"layouts says {layout!r} of layer {layer!r}; name one of {', '.join(LAYOUTS)} for one of "
                    f"{list(self.layers)}."
                )
        if prefix_tokens is not None and prefix_tokens < 0:
            raise ValueError(f"prefix_tokens is {prefix_tokens}; it is 0 or more.")
        self.prefix_tokens = declared_prefix_tokens(unwrap(backbone)) if prefix_tokens is None else (prefix_tokens,)
        self._convolutional = {layer: takes_maps(self._layer(layer)) for layer in self.layers}
        self._slots = _Slots()
        for layer in self.layers:
            for module in same_output(self._layer(layer), backbone):
                module.register_forward_hook(_Capture(self._slots, layer))

    @override
    def forward(self, images: Tensor) -> Features:
        """Return the pooled feature and the hypercolumns of `images`."""
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "DataParallel runs copies of the model at once, whose layers would write to one place; use "
                "DistributedDataParallel, or a single device."
            )
        try:
            self._slots.captured = dict.fromkeys(self.layers)
            pooled = self.pooled(images)
            maps = {layer: self._map(layer, images, pooled) for layer in self.layers}
            if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
                self._slots.unchanged = True
        finally:
            self._slots.captured = {}
        hypercolumns = {
            name: _concatenate([maps[layer] for layer in layers]) for name, layers in self.hypercolumns.items()
        }
        return Features(pooled, hypercolumns)

    def pooled(self, images: Tensor) -> Tensor:
        """Return the pooled feature `(N, W)` alone, which costs no hypercolumn."""
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images are a {type(images).__name__}; pass one tensor (N, 3, H, W), as torch.stack makes."
            )
        if not images.is_floating_point():
            raise TypeError(
                f"images are {images.dtype}; make them floating point, such as images.float() / 255, and normalise."
            )
        if images.ndim != 4:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; a batch is (N, 3, H, W), of one image images[None], and of "
                "several views each by itself."
            )
        if images.shape[0] == 0:
            raise ValueError(f"the batch is empty: images have shape {tuple(images.shape)}.")
        return pooled_output(self.backbone(images), images.shape[0], self.backbone)

    @torch.no_grad()
    def widths(self, image_shape: Sequence[int] | None = None) -> Widths:
        """Find the channels of both features by running one black image, in evaluation mode.

        Args:
            image_shape: `(channels, height, width)` that the backbone takes; by default 224 pixels a side, and the
                channels of its first convolution.

        Raises:
            ValueError: the backbone cannot run on such an image, or its output is that of a classifier inside.
        """
        if image_shape is None:
            first = next((m for m in self.backbone.modules() if isinstance(m, nn.Conv2d)), None)
            image_shape = (first.in_channels if first else 3, 224, 224)
        like = next(self.backbone.parameters(), torch.empty(()))
        try:
            with evaluating(self), _inner_logits(self.backbone) as logits:
                features = self(like.new_zeros((1, *image_shape)))
        except (AssertionError, RuntimeError) as error:  # timm and torchvision assert the size that they were made for
            raise ValueError(
                f"the backbone ({type(self.backbone).__name__}) failed on a {tuple(image_shape)} image: {error}. "
                "Pass image_shape=(channels, height, width) of your images."
            ) from error
        for name, output in logits.items():
            if output is features.pooled:
                inner = type(self.backbone.get_submodule(name)).__name__
                raise ValueError(
                    f"the backbone ({type(unwrap(self.backbone)).__name__}) gives what {name!r} in it gives, a {inner} "
                    "with its classifier on; take that off: "
                    f"cgh.hypercolumn.remove_classifier(backbone.get_submodule({name!r}))."
                )
        return Widths(features.pooled.shape[1], {name: x.shape[1] for name, x in features.hypercolumns.items()})

    def _layer(self, name: str) -> nn.Module:
        return self.backbone.get_submodule(self._paths[name])

    def _map(self, layer: str, images: Tensor, pooled: Tensor) -> Tensor:
        """The checked map `(N, C, H, W)` of a layer that has run."""
        capture = self._slots.captured[layer]
        if capture is None:
            hooks = self._layer(layer)._forward_hooks.values()
            if not any(isinstance(hook, _Capture) and hook.slots is self._slots for hook in hooks):
                raise ValueError(
                    f"layer {layer!r} was replaced after the extractor was made, as by converting norms; make the "
                    "extractor, or the model that makes one, of the converted backbone."
                )
            raise ValueError(f"layer {layer!r} did not run in the backbone's forward; choose layers that do.")
        x, version = capture
        if version != version_of(x):
            raise ValueError(
                f"layer {layer!r} gave an output that a later layer changed in place, such as an in-place ReLU or an "
                "addition +=, so the layer's own output is gone; choose the layer that changes it, or make that one "
                "work out of place (inplace=False)."
            )
        if not isinstance(x, Tensor) or x.ndim not in (3, 4) or x.shape[0] != pooled.shape[0]:
            raise ValueError(
                f"layer {layer!r} gave {_describe(x)}; a hypercolumn is made of maps (N, C, H, W) or (N, H, W, C), or "
                f"of tokens (N, L, C), with N = {len(pooled)}: see cgh.list_layers(backbone, image_size)."
            )
        image = (images.shape[-2], images.shape[-1])
        shape = tuple(x.shape)
        layout = self.layouts.get(layer) or find_layout(shape, image, self._convolutional[layer], self.prefix_tokens)
        if layout is None and x.ndim == 4:
            raise ValueError(
                f"layer {layer!r} gave shape {shape} for images of {image[0]} x {image[1]}, which may be (N, C, H, W) "
                f"or (N, H, W, C); say which: layouts={{{layer!r}: 'NCHW'}} or 'NHWC'."
            )
        grid = None if layout is None else to_map(x, layout, image, self.prefix_tokens)
        if grid is None and x.ndim == 3:
            known = " or ".join(map(str, self.prefix_tokens)) or "an unknown number of"
            raise ValueError(
                f"layer {layer!r} gave shape {shape}: {shape[1]} tokens, less {known} prefix tokens, do not surely "
                f"form one grid of the proportions of {image[0]} x {image[1]} images. Pass prefix_tokens=(class and "
                "register tokens before the grid's), if tokens row by row are what they are."
            )
        if grid is None:
            raise ValueError(f"layer {layer!r} is said to be {layout} but gave shape {shape}.")
        without = pooled.requires_grad and not x.requires_grad
        if without and any(p.requires_grad for p in self._layer(layer).parameters()):
            raise ValueError(
                f"layer {layer!r} has trainable parameters but ran without gradient, as inside reentrant gradient "
                "checkpointing; checkpoint with use_reentrant=False."
            )
        return grid

    @override
    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(layers)}" for name, layers in self.hypercolumns.items())


def pooled_output(output: object, images: int, model: nn.Module) -> Tensor:
    """Return the pooled feature `(N, W)` in what a model gave.

    It is the output itself, also as `(N, W, 1, 1)`; its `pooler_output`, as of a Hugging Face model; or the `pooled` of
    an extractor's `Features`.

    Raises:
        ValueError: it is none of these, or not of so many images; the message says what is accepted.
    """
    pooled = getattr(output, "pooler_output", getattr(output, "pooled", output))
    if isinstance(pooled, Tensor) and pooled.shape[2:] == (1, 1):
        pooled = pooled.flatten(1)
    if not isinstance(pooled, Tensor) or pooled.ndim != 2 or pooled.shape[0] != images:
        raise ValueError(
            f"the model ({type(unwrap(model)).__name__}) gave {_describe(output)} for {images} images; it must give a "
            "pooled feature (N, W), or have it as pooler_output: a network of maps ends with nn.AdaptiveAvgPool2d(1) "
            "and nn.Flatten(), and of a whole method pass the backbone, such as model.student.extractor.backbone."
        )
    return pooled


_CLASSIFIERS = ("fc", "classifier", "head", "heads")  # in torchvision's models


def remove_classifier(backbone: nn.Module) -> None:
    """Take the classifier off a torchvision or timm model, in place, so that it gives its pooled feature.

    A timm model does it itself (`reset_classifier(0)`). Of torchvision's `fc`, `classifier`, `head` or `heads`, what
    comes before the first linear layer and its dropout stays (ConvNeXt's norm, say), and the rest goes; so do the
    auxiliary classifiers of GoogLeNet and Inception. Modules from elsewhere are not touched: what a name means there
    cannot be known.

    Raises:
        ValueError: it is a timm model made with `features_only=True`, which has no pooled feature.

    Example:
        >>> import torch, torchvision
        >>> from cgh.hypercolumn import remove_classifier
        >>> backbone = torchvision.models.resnet18()
        >>> remove_classifier(backbone)
        >>> backbone(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 512])
    """
    backbone = unwrap(backbone)
    packages = _packages(backbone)
    if "timm" in packages and hasattr(backbone, "reset_classifier"):
        backbone.reset_classifier(0)  # type: ignore[operator]  # every timm model has it
    elif "timm" in packages and hasattr(backbone, "feature_info"):
        raise ValueError(
            f"the backbone ({type(backbone).__name__}) was made with features_only=True, so it gives maps and no "
            "pooled feature; make it without, and name the layers: cgh.list_layers(backbone, image_size)."
        )
    elif "torchvision" in packages:
        for name in ("aux1", "aux2", "AuxLogits"):
            if hasattr(backbone, name):
                setattr(backbone, name, None)
                backbone.aux_logits = False  # type: ignore[assignment]  # a plain attribute
        for name in _CLASSIFIERS:
            classifier = getattr(backbone, name, None)
            if isinstance(classifier, nn.Module):
                setattr(backbone, name, _without_classes(classifier))


def has_classifier(model: nn.Module) -> bool:
    """Return whether a torchvision or timm model has the classifier on that `remove_classifier` takes off."""
    if "timm" in _packages(model):
        return bool(getattr(model, "num_classes", 0))
    parts = [getattr(model, name, None) for name in _CLASSIFIERS]
    return any(isinstance(part, nn.Module) and _without_classes(part) is not part for part in parts)


@contextmanager
def _inner_logits(backbone: nn.Module) -> Iterator[dict[str, object]]:
    """Collect what models inside a backbone give, by their names, that have their classifiers on."""
    logits: dict[str, object] = {}

    def collect(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda module, images, output: logits.update({name: output})

    hooks = [
        module.register_forward_hook(collect(name))
        for name, module in backbone.named_modules()
        if is_whole_model(module) and has_classifier(module)
    ]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def _without_classes(classifier: nn.Module) -> nn.Module:
    """What comes before the first linear layer and its dropout; SqueezeNet's is a convolution, and pooled after it."""
    if isinstance(classifier, nn.Linear):
        return nn.Identity().train(classifier.training)
    if not isinstance(classifier, nn.Sequential):
        return classifier
    linear = any(isinstance(m, nn.Linear) for m in classifier)
    first = (nn.Linear, nn.Dropout) if linear else (nn.Conv2d, nn.Dropout)
    start = next((i for i, m in enumerate(classifier) if isinstance(m, first)), None)
    if start is None or not (linear or any(isinstance(m, nn.AdaptiveAvgPool2d) for m in classifier)):
        return classifier
    kept = nn.Sequential(*classifier[:start], *(m for m in classifier[start:] if isinstance(m, nn.AdaptiveAvgPool2d)))
    kept.training = classifier.training
    return kept


def _packages(module: nn.Module) -> set[str]:
    """The packages that a module's class, or one that it is made of, comes from."""
    return {cls.__module__.split(".")[0] for cls in type(module).__mro__}


def is_whole_model(module: nn.Module) -> bool:
    """Return whether a module is a whole model of torchvision, timm or Hugging Face, not a part of one."""
    packages = _packages(module)
    if "torchvision" in packages:
        models = [x for x in vars(sys.modules["torchvision"].models).values() if isinstance(x, type)]
        return isinstance(module, tuple(models))
    return ("timm" in packages and hasattr(module, "reset_classifier")) or (
        "transformers" in packages and hasattr(module, "save_pretrained")
    )


class _Slots:
    """What the layers gave, while forward runs: nothing stays alive after it, nor when the backbone runs by itself.

    An object, not a plain dictionary, which `torch.export` would put a copy in the place of.
    """

    def __init__(self) -> None:
        self.captured: dict[str, tuple[object, int] | None] = {}
        self.unchanged = False  # whether a forward showed that no layer's output is changed in place later

    def __len__(self) -> int:
        return len(self.captured)


class _Capture:
    """A forward hook that writes its layer's output to its slot, if open: an object, so that it copies and pickles."""

    def __init__(self, slots: _Slots, layer: str) -> None:
        self.slots = slots
        self.layer = layer

    @property
    def __name__(self) -> str:
        raise AttributeError(
            "hooks of an extractor cannot be scripted; script a copy without them: cgh.interop.exportable(backbone)."
        )

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.layer in self.slots.captured:
            x = first_output(output)
            compiling = torch.compiler.is_compiling()
            # Where torch does not count how often a tensor is changed in place, a copy is safe. A compiled extractor
            # goes without if it has run uncompiled, as that of an encoder has.
            if isinstance(x, Tensor) and (not self.slots.unchanged if compiling else x.is_inference()):
                x = x.clone()
            self.slots.captured[self.layer] = x, version_of(x)


def remove_hooks(backbone: nn.Module) -> None:
    """Take the hooks of all extractors off a backbone; they are of no use afterwards."""
    for module in backbone.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _Capture):
                del module._forward_hooks[key]


def same_output(module: nn.Module, model: nn.Module) -> list[nn.Module]:
    """Return the modules of `model` whose output is that of `module`: itself, and of an `nn.Sequential` its last.

    Gradient checkpointing of a stage (timm's) runs its blocks one by one, and not the stage. A last module that has
    other places in the model too, as a pooling that all stages share, gives more than this output.
    """
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module):
        last = module[-1]
        if sum(x is last for part in model.modules() for x in part._modules.values()) == 1:
            return [module, *same_output(last, model)]
    return [module]


def version_of(x: object) -> int:
    """Return how often a tensor has been changed in place, where torch counts that."""
    return x._version if isinstance(x, Tensor) and not torch.compiler.is_compiling() and not x.is_inference() else 0


def _concatenate(maps: Sequence[Tensor]) -> Tensor:
    """All maps `(N, C, H, W)` at the height and width of the last, along channels."""
    size = maps[-1].shape[-2:]
    resized = [
        x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps
    ]
    return torch.cat(resized, dim=1)


def first_output(output: object) -> object:
    """Return the first of what a layer gives: several transformers give their tokens and something besides."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _describe(x: object) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
