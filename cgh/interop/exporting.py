"""A copy of a backbone, an extractor or a student for torch.export, ONNX and TorchScript."""

from __future__ import annotations

from torch import nn
from typing_extensions import override

from cgh.encoder import ContextEncoder
from cgh.hypercolumn import HypercolumnExtractor, remove_hooks
from cgh.method import CGH
from cgh.modes import check_module
from cgh.wrappers import own_copy, unwrap


def exportable(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode that `torch.export`, `torch.onnx` and, of a backbone, `torch.jit.script` take.

    It gives what the model gives in evaluation mode, and the model itself stays as it is, hooks and all. Wrappers stay
    behind, and so do a backbone's hooks. A student's heads get other names inside, since exported programs write names
    as Python does, where "global" is a keyword. ONNX takes a later PyTorch than 2.6, whose exporter fails with the
    onnxscript of today.

    Args:
        model: a backbone, a `HypercolumnExtractor`, a `ContextEncoder`, or a `cgh.CGH`, whose student it is.

    Example:
        >>> import torch, torchvision, cgh
        >>> backbone = torchvision.models.resnet18()
        >>> model = cgh.CGH(backbone, dim=8, hidden_dim=16, memory_size=32)
        >>> images = torch.randn(2, 3, 64, 64)
        >>> program = torch.export.export(cgh.interop.exportable(model), (images,))
        >>> torch.testing.assert_close(program.module()(images), model.student.eval()(images))
    """
    check_module(model, "the model", "a backbone, an extractor or a student")
    model = unwrap(model)
    copied = own_copy(model.student if isinstance(model, CGH) else model)
    if isinstance(copied, ContextEncoder):
        copied.heads = _Heads({f"{name}_head": head for name, head in copied.heads.items()})
    elif not isinstance(copied, HypercolumnExtractor):
        remove_hooks(copied)
    return copied.eval()


class _Heads(nn.ModuleDict):
    """Heads under names that are no keywords."""

    @override
    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(f"{key}_head")
