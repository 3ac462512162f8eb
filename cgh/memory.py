"""The memory: aligned first-in-first-out banks of teacher embeddings, one a context."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from cgh import distributed
from cgh.contexts import Contexts, check_banks, check_contexts, check_values
from cgh.finite import check_soon
from cgh.state import Counted, LocalTensors


class MemoryBank(LocalTensors, Counted):
    """First-in-first-out banks of unit vectors, written together: row `j` of every bank belongs to the same image.

    That alignment is what lets one context learn the relations that another sees (Gao et al., 2024). Each bank
    is `(size, dim)` and starts as random unit vectors. The queue wraps at any batch size; of a batch larger than the
    bank the newest rows stay.

    Distributed runs gather the embeddings of all ranks, so every rank holds the same banks; nothing else of a bank
    crosses the network, whatever DistributedDataParallel wraps. The banks are in `state_dict` and move with `.to()`.

    A batch with a value that is not finite is left out as a whole, on every rank. On the CPU that is an error at once;
    on CUDA, where nothing waits for the device, at one of the next calls.

    Args:
        dims: width of each bank by the name of its context.
        size: rows.
        dtype: of the rows; `torch.bfloat16` or `torch.float16` takes half the space of float32.
        seed: of the random start, equal on every rank whatever their global seeds.

    Raises:
        TypeError: `dims` is no mapping.
        ValueError: a width or size below one; on `enqueue`, contexts or widths other than the banks', contexts of
            different batch sizes, also over the ranks, values that are not finite, or an empty batch.
        RuntimeError: on `enqueue`, several processes were started but have not joined a process group, or a rank is
            missing.

    Example:
        >>> import torch, cgh
        >>> memory = cgh.MemoryBank({"global": 128, "hypercolumn": 64}, size=1000)
        >>> memory["global"].shape
        torch.Size([1000, 128])
        >>> memory.enqueue({"global": torch.randn(32, 128), "hypercolumn": torch.randn(32, 64)})
        >>> memory.pointer
        32
    """

    def __init__(
        self, dims: Mapping[str, int], size: int = 131_072, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        if not isinstance(dims, Mapping):
            raise TypeError(f"dims is {dims!r}; give a width for every context, such as {{'global': 512}}.")
        if not dims or min(dims.values()) < 1:
            raise ValueError(
                f"dims is {dict(dims)}; give every context a width of 1 or more, such as {{'global': 512}}."
            )
        if size < 1:
            raise ValueError(f"size is {size}; a bank has at least one row.")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; embeddings are floating point.")
        super().__init__(_unit_rows(dims, size, dtype, seed))
        self.dims = dict(dims)
        self.size = size
        self.seed = seed

    @property
    def pointer(self) -> int:
        """The row that is written next, the oldest. Reading it waits for an accelerator."""
        return self._get_count()

    @pointer.setter
    def pointer(self, pointer: int) -> None:
        if not 0 <= pointer < self.size:
            raise ValueError(f"pointer is {pointer}; it is a row of a bank, from 0 to {self.size - 1}.")
        self._set_count(pointer)

    @torch.no_grad()
    def enqueue(self, contexts: Contexts) -> None:
        """Write a batch of embeddings `(N, D)` over the oldest rows, in every bank at once.

        Call it after the loss and its backward pass: the loss reads the banks as they were before this batch.
        """
        self.check(contexts)
        check_soon({f"contexts[{name!r}]": x for name, x in contexts.items()})
        self.write(contexts)

    def check(self, contexts: Contexts) -> None:
        """Raise what `enqueue` would before it writes; all ranks have to call it."""
        count = check_contexts(contexts, "contexts")
        check_values(contexts, "contexts")
        if set(contexts) != set(self.dims):
            raise ValueError(f"contexts are {sorted(contexts)}; the memory keeps {sorted(self.dims)}, all in step.")
        check_banks(contexts, self, "contexts", list(self.dims))
        distributed.check_sizes(count)

    @torch.no_grad()
    def write(self, contexts: Contexts) -> None:
        """`enqueue` what has been checked."""
        batch = distributed.gather(torch.cat([contexts[name].to(self[name]) for name in self], dim=1))
        newest = batch[-self.size :]
        # By tensors of the device alone: nothing waits, and each replay of a CUDA graph writes to other rows.
        finite = torch.linalg.vector_norm(batch, torch.inf) < torch.inf
        first = self._count + (len(batch) - len(newest))
        places = (torch.arange(len(newest), device=first.device) + first) % self.size
        for name, rows in zip(self, newest.split(list(self.dims.values()), dim=1), strict=True):
            self[name].index_copy_(0, places, torch.where(finite, rows, self[name][places]))
        self._count.add_(finite * len(batch)).remainder_(self.size)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget every embedding: random unit rows again, as at the start."""
        for name, rows in _unit_rows(self.dims, self.size, torch.float32, self.seed).items():
            self[name].copy_(rows)
        self._set_count(0)

    @override
    def extra_repr(self) -> str:
        return f"{self.dims}, size={self.size}, pointer={self.pointer}"


def _unit_rows(dims: Mapping[str, int], size: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Random unit rows, the same on every device that is the default."""
    generator, device = torch.Generator("cpu").manual_seed(seed), torch.empty(()).device
    rows = {name: torch.randn(size, dim, generator=generator, device="cpu") for name, dim in dims.items()}
    return {name: F.normalize(x, dim=1).to(device, dtype) for name, x in rows.items()}
