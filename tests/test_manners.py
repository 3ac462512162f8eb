"""What a user sees who looks around or slips: a short description, an error that says what to do, a close name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import cgh
from cgh.interop import build_backbone


class Images(nn.Sequential):
    """Images to eight features, by one layer of maps."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def method(**options: Any) -> cgh.CGH:
    return cgh.CGH(Images(), ["0"], dim=8, hidden_dim=8, memory_size=16, image_shape=(3, 8, 8), **options)


NOT_A_MODULE = r"is 'resnet18'; pass an nn.Module, such as cgh\.interop\.build_backbone\(\"resnet18\"\)"
FEATURES, LABELS = torch.eye(4), torch.arange(4)
SLIPS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a name as backbone": (lambda: cgh.CGH("resnet18"), TypeError, f"the backbone {NOT_A_MODULE}"),
    "a name to list": (lambda: cgh.list_layers("resnet18"), TypeError, f"the model {NOT_A_MODULE}"),
    "a name as student": (lambda: cgh.EMATeacher("resnet18"), TypeError, "the student is 'resnet18'; pass"),
    "a name to share": (
        lambda: cgh.interop.save_pretrained("resnet18", "x"),
        TypeError,
        "the model is 'resnet18'; pass",
    ),
    "a bare backbone": (lambda: cgh.ContextEncoder(Images()), TypeError, r"pass cgh\.HypercolumnExtractor\(backbone"),
    "no such part": (lambda: cgh.CGH(nn.Linear(2, 2), ["0"]), ValueError, "no layer '0'; its parts: none"),
    "layers of a ResNet": (
        lambda: cgh.CGH(build_backbone("vit_b_16", image_size=32)),
        ValueError,
        r"no layer 'layer3'; .*: cgh\.interop\.default_layers\(backbone\)",
    ),
    "an image's shape": (
        lambda: cgh.list_layers(Images(), (3, 8, 8)),
        ValueError,
        r"is \(3, 8, 8\); give one side, or",
    ),
    "the method's layers": (lambda: cgh.list_layers(method(), 8), ValueError, "CGH failed .* argument: 'weak'"),
    "the method's features": (
        lambda: cgh.evaluate.extract_features(method(), [(torch.zeros(3, 8, 8), 0)]),
        TypeError,
        r"takes two views; pass its backbone: model\.student\.extractor",
    ),
    "a context without temperature": (
        lambda: method(teacher_temperature={"global": 0.1, "hyper": 0.1}),
        ValueError,
        r"no temperature for context 'hypercolumn', only for \['global', 'hyper'\]",
    ),
    "a pair of nothing": (
        lambda: method(pairs=[("global", "hyper")]),
        ValueError,
        r"pairs names the context 'hyper'; the contexts are \['global', 'hypercolumn'\]",
    ),
    "a list of images": (lambda: method()([1], [1]), TypeError, r"images are a list; pass one tensor \(N, 3, H, W\)"),
    "an update of a loss": (
        lambda: method().update(torch.ones(())),
        TypeError,
        "what the model returned; got a Tensor",
    ),
    "one bank": (
        lambda: cgh.InfoNCELoss()({"global": FEATURES}, {"global": FEATURES}, FEATURES),
        TypeError,
        r"memory is one tensor \(4, 4\); pass the MemoryBank, or",
    ),
    "one width": (
        lambda: cgh.MemoryBank(8),
        TypeError,
        r"dims is 8; give a width for every context, such as {'global': 512}",
    ),
    "arrays": (
        lambda: cgh.evaluate.knn(FEATURES.numpy(), LABELS, FEATURES, LABELS, k=1),
        TypeError,
        r"train_features are a ndarray; make them a tensor, such as torch\.as_tensor\(train_features\)",
    ),
    "a module to save": (
        lambda: cgh.checkpoint.save(Images(), "x"),
        TypeError,
        r"a Images; write what it holds\.state_dict",
    ),
    "a classifier left on": (
        lambda: cgh.interop.backbone_state(fresh("resnet18"), like=fresh("resnet18")),
        ValueError,
        r"has its classifier on, fc\.bias, fc\.weight; .*: take it off by cgh\.hypercolumn\.remove_classifier",
    ),
}


def fresh(arch: str) -> nn.Module:
    return cgh.interop.architectures.create(arch)


@pytest.mark.parametrize(("slip", "kind", "message"), SLIPS.values(), ids=SLIPS)
def test_a_slip_is_told(slip: Callable[[], Any], kind: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        slip()


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("Cgh", "cgh.CGH"),
        ("CrossContexLoss", "cgh.CrossContextLoss"),
        ("knn", "cgh.evaluate.knn"),
        ("qqq", ""),
    ],
)
def test_close_names_of_the_package(name: str, close: str) -> None:
    hint = f"; close names: {close}" if close else ""
    with pytest.raises(AttributeError, match=rf"^module 'cgh' has no attribute '{name}'{hint}$"):
        getattr(cgh, name)


def test_what_shows_itself() -> None:
    features = cgh.HypercolumnExtractor(Images(), ["0"])(torch.zeros(2, 3, 8, 8))
    local = cgh.views.Crops(32, local_sizes=(16,), local_scales=((0.1, 0.5),))
    look = cgh.watch.Watch(method(), [cgh.watch.CSV("/dev/null")], probe=cgh.watch.OnlineProbe(8, classes=2))
    assert [repr(x) for x in (features, cgh.evaluate.LabelledFeatures(FEATURES, LABELS), local, look)] == [
        "Features(pooled (2, 8), hypercolumn (2, 8, 6, 6))",
        "LabelledFeatures(features (4, 4), labels (4,))",
        "Crops(32, (0.2, 1.0), local_sizes=(16,), local_scales=((0.1, 0.5),))",
        "Watch(CGH, loggers=['CSV'], every=50, probe=OnlineProbe(width=8, classes=2))",
    ]
    views, jitter = cgh.views, "jitter=(0.4, 0.4, 0.4, 0.1)"
    assert [repr(x) for x in (views.Crops(32), views.BatchCrops(), views.Colour(blur=False))] == [
        "Crops(32, (0.2, 1.0))",
        "BatchCrops(32, (0.2, 1.0))",
        f"Colour(blur=False, weak=True, {jitter})",
    ]
    expected = f"Augmentation(colour=True, blur=True, weak=True, {jitter}, dtype=torch.float32)"
    assert repr(views.Augmentation()) == expected
    assert repr(cgh.BatchShuffle(3)) == "BatchShuffle(seed=3)"
    model = method(momentum=0.99, warmup_steps=5)
    assert repr(model).startswith("CGH(\n  weights=LossWeights(warmup_steps=5)\n")
    assert "momentum=0.99\n" in repr(model.teacher)
    assert repr(cgh.list_layers(Images(), 8)).splitlines()[0].split() == ["layer", "map", "stride", "layout"]


def test_help_says_what_a_call_returns() -> None:
    modules = [cgh, *(x for name in cgh.__all__ if isinstance(x := getattr(cgh, name), ModuleType))]
    classes = {
        x
        for module in modules
        for x in vars(module).values()
        if inspect.isclass(x) and issubclass(x, nn.Module) and x.__module__.startswith("cgh.")
    }
    assert len(classes) > 10
    assert not [x.__name__ for x in classes if "forward" in vars(x) and not x.forward.__doc__]
