"""State beside parameters: tensors that never cross the network, and counts that a compiled graph can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override


class Counted(nn.Module):
    """A module that counts, on its device.

    A graph, of `torch.compile` or of CUDA, reads and advances the count without the host: neither is a new graph needed
    for every step, nor does a step wait. The count is saved as the module's extra state.
    """

    def __init__(self) -> None:
        super().__init__()
        self._count: Tensor
        self.register_buffer("_count", torch.zeros((), dtype=torch.long), persistent=False)
        # What the host knows of without asking the device. A CUDA graph that is replayed advances the tensor alone.
        self._seen = 0

    def _advance(self) -> None:
        self._count.add_(1)
        self._seen += 1

    def _get_count(self) -> int:
        return self._seen if self._count.is_meta else int(self._count)

    def _set_count(self, count: int) -> None:
        self._count.fill_(count)
        self._seen = count

    @override
    def get_extra_state(self) -> Tensor:
        """Return the count, for `state_dict`."""
        return self._count.clone()

    @override
    def set_extra_state(self, state: Tensor) -> None:
        """Take a count of `state_dict`."""
        if self._count.is_meta:  # as where weights are assigned
            self._count = state.clone()
        self._set_count(int(state))


class LocalTensors(nn.Module):
    """Named tensors that are saved in `state_dict` and move with `.to()`, as buffers do, but are no buffers.

    DistributedDataParallel broadcasts buffers from rank 0 at every forward. What every rank computes alike by itself
    has no need of that, and for a memory bank it would be hundreds of megabytes.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        """The live tensor of a context, not a copy."""
        if name not in self._tensors:
            raise KeyError(f"{type(self).__name__} has no context {name!r}; it has {sorted(self._tensors)}.")
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    @override
    def __getattr__(self, name: str) -> Any:
        # Distributed checkpoints look every key of a state up as an attribute.
        tensors = self.__dict__.get("_tensors", {})
        return tensors[name] if name in tensors else super().__getattr__(name)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._tensors = {name: fn(x) for name, x in self._tensors.items()}
        nn.Module._apply(self, fn, recurse)
        return self

    @override
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: x for name, x in self._tensors.items()})

    @override
    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours = {prefix + name: name for name in self._tensors}
        for key, name in ours.items():
            x = self._tensors[name]
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != x.shape:
                error_msgs.append(
                    f"size mismatch for {key}: saved {tuple(state_dict[key].shape)}, here {tuple(x.shape)}."
                )
            elif local_metadata.get("assign_to_params_buffers", False):
                self._tensors[name] = state_dict[key].detach()
            elif x.is_meta and not state_dict[key].is_meta:
                error_msgs.append(
                    f"{key} is on meta and cannot be filled; pass assign=True, or call .to_empty(device=...) before."
                )
            else:
                x.copy_(state_dict[key])
        others = {key: value for key, value in state_dict.items() if key not in ours}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
