"""The reference implementation's checkpoints, read into `cgh.CGH` and written back exactly.

Its ImageNet and CIFAR variants use the same names. The backbone is torchvision's ResNet; the CIFAR variant's has a 3x3
convolution of stride 1 in front and no max pool::

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

`resume` goes on with a run of the reference as the reference would, and `save` writes a file that its `--resume` goes
on from. Both take care of what `load` and `state_dict`, which copy tensors as they are, leave alone:

| | |
| --- | --- |
| `optimizer0` | SGD's momentum by the parameter's position: without decay first (ImageNet), or as they come (CIFAR) |
| `epoch` | epochs that are done; times the steps of one, where schedule and warm-up stand |
| the teacher | moved at the start of a step there, at its end here: in a file it is one update behind |

The reference does not keep the state of its gradient scaler: with mixed precision that starts anew, as there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cgh import checkpoint
from cgh.interop.matching import check_match, check_tensors, described_by, without_wrappers
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
MODULES = ("encoder_q.", "encoder_k.", "hypercols_proj_q.", "hypercols_proj_k.")  # as the reference registers them
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# Weights of the hypercolumn's layers, which the reference keeps and does not apply.
SCALES = {"layer1": 1 / 16, "layer2": 1 / 8, "layer3": 1 / 4, "layer4": 1.0}


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a reference checkpoint by the reference's names, without wrappers' "module.".

    The file may be a whole checkpoint, with its tensors under "net" or "state_dict", or the tensors alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, is cut short, or holds a pickle that would run code.
    """
    return _tensors(checkpoint.load(path), path)


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


class Resumed(NamedTuple):
    """Where a run of the reference stood."""

    epoch: int
    """Epochs that are done."""
    step: int
    """Steps that are done."""
    rest: dict[str, Tensor]
    """What the model has no place for, as `load` returns it; `save` takes it."""


@torch.no_grad()
def resume(path: str | os.PathLike[str], model: CGH, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Resumed:
    """Go on with a run of the reference: its tensors, its momentum, where its warm-up stands, and the teacher's update.

    The next step's losses and weights are those that the reference itself would have had. Learning rate, weight decay
    and the coefficient of the momentum stay the optimiser's own; `parameter_groups` has the reference's.

    Args:
        path: a checkpoint that the reference wrote, or `save`.
        model: of the same backbone, layers, widths and memory size.
        optimizer: SGD of the student's parameters, in any groups.
        steps_per_epoch: the reference's batches in an epoch, the last incomplete one left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `read` and `load`; the file has no momentum, or not of these parameters; the optimiser has
            parameters that are not the student's. Nothing is changed then.

    Example:
        >>> import tempfile, torch, torchvision, cgh
        >>> from cgh.interop import reference
        >>> model = cgh.CGH(torchvision.models.resnet18(), dim=8, hidden_dim=16, memory_size=32)
        >>> optimizer = torch.optim.SGD(reference.parameter_groups(model), lr=0.05, momentum=0.9)
        >>> output = model(*torch.randn(2, 4, 3, 32, 32))
        >>> output.loss.backward(); optimizer.step()
        >>> model.update(output)
        >>> path = tempfile.mkdtemp() + "/run.pth.tar"
        >>> reference.save(path, model, optimizer, epoch=1, arch="resnet18")
        >>> resumed = reference.resume(path, model, optimizer, steps_per_epoch=1)
        >>> resumed.epoch, resumed.step
        (1, 1)
    """
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch is {steps_per_epoch}; it is how many batches an epoch of the run had.")
    content = checkpoint.load(path)
    state = _tensors(content, path)
    epoch = content.get("epoch")
    if type(epoch) is not int or epoch < 0:
        raise ValueError(f"{path} has no count of epochs (epoch is {epoch!r}): no checkpoint of a run.")
    momenta = _momenta(content.get("optimizer0"), state, path)
    ours = _parameters_of(model, optimizer)
    check_match(momenta, ours, f"the momentum in {path}")
    with described_by(str(path)):
        rest = load(model, state)
    for key, parameter in ours.items():
        optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momenta[key])
    step = epoch * steps_per_epoch
    model.steps = step
    model.teacher.updates = max(step - 1, 0)
    model.teacher.update(model.student)
    model.teacher.updates = step
    return Resumed(epoch, step, rest)


@torch.no_grad()
def save(
    path: str | os.PathLike[str],
    model: CGH,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    arch: str,
    rest: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint at the end of an epoch that the reference goes on from by its `--resume`.

    An optimiser of one group becomes the one of the reference's CIFAR variant, any other the two of its ImageNet
    variant. The teacher is put back by one update, which the reference makes first.

    Args:
        path: the file, written whole or not at all.
        model: the model.
        optimizer: SGD of the student's parameters, in any groups.
        epoch: epochs that are done.
        arch: torchvision's name of the backbone, which the reference compares with its own.
        rest: what `resume` returned as that.

    Raises:
        OSError: the file cannot be written.
        ValueError: as `state_dict`; the optimiser has parameters that are not the student's.
    """
    state = state_dict(model) | dict(rest or {})
    teacher, momentum = model.teacher, model.teacher.momentum
    momentum = momentum(max(teacher.updates - 1, 0)) if callable(momentum) else momentum
    for key in _parameters(state):
        student = key.replace("encoder_k.", "encoder_q.").replace("hypercols_proj_k.", "hypercols_proj_q.")
        if key != student and momentum > 0:
            state[key] = torch.lerp(state[student], state[key], 1 / momentum)
    ours = _parameters_of(model, optimizer)
    groups = _groups(_parameters(state)) if len(optimizer.param_groups) > 1 else [_parameters(state)]
    order = [key for group in groups for key in group]
    options = {key: x for key, x in optimizer.param_groups[0].items() if key != "params"}
    decay = max(group["weight_decay"] for group in optimizer.param_groups)
    content = {
        "state": {
            index: {"momentum_buffer": optimizer.state[ours[key]]["momentum_buffer"].detach().cpu().clone()}
            for index, key in enumerate(order)
            if key in ours and optimizer.state[ours[key]].get("momentum_buffer") is not None
        },
        "param_groups": [
            options
            | {"weight_decay": decay if index == len(groups) - 1 else 0.0}
            | {"params": [order.index(key) for key in group]}
            for index, group in enumerate(groups)
        ],
    }
    net = {f"module.{key}": x for key, x in state.items()}
    checkpoint.save({"epoch": epoch, "arch": arch, "best_acc1": 0.0, "net": net, "optimizer0": content}, path)


def parameter_groups(model: CGH, weight_decay: float = 1e-4) -> list[dict[str, Any]]:
    """Return groups of the student's parameters for SGD that decay what the reference decays on ImageNet.

    It spares whatever has "bn" or "bias" in its name, and so not the weights of those norms that are called otherwise:
    of the shortcuts and of the hypercolumn's head, 5,888 numbers of a ResNet-50. (On CIFAR it decays everything.)

    Example:
        >>> import torchvision, cgh
        >>> from cgh.interop import reference
        >>> model = cgh.CGH(torchvision.models.resnet18(), dim=8, hidden_dim=16, memory_size=32)
        >>> groups = reference.parameter_groups(model)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(42, 0.0), (29, 0.0001)]
    """
    spared, decayed = _groups(list(names := _named_parameters(model)))
    return [
        {"params": [names[key] for key in spared], "weight_decay": 0.0},
        {"params": [names[key] for key in decayed], "weight_decay": weight_decay},
    ]


def _tensors(content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    for name in ("net", "state_dict"):
        if isinstance(content.get(name), Mapping):
            content = content[name]
    return {without_wrappers(key): x for key, x in check_tensors(content, str(path)).items()}


def _parameters(state: Mapping[str, Tensor]) -> list[str]:
    """The names of all parameters, in the order in which the reference gives them to its optimiser."""
    return [key for module in MODULES for key in state if key.startswith(module) and not key.endswith(STATISTICS)]


def _groups(names: list[str]) -> list[list[str]]:
    """Those that the reference does not decay on ImageNet, and those that it does."""
    spared = [key for key in names if "bn" in key or "bias" in key]
    return [spared, [key for key in names if key not in set(spared)]]


def _momenta(content: Any, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """SGD's momentum by the parameter's name."""
    names = _parameters(state)
    groups = _groups(names)
    try:
        numbers = [group["params"] for group in content["param_groups"]]
        lengths = [len(numbers_of_group) for numbers_of_group in numbers]
        kept = {number: x["momentum_buffer"] for number, x in content["state"].items()}
        in_order = [kept.get(number) for number in chain.from_iterable(numbers)]
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} has no momentum of SGD under 'optimizer0'; read the weights alone by `load`, and warm up anew."
        ) from error
    if lengths == [len(names)]:
        groups = [names]
    elif lengths != [len(group) for group in groups]:
        raise ValueError(
            f"{path} has an optimiser of {lengths} parameters in its groups; the reference's "
            f"has {[len(names)]} (CIFAR) or {[len(group) for group in groups]} (ImageNet)."
        )
    by_name = zip(chain.from_iterable(groups), in_order, strict=True)
    momenta = {key: x for key, x in by_name if x is not None}
    return check_tensors(momenta, f"the momentum in {path}") if momenta else momenta


def _named_parameters(model: CGH) -> dict[str, nn.Parameter]:
    """The student's parameters by the reference's names."""
    return {_reference_name(name, "q"): parameter for name, parameter in model.student.named_parameters()}


def _parameters_of(model: CGH, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimiser's parameters by the reference's names."""
    names = {parameter: key for key, parameter in _named_parameters(model).items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = len(set(parameters) - set(names))
    if not isinstance(optimizer, torch.optim.SGD) or strangers:
        raise ValueError(
            f"the optimiser is {type(optimizer).__name__}, and {strangers} of its {len(parameters)} parameters are not "
            "the student's; the reference's is SGD: torch.optim.SGD(parameter_groups(model), lr, momentum=0.9)."
        )
    return {names[parameter]: parameter for parameter in parameters}


def _reference_name(name: str, which: str) -> str:
    """The reference's name of a `ContextEncoder`'s tensor; `which` is "q" for the student and "k" for the teacher."""
    ours, theirs = next(pair for pair in HEADS.items() if name.startswith(pair[0]))
    return theirs.format(which) + name.removeprefix(ours)


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
    tensors: dict[str, Tensor] = {}
    for which, encoder in (("q", model.student), ("k", model.teacher.encoder)):
        tensors |= {_reference_name(name, which): x for name, x in encoder.state_dict().items()}
    tensors |= {key: model.memory[name].T for key, name in BANKS.items()}
    if model.relation_loss.centring is not None:
        tensors |= {key: _row(model.relation_loss.centring[name]) for key, name in CENTRES.items()}
    return tensors


def _row(x: Tensor) -> Tensor:
    """A centre as `(1, size)`, whether it is saved as that or as `(size,)`."""
    return x.reshape(1, -1)
