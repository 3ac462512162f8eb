"""A trained backbone as its own library knows it, in memory or in a file."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cgh import checkpoint
from cgh.encoder import ContextEncoder
from cgh.extras import require
from cgh.hypercolumn import HypercolumnExtractor, remove_classifier
from cgh.interop.matching import check_match, check_tensors
from cgh.method import CGH


def backbone_state(model: nn.Module, like: nn.Module | None = None) -> dict[str, Tensor]:
    """Return a copy of the backbone's parameters and buffers, on the CPU, under their names in its own library.

    The backbone has no classifier, and the student none to give: what a pre-trained classifier knows was never learned
    here. Where a state with one is needed, `like` says which keys that is, and their tensors are zeros: a model that
    predicts nothing until it is trained, rather than something at random.

    Args:
        model: a `cgh.CGH` (whose student it is), a `ContextEncoder`, a `HypercolumnExtractor`, or a bare backbone.
        like: a fresh model of the same architecture with a classifier, whose `load_state_dict` is to take the state.

    Raises:
        ValueError: `like` is of another architecture; every missing, unexpected and misshapen key is listed.

    Example:
        >>> import torchvision, cgh
        >>> features = cgh.HypercolumnExtractor(torchvision.models.resnet18(), ["layer4"])
        >>> fresh = torchvision.models.resnet18()
        >>> fresh.load_state_dict(cgh.interop.backbone_state(features, like=fresh))
        <All keys matched successfully>
    """
    state = {key: x.detach().cpu().clone() for key, x in find_backbone(model).state_dict().items()}
    if like is None:
        return state
    bare = copy.deepcopy(like)
    remove_classifier(bare)
    check_match(state, bare.state_dict(), "the backbone")
    return {key: state.get(key, torch.zeros_like(x, device="cpu")) for key, x in like.state_dict().items()}


def save_backbone(model: nn.Module, path: str | os.PathLike[str], like: nn.Module | None = None) -> None:
    """Write `backbone_state` to a file: safetensors if it is called `.safetensors`, else PyTorch's own format.

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
    state = backbone_state(model, like)
    if Path(path).suffix == ".safetensors":
        tensors = {key: x.contiguous() for key, x in state.items()}
        require("safetensors.torch", extra="interop").save_file(tensors, path, metadata={"format": "pt"})
    else:
        checkpoint.save(state, path)


def load_backbone(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
    """Copy a backbone's parameters and buffers into that of `model`; nothing is copied unless everything fits.

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
    check_match(state, backbone.state_dict(), what)
    backbone.load_state_dict(state)


def find_backbone(model: nn.Module) -> nn.Module:
    """Return the backbone of the library's modules, and any other module itself."""
    if isinstance(model, CGH):
        model = model.student
    if isinstance(model, ContextEncoder):
        model = model.extractor
    return model.backbone if isinstance(model, HypercolumnExtractor) else model


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
