"""A trained backbone as its own library knows it, in memory or in a file."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cgh import checkpoint
from cgh.encoder import ContextEncoder
from cgh.evaluate.linear import Classifier
from cgh.extras import require
from cgh.hypercolumn import HypercolumnExtractor, is_whole_model, remove_classifier
from cgh.interop.matching import check_match, check_tensors
from cgh.method import CGH
from cgh.modes import check_module
from cgh.teacher import EMATeacher
from cgh.wrappers import is_sharded, plain_names, unwrap


def backbone_state(model: nn.Module, like: nn.Module | None = None) -> dict[str, Tensor]:
    """Return a copy of the backbone's parameters and buffers, on the CPU, under their names in its own library.

    The backbone has no classifier, and the student none to give: what a pre-trained classifier knows was never learned
    here. Where a state with one is needed, `like` says which keys that is, and their tensors are zeros: a model that
    predicts nothing until it is trained, rather than something at random.

    Args:
        model: a `cgh.CGH` (whose student it is), a `ContextEncoder`, a `HypercolumnExtractor`, a probe, an
            `EMATeacher`, a bare backbone, or a module of your own that holds one of the library's; wrappers such as
            DistributedDataParallel's and `torch.compile`'s stay behind.
        like: a fresh model of the same architecture with a classifier, whose `load_state_dict` is to take the state.

    Raises:
        ValueError: `like` is of another architecture, and then every missing, unexpected and misshapen key is listed;
            the classifier is on; or which backbone is meant is not sure.

    Example:
        >>> import torchvision, cgh
        >>> features = cgh.HypercolumnExtractor(torchvision.models.resnet18(), ["layer4"])
        >>> fresh = torchvision.models.resnet18()
        >>> fresh.load_state_dict(cgh.interop.backbone_state(features, like=fresh))
        <All keys matched successfully>
    """
    state = {key: x.detach().cpu().clone() for key, x in _plain_state(find_backbone(model)).items()}
    if like is None:
        return state
    bare = copy.deepcopy(like)
    remove_classifier(bare)
    classifier = state.keys() & (like.state_dict().keys() - bare.state_dict().keys())
    if classifier:
        raise ValueError(
            f"the {type(unwrap(model)).__name__} has its classifier on, {', '.join(sorted(classifier))}; a backbone "
            "has none: take it off by cgh.hypercolumn.remove_classifier(model)."
        )
    check_match(state, bare.state_dict(), "the backbone")
    return {key: state.get(key, torch.zeros_like(x, device="cpu")) for key, x in like.state_dict().items()}


def save_backbone(model: nn.Module, path: str | os.PathLike[str], like: nn.Module | None = None) -> None:
    """Write `backbone_state` to a file: safetensors if it is called `.safetensors`, else PyTorch's own format.

    Its folder is made if missing. A file that was there before stays until the new one is whole.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: as `backbone_state`.

    Example:
        >>> import tempfile, torchvision, cgh
        >>> path = tempfile.mkdtemp() + "/backbone.pt"
        >>> features = cgh.HypercolumnExtractor(torchvision.models.resnet18(), ["layer4"])
        >>> cgh.interop.save_backbone(features, path)
        >>> twin = cgh.HypercolumnExtractor(torchvision.models.resnet18(), ["layer4"])
        >>> cgh.interop.load_backbone(twin, path)
    """
    state, path = backbone_state(model, like), Path(path)
    if path.suffix != ".safetensors":
        checkpoint.save(state, path)
        return
    safetensors = require("safetensors.torch", extra="interop")
    path.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.replacing(path) as temporary:
        tensors = {key: x.contiguous() for key, x in state.items()}
        safetensors.save_file(tensors, temporary, metadata={"format": "pt"})


def load_backbone(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
    """Copy a backbone's parameters and buffers into that of `model`; nothing is copied unless everything fits.

    Of a `cgh.CGH` it is the student's; its teacher stays as it is. Where both are to start from these weights, load
    them before the method is built, which copies the student.

    Args:
        model: as in `backbone_state`.
        source: what `save_backbone` wrote, or a state.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: safetensors is not installed.
        ValueError: the file holds more than data, is cut short, or does not fit; every missing, unexpected and
            misshapen key is listed.
    """
    what = "the backbone" if isinstance(source, Mapping) else str(source)
    state = check_tensors(source if isinstance(source, Mapping) else read(source), what)
    backbone = find_backbone(model)
    expected = _plain_state(backbone)
    check_match(state, expected, what)
    names = plain_names(backbone, backbone.state_dict())
    backbone.load_state_dict({names[key]: x for key, x in state.items()})


def find_backbone(model: nn.Module) -> nn.Module:
    """Return the backbone inside a model: without wrappers, heads and classifiers.

    Of a user's own module it is the one that the library's modules inside have in common, averages of them aside; a
    module that has none of them is the backbone itself.

    Raises:
        ValueError: there are several, or the module holds a whole model of another library, so that what the backbone
            is cannot be known.
    """
    check_module(model, "the model", "the backbone, or what holds it")
    module = _inside(model)
    if module is not model:
        return find_backbone(module)
    named = list(module.named_modules())
    averages = tuple(f"{name}." for name, part in named if isinstance(part, (EMATeacher, AveragedModel)))
    parts = [(name, part) for name, part in named if isinstance(part, _HOLDERS)]
    found = {id(x): x for x in (find_backbone(part) for name, part in parts if not name.startswith(averages))}
    if len(found) > 1 or (parts and not found):
        raise ValueError(
            f"which of its backbones is meant by a {type(model).__name__} is not sure; pass the part that has it, "
            f"one of {', '.join(name for name, _ in parts)}."
        )
    if found:
        return next(iter(found.values()))
    whole = [name for name, part in named if name and is_whole_model(part)]
    if whole and not is_whole_model(module):
        raise ValueError(
            f"a {type(model).__name__} has a backbone of its library's names only in part of it; pass that part, "
            f"{' or '.join(f'model.{name}' for name in whole)}."
        )
    return module


_HOLDERS = (CGH, ContextEncoder, HypercolumnExtractor, Classifier)


def _inside(module: nn.Module) -> nn.Module:
    """What a wrapper, or a module of this library, keeps its backbone in; any other module itself."""
    if isinstance(module, CGH):
        return module.student
    if isinstance(module, ContextEncoder):
        return module.extractor
    if isinstance(module, (HypercolumnExtractor, Classifier)):
        return module.backbone
    return unwrap(module)


def _plain_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The live parameters and buffers of a backbone, by their names without wrappers.

    Raises:
        ValueError: FullyShardedDataParallel has flattened them.
    """
    if any(map(is_sharded, backbone.modules())):
        raise ValueError(
            "FullyShardedDataParallel keeps the parameters in pieces; gather them by torch.distributed.checkpoint."
            "state_dict.get_model_state_dict with full_state_dict=True, and load them into an unwrapped model."
        )
    state = backbone.state_dict()
    whole = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in state.items()}  # of fully_shard
    return {plain: whole[name] for plain, name in plain_names(backbone, state).items()}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a file holds: safetensors if it is called `.safetensors`, else a checkpoint of plain data.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: safetensors is not installed.
        ValueError: the file holds more than data, or is cut short.
    """
    if Path(path).suffix != ".safetensors":
        return checkpoint.load(path)
    safetensors = require("safetensors.torch", extra="interop")
    try:
        state: dict[str, Any] = safetensors.load_file(path)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no safetensors file, or is cut short: {error}") from error
    return state
