"""Tensors that belong to a module's state but never cross the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self, override


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
        ours = {prefix + name: x for name, x in self._tensors.items()}
        for key, x in ours.items():
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != x.shape:
                error_msgs.append(
                    f"size mismatch for {key}: saved {tuple(state_dict[key].shape)}, here {tuple(x.shape)}."
                )
            else:
                x.copy_(state_dict[key])
        others = {key: value for key, value in state_dict.items() if key not in ours}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
