"""The user's module inside what trains it: distributed and compiled wrappers, averages, in any order."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers, or the module itself.

    Taken off are DistributedDataParallel, DataParallel, FullyShardedDataParallel, `torch.compile`'s, torch's
    `AveragedModel`, and `cgh.EMATeacher`, nested in any order. `torch.distributed.fsdp.fully_shard` and
    `module.compile()` wrap nothing.

    Example:
        >>> import torch
        >>> from cgh.wrappers import unwrap
        >>> net = torch.nn.Linear(2, 2)
        >>> unwrap(torch.nn.DataParallel(torch.compile(net))) is net
        True
    """
    while attribute := wrapped_attribute(module):
        module = getattr(module, attribute)
    return module


def wrapped_attribute(module: nn.Module) -> str | None:
    """Return the name under which a wrapper keeps the module inside it; None where `module` is no wrapper."""
    from cgh.teacher import EMATeacher  # which takes its student's wrappers off by this module

    if isinstance(module, _WRAPPERS) or is_sharded(module):
        return "module"
    if isinstance(module, EMATeacher):
        return "encoder"
    # Of torch.compile's class the attribute alone is public.
    return "_orig_mod" if isinstance(getattr(module, "_orig_mod", None), nn.Module) else None


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module is a FullyShardedDataParallel; by name, as importing the class takes most of a second."""
    return any(
        cls.__name__ == "FullyShardedDataParallel" and cls.__module__.startswith("torch.")
        for cls in type(module).__mro__
    )


def plain_names(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return `names` of parameters, buffers or submodules by what they are called without the wrappers on the way.

    Example:
        >>> import torch
        >>> from cgh.wrappers import plain_names
        >>> net = torch.nn.Sequential(torch.compile(torch.nn.Linear(2, 2)))
        >>> plain_names(net, net.state_dict())
        {'0.weight': '0._orig_mod.weight', '0.bias': '0._orig_mod.bias'}
    """
    parts = ((name, wrapped_attribute(part)) for name, part in module.named_modules(remove_duplicate=False))
    inner = {f"{name}.{attribute}".removeprefix(".") for name, attribute in parts if attribute}

    def plain(name: str) -> str:
        pieces = name.split(".")
        return ".".join(piece for i, piece in enumerate(pieces, 1) if ".".join(pieces[:i]) not in inner)

    return {plain(name): name for name in names}


def is_parallel(module: nn.Module) -> bool:
    """Return whether a module runs one inside it on several devices or ranks, so that it has to be the outermost."""
    several = isinstance(module, DataParallel) and len(module.device_ids) > 1
    return several or isinstance(module, DistributedDataParallel) or is_sharded(module)
