"""Values that are not finite, found on an accelerator without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from cgh.contexts import REMEDY, check_finite

_under_way: deque[tuple[list[str], Tensor, torch.cuda.Event]] = deque()
"""The names and largest magnitudes of tensors, on their way from the device, and when they will have arrived."""


def check_soon(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for NaN or infinity, of tensors on CUDA in a later call: as soon as the device has come to them.

    Nothing waits, so the error comes a step or so late. It is of no use to look inside a graph, which the host does not
    run, and on a device that is neither a CPU nor CUDA: there nothing is looked at.

    Args:
        tensors: by the names that the message gives them.

    Raises:
        ValueError: one of these tensors, or of those of an earlier call, holds a value that is not finite.

    Example:
        >>> import torch
        >>> from cgh.finite import check_soon
        >>> check_soon({"x": torch.tensor([[0.0, float("nan")]])})
        Traceback (most recent call last):
        ValueError: x holds 1 values that are not finite, ...
    """
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if x.device.type == "cpu":
            check_finite(x, name)
    on_cuda = {name: x.detach() for name, x in tensors.items() if x.is_cuda}
    if not on_cuda or torch.cuda.is_current_stream_capturing():
        return
    while _under_way and _under_way[0][2].query():
        names, largest, _ = _under_way.popleft()
        broken = [name for name, finite in zip(names, largest.isfinite().tolist(), strict=True) if not finite]
        if broken:
            _under_way.clear()
            raise ValueError(
                f"{', '.join(broken)} held values that are not finite, in a step shortly before. The memory left them "
                f"out. {REMEDY}"
            )
    largest = torch.stack([x.float() for x in torch._foreach_norm(list(on_cuda.values()), torch.inf)])
    with torch.cuda.device_of(largest):
        event = torch.cuda.Event()
        arriving = largest.to("cpu", non_blocking=True)
        event.record()
    _under_way.append((list(on_cuda), arriving, event))
