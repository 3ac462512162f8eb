"""A backbone by its name in torchvision or timm, and the layers of it that make a hypercolumn."""

from __future__ import annotations

import difflib
import importlib.util
from typing import Any

from torch import nn

from cgh.extras import require
from cgh.hypercolumn import remove_classifier

TIMM = "timm/"
# Of torchvision's classes: the last layer before the coarsest stage, and the coarsest.
LAYERS = {
    "DenseNet": ("features.denseblock3", "features.denseblock4"),
    "GoogLeNet": ("inception4e", "inception5b"),
    "Inception3": ("Mixed_6e", "Mixed_7c"),
    "MaxVit": ("blocks.2", "blocks.3"),
    "RegNet": ("trunk_output.block3", "trunk_output.block4"),
    "ResNet": ("layer3", "layer4"),
    "ShuffleNetV2": ("stage3", "conv5"),
}
# The same of classes that number the children of `features`, where that depends on how many there are.
NUMBERED = {
    "ConvNeXt": (-3, -1),
    "EfficientNet": (5, -1),
    "MobileNetV2": (13, -1),
    "MobileNetV3": (-5, -1),
    "SwinTransformer": (-3, -1),
}


def build_backbone(
    arch: str, small_images: bool = False, image_size: int | None = None, drop_path: float | None = None
) -> nn.Module:
    """Return a fresh backbone without its classifier: images `(N, 3, H, W)` -> pooled features `(N, W)`.

    Args:
        arch: torchvision's name of a classifier, such as "resnet50", or timm's after "timm/", such as
            "timm/vit_tiny_patch16_224".
        small_images: for images of about 32 pixels, of a ResNet: the first convolution is 3x3 of stride 1, and no max
            pool follows.
        image_size: side of the images in pixels, for what is built for one size, as most transformers are; others
            ignore it.
        drop_path: greatest probability of leaving out a block in training (stochastic depth); by default the
            library's own.

    Raises:
        ImportError: timm is not installed.
        TypeError: `arch` is no name.
        ValueError: neither library knows the name (close names are listed); what is no ResNet has no stem for small
            images; it cannot be built for this size, or has no blocks to leave out.

    Example:
        >>> import torch, cgh
        >>> cgh.interop.build_backbone("resnet18", small_images=True)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 512])
    """
    backbone = create(arch, small_images, image_size, drop_path)
    remove_classifier(backbone)
    return backbone


def create(
    arch: str, small_images: bool = False, image_size: int | None = None, drop_path: float | None = None
) -> nn.Module:
    """Return what `build_backbone` does, with its classifier still on."""
    if not isinstance(arch, str):
        raise TypeError(
            f"arch is a {type(arch).__name__}; pass a name, such as 'resnet50' or 'timm/vit_small_patch16_224'."
        )
    _check_name(arch)
    if isinstance(image_size, (int, float, str)) and not (isinstance(image_size, int) and image_size > 0):
        raise ValueError(f"image_size is {image_size!r}; it is the side of the images in pixels, such as 224.")
    if drop_path is not None and not 0 <= drop_path < 1:
        raise ValueError(f"drop_path is {drop_path}; it is a probability, 0 or more and below 1.")
    try:
        model = (
            _in_timm(arch, image_size, drop_path)
            if arch.startswith(TIMM)
            else _in_torchvision(arch, image_size, drop_path)
        )
    except TypeError as error:  # an option that this architecture has not
        raise ValueError(
            f"{arch} takes no such option: {error}. Leave out drop_path, or choose another arch."
        ) from error
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"{arch} cannot be built for images of {image_size} pixels: {str(error).rstrip('.')}."
        ) from error
    if small_images:
        _use_small_stem(model, arch)
    return model


def default_layers(backbone: nn.Module) -> tuple[str, str]:
    """Return the layers of a torchvision or timm backbone that make the hypercolumn: two stages, coarsest last.

    They are the last of the coarsest maps and the last of those before; where all maps have one size, as in a plain
    vision transformer, those at two thirds of the depth and at its end.

    Raises:
        ValueError: the backbone is of another library, or of a class whose stages are not known or not apart.

    Example:
        >>> import cgh
        >>> cgh.interop.default_layers(cgh.interop.build_backbone("convnext_tiny"))
        ('features.5', 'features.7')
    """
    name = type(backbone).__name__
    stages = getattr(backbone, "feature_info", None)
    if stages is not None:
        stages = list(stages)
        names = [_last_module(backbone, stage["module"]) for stage in stages]
        coarsest = stages[-1]["reduction"]
        finer = [name for name, stage in zip(names, stages, strict=True) if stage["reduction"] < coarsest]
        before, last = finer[-1] if finer else _two_thirds(names), names[-1]
        if before and last and before != last:
            return before, last
    if name == "VisionTransformer":
        blocks = [f"encoder.layers.{block}" for block, _ in backbone.get_submodule("encoder.layers").named_children()]
        return _two_thirds(blocks), blocks[-1]
    if name in NUMBERED:
        children = [f"features.{child}" for child, _ in backbone.get_submodule("features").named_children()]
        finer_place, last_place = NUMBERED[name]
        return children[finer_place], children[last_place]
    if name in LAYERS:
        return LAYERS[name]
    raise ValueError(f"no layers are known for a {name}; name them: cgh.list_layers(backbone) shows what there is.")


def _last_module(backbone: nn.Module, name: str) -> str:
    """The name of what gives a stage's output, the last block of a list of them; "" where there is no such stage."""
    try:
        stage = backbone.get_submodule(name)
    except AttributeError:  # some of timm's tables name what is not there
        return ""
    return f"{name}.{len(stage) - 1}" if isinstance(stage, nn.ModuleList) and len(stage) else name


def _two_thirds(blocks: list[str]) -> str:
    return blocks[max(0, 2 * len(blocks) // 3 - 1)]


def torchvision_names() -> list[str]:
    """Return torchvision's names of classifiers whose classifier can be taken off."""
    import torchvision

    # The classifier of SqueezeNet is a convolution before the pooling.
    names: list[str] = torchvision.models.list_models(torchvision.models, exclude=["squeezenet*"])
    return names


def _check_name(arch: str) -> None:
    if not arch.startswith(TIMM):
        if arch not in torchvision_names():
            raise ValueError(_unknown(arch))
        return
    timm = require("timm", extra="timm")
    name = arch.removeprefix(TIMM)
    if not timm.is_model(name):
        raise ValueError(_unknown(arch))
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the architecture is known, and what follows its dot is not
        bare, _, tag = name.partition(".")
        tagged = ", ".join(timm.list_pretrained(f"{bare}.*"))
        raise ValueError(
            f"arch is {arch!r}, and timm has no {bare} of the name {tag!r}; the architecture is {TIMM}{bare}"
            f"{tagged and f', and its weights are {tagged}'}."
        ) from error


def _in_torchvision(arch: str, image_size: int | None, drop_path: float | None) -> nn.Module:
    import torchvision

    options: dict[str, Any] = {} if drop_path is None else {"stochastic_depth_prob": drop_path}
    if image_size is not None and arch.startswith("vit_"):
        options["image_size"] = image_size
    if image_size is not None and arch.startswith("maxvit_"):
        options["input_size"] = (image_size, image_size)
    if arch in ("googlenet", "inception_v3"):  # their further classifiers give further outputs
        options |= {"aux_logits": False, "init_weights": True}
    model: nn.Module = torchvision.models.get_model(arch, **options)
    return model


def _in_timm(arch: str, image_size: int | None, drop_path: float | None) -> nn.Module:
    timm = require("timm", extra="timm")
    name = arch.removeprefix(TIMM)
    options: dict[str, Any] = {} if drop_path is None else {"drop_path_rate": drop_path}
    if image_size is not None and timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        options["img_size"] = image_size
    try:  # views of several sides, as multi-crop's
        model: nn.Module = timm.create_model(name, dynamic_img_size=True, **options)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        model = timm.create_model(name, **options)
    return model


def _unknown(arch: str) -> str:
    names = torchvision_names()
    if importlib.util.find_spec("timm"):
        names += [TIMM + name for name in require("timm", extra="timm").list_models()]
    of_timm, name = arch.startswith(TIMM), arch.removeprefix(TIMM).lower()
    holding = [known for known in names if name and name in known]

    def distance(known: str) -> tuple[bool, bool, bool, int]:
        bare = known.removeprefix(TIMM)
        return bare != name, not bare.startswith(name), known.startswith(TIMM) != of_timm, len(known)

    holding.sort(key=distance)
    similar = difflib.get_close_matches(arch, names, n=5, cutoff=0.5) if name else []
    close = [*dict.fromkeys([*holding[:5], *similar])][:5]
    known = f"close names: {', '.join(close)}" if close else "such names are resnet50 and timm/vit_small_patch16_224"
    where = "timm does not have" if of_timm else f"is no classifier of torchvision, and timm's begin with {TIMM!r}"
    return f"arch is {arch!r}, which {where}; {known}."


def _use_small_stem(model: nn.Module, arch: str) -> None:
    norm = getattr(model, "bn1", None)
    if type(model).__name__ != "ResNet" or not isinstance(norm, nn.BatchNorm2d):
        raise ValueError(
            f"small_images is a stem for ResNets, and {arch} is none; let image_size say the side of the images, or "
            "choose an architecture of smaller patches or strides."
        )
    model.conv1 = nn.Conv2d(3, norm.num_features, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as both libraries do
    model.maxpool = nn.Identity()
