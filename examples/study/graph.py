"""A training step as one CUDA graph, so that small networks do not wait for the host to launch their many kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Graphed:
    """A function of tensors, recorded at its fourth call and replayed from then on.

    Its inputs come from the host and always have the same shapes; the function finds them on the device, in the same
    place at every call. All that it reads, writes and calls has to stay in its place too, and nothing in it may depend
    on a number of the host.

    Args:
        function: tensors on the device -> a tensor; called as it is three times, to load what is loaded on first use.
        device: a CUDA device.
    """

    WARM_UP = 3

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self._function, self._device = function, device
        self._stream = torch.cuda.Stream(device)  # a recording is not made on the default one
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._calls = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return what the function does, in a tensor that the next call overwrites; nothing waits."""
        if not self._inputs:
            self._inputs = [torch.empty_like(x, device=self._device) for x in inputs]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for place, x in zip(self._inputs, inputs, strict=True):
                place.copy_(x.pin_memory(), non_blocking=True)
            if self._calls < self.WARM_UP:
                self._output = self._function(*self._inputs)
            elif self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=self._stream):
                    self._output = self._function(*self._inputs)
            if self._graph is not None:
                self._graph.replay()  # a recording runs nothing
        self._calls += 1
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return self._output
