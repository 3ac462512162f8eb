"""The reference implementation's checkpoints, read into `cgh.CGH` and written back exactly.

Its ImageNet and CIFAR variants use the same names. The backbone is torchvision's ResNet; the CIFAR variant's has a 3x3
convolution of stride 1 in front and no max pool:

    backbone = torchvision.models.resnet18()
    backbone.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    backbone.maxpool = torch.nn.Identity()

| reference | here |
| --- | --- |
| `encoder_q.*` | the student's backbone |
| `encoder_q.fc.*` | its head of the global context |
| `hypercols_proj_q.reg_conv.*`, `.projector.*` | its head of the hypercolumn |
| `encoder_k.*`, `hypercols_proj_k.*` | the teacher |
| `queue`, `queue_hyper` | the memory, `(dim, size)` there and `(size, dim)` here |
| `queue_ptr`, `queue_hyper_ptr` | the memory's pointer |
| `center`, `center_hyper` | the centring, `(1, size)` there and `(size,)` here |

The reference moves its teacher at the start of a step, this library at its end, so the teacher of a checkpoint that the
reference wrote is one update behind. To go on exactly as the reference would, call
`model.teacher.update(model.student)` once after reading.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from cgh import checkpoint
from cgh.interop.matching import check_match, check_tensors
from cgh.method import CGH

HEADS = {
    "heads.hypercolumn.convolution.": "hypercols_proj_{}.reg_conv.0.",
    "heads.hypercolumn.norm.": "hypercols_proj_{}.reg_conv.1.",
    "heads.hypercolumn.projection.": "hypercols_proj_{}.projector.",
    "heads.global.": "encoder_{}.fc.",
    "extractor.backbone.": "encoder_{}.",
}
BANKS = {"queue": "global", "queue_hyper": "hypercolumn"}
CENTRES = {"center": "global", "center_hyper": "hypercolumn"}
POINTERS = ("queue_ptr", "queue_hyper_ptr")
# Weights of the hypercolumn's layers, which the reference keeps and does not apply.
SCALES = {"layer1": 1 / 16, "layer2": 1 / 8, "layer3": 1 / 4, "layer4": 1.0}


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a reference checkpoint by the reference's names, without "module.".

    The file may be a whole checkpoint, with its tensors under "net" or "state_dict", or the tensors alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, is cut short, or holds a pickle that would run code.
    """
    state = checkpoint.load(path)
    for name in ("net", "state_dict"):
        if isinstance(state.get(name), Mapping):
            state = state[name]
    return {key.removeprefix("module."): x for key, x in check_tensors(state, str(path)).items()}


@torch.no_grad()
def load(model: CGH, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy a reference checkpoint into `model`; nothing is copied unless everything fits.

    Args:
        model: of the same backbone, layers, widths and memory size.
        state: what `read` returns.

    Returns:
        What `model` has no place for: the labels and indices of the memory's images, unused weights of the layers, and
        the centres if the model has no centring. `state_dict(model) | rest` is the checkpoint again.

    Raises:
        ValueError: every missing, unexpected and misshapen key is listed; the pointers of the two banks differ; the
            model's contexts are not "global" and "hypercolumn", or its layers not of `layer1` to `layer4`.

    Example:
        >>> import torchvision, cgh
        >>> from cgh.interop import reference
        >>> model = cgh.CGH(torchvision.models.resnet18(), dim=8, hidden_dim=16, memory_size=32)
        >>> sorted(reference.load(model, reference.state_dict(model)))
        ['center', 'center_hyper', 'hypercols_proj_k.scale', 'hypercols_proj_q.scale', 'queue_index', 'queue_targets']
    """
    ours = _live_tensors(model)
    state = {key: _row(x) if key in CENTRES else x for key, x in state.items()}
    pointers = {key: int(state[key]) for key in POINTERS if key in state}
    if not pointers or len(set(pointers.values())) > 1:
        raise ValueError(
            f"the checkpoint's pointers are {pointers}; it needs one; two agree, as both banks are written in step."
        )
    rest = {key: x for key, x in state.items() if key in _unused_tensors(model) and key not in ours}
    check_match({k: x for k, x in state.items() if k not in rest and k not in POINTERS}, ours, "the checkpoint")
    for key, x in ours.items():
        x.copy_(state[key])
    model.memory.pointer = pointers.popitem()[1]
    return rest


def state_dict(model: CGH) -> dict[str, Tensor]:
    """Return a copy of `model` under the reference's names, on the CPU, with all that the reference needs to load it.

    What `model` has no place for is as at the reference's start; `load` returned what it was in a checkpoint.

    Raises:
        ValueError: the model's contexts are not "global" and "hypercolumn", or its layers not of `layer1` to `layer4`.
    """
    state = {key: x.detach().cpu().clone() for key, x in _live_tensors(model).items()}
    return _unused_tensors(model) | state | {key: torch.tensor([model.memory.pointer]) for key in POINTERS}


def _unused_tensors(model: CGH) -> dict[str, Tensor]:
    """What the reference keeps though no step of its training reads it, as at its start."""
    size = model.memory.size
    scales = torch.tensor([SCALES[layer] for layer in model.student.extractor.layers])
    return {
        **{key: torch.zeros(1, size) for key in CENTRES},
        **{f"hypercols_proj_{which}.scale": scales.clone() for which in "qk"},
        "queue_targets": torch.full((size,), -1),
        "queue_index": torch.arange(size),
    }


def _live_tensors(model: CGH) -> dict[str, Tensor]:
    """Views of all of the model's tensors, shaped and named as the reference's."""
    if set(model.memory) != set(BANKS.values()):
        raise ValueError(f"the model's contexts are {list(model.memory)}; the reference has {list(BANKS.values())}.")
    layers = model.student.extractor.layers
    if not set(layers) <= set(SCALES):
        raise ValueError(f"the hypercolumn's layers are {list(layers)}; the reference has {list(SCALES)}.")
    tensors = {}
    for which, encoder in (("q", model.student), ("k", model.teacher.encoder)):
        for name, x in encoder.state_dict().items():
            ours, theirs = next(pair for pair in HEADS.items() if name.startswith(pair[0]))
            tensors[theirs.format(which) + name.removeprefix(ours)] = x
    tensors |= {key: model.memory[name].T for key, name in BANKS.items()}
    if model.relation_loss.centring is not None:
        tensors |= {key: _row(model.relation_loss.centring[name]) for key, name in CENTRES.items()}
    return tensors


def _row(x: Tensor) -> Tensor:
    """A centre as `(1, size)`, whether it is saved as that or as `(size,)`."""
    return x.reshape(1, -1)
