"""The user's module inside what trains it: distributed and compiled wrappers, averages, in any order."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Set
from types import CellType

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)
_ATTRIBUTES = ("_orig_mod", "_checkpoint_wrapped_module", "_forward_module")
"""Where `torch.compile`, torch's `checkpoint_wrapper` and Lightning Fabric keep a module."""


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers, or the module itself.

    Taken off are DistributedDataParallel, DataParallel, FullyShardedDataParallel, `torch.compile`'s, torch's
    `AveragedModel` and `checkpoint_wrapper`, timm's `ModelEmaV2` and `ModelEmaV3`, Lightning Fabric's, and
    `cgh.EMATeacher`, nested in any order. `torch.distributed.fsdp.fully_shard` and `module.compile()` wrap nothing.

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

    if isinstance(module, _WRAPPERS) or is_sharded(module) or _is_of(module, "timm", "ModelEmaV2", "ModelEmaV3"):
        return "module"
    if isinstance(module, EMATeacher):
        return "encoder"
    # By what they register, as several pass on what attributes the module inside has.
    return next((name for name in _ATTRIBUTES if name in getattr(module, "_modules", ())), None)


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module is a FullyShardedDataParallel; by name, as importing the class takes most of a second."""
    return _is_of(module, "torch", "FullyShardedDataParallel")


def _is_of(module: nn.Module, package: str, *names: str) -> bool:
    return any(cls.__name__ in names and cls.__module__.partition(".")[0] == package for cls in type(module).__mro__)


def own_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy of the module inside all wrappers, which runs by itself.

    Raises:
        TypeError: it cannot be copied, or a function in the place of its `forward` would have the copy run the module.

    Example:
        >>> import torch
        >>> from cgh.wrappers import own_copy
        >>> own_copy(torch.compile(torch.nn.Linear(2, 2)))
        Linear(in_features=2, out_features=2, bias=True)
    """
    module = unwrap(module)
    parts = set(module.modules())
    for part in parts:
        if _runs(vars(part).get("forward"), parts):
            raise TypeError(
                f"the forward of the {type(part).__name__} is a function that was put in its place, such as "
                "torch.compile(net.forward). A copy would share it, and so run the original. Compile by net.compile() "
                "or torch.compile(net), or replace forward after the copy is made."
            )
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise TypeError(f"the {type(module).__name__} cannot be copied: {error}") from error


def _runs(function: object, modules: Set[nn.Module], within: tuple[object, ...] = ()) -> bool:
    """Whether a function, which a deep copy shares, keeps a module, or a method of one; a method is copied itself."""
    if not inspect.isfunction(function) or function in within:
        return False
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    for x in (*cells, *(function.__defaults__ or ()), *vars(function).values()):
        owner = getattr(x, "__self__", x)
        if (isinstance(owner, nn.Module) and owner in modules) or _runs(x, modules, (*within, function)):
            return True
    return False


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
