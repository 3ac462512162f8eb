"""The memory: aligned first-in-first-out banks of teacher embeddings, one a context."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from cgh import distributed
from cgh.contexts import Contexts, check_banks, check_contexts
from cgh.state import LocalTensors


class MemoryBank(LocalTensors):
    """First-in-first-out banks of unit vectors, written together: row `j` of every bank belongs to the same image.

    That alignment is what lets one context learn the relations that another sees (Gao et al., 2024). Each bank
    is `(size, dim)` and starts as random unit vectors. The queue wraps at any batch size.

    Distributed runs gather the embeddings of all ranks, so every rank holds the same banks; nothing else of a bank
    crosses the network, whatever DistributedDataParallel wraps. The banks are in `state_dict` and move with `.to()`.

    Args:
        dims: width of each bank by the name of its context.
        size: rows; at least the batch size over all ranks.
        dtype: of the rows; `torch.bfloat16` or `torch.float16` takes half the space of float32.
        seed: of the random start, equal on every rank whatever their global seeds.

    Raises:
        ValueError: a width or size below one; on `enqueue`, contexts or widths other than the banks', contexts of
            different batch sizes, values that are not finite, an empty batch or one larger than the bank.
        RuntimeError: on `enqueue`, several processes were started but have not joined a process group.

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
        if not dims or min(dims.values()) < 1:
            raise ValueError(
                f"dims is {dict(dims)}; give every context a width of 1 or more, such as {{'global': 512}}."
            )
        if size < 1:
            raise ValueError(f"size is {size}; a bank has at least one row.")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; embeddings are floating point.")
        generator = torch.Generator().manual_seed(seed)
        super().__init__(
            {n: F.normalize(torch.randn(size, d, generator=generator), dim=1).to(dtype) for n, d in dims.items()}
        )
        self.dims = dict(dims)
        self.size = size
        self.pointer = 0

    @torch.no_grad()
    def enqueue(self, contexts: Contexts) -> None:
        """Write a batch of embeddings `(N, D)` over the oldest rows, in every bank at once.

        Call it after the loss and its backward pass: the loss reads the banks as they were before this batch.
        """
        count = self.check(contexts)
        batch = distributed.gather(torch.cat([contexts[name].to(self[name]) for name in self], dim=1))
        head = min(count, self.size - self.pointer)
        for name, rows in zip(self, batch.split(list(self.dims.values()), dim=1), strict=True):
            self[name][self.pointer : self.pointer + head] = rows[:head]
            self[name][: count - head] = rows[head:]
        self.pointer = (self.pointer + count) % self.size

    def check(self, contexts: Contexts) -> int:
        """Raise what `enqueue` would; return how many rows it would write, over all ranks."""
        count = check_contexts(contexts, "contexts")
        if set(contexts) != set(self.dims):
            raise ValueError(f"contexts are {sorted(contexts)}; the memory keeps {sorted(self.dims)}, all in step.")
        check_banks(contexts, self, "contexts", list(self.dims))
        _, world_size = distributed.rank_and_world_size()
        count *= world_size
        if count > self.size:
            raise ValueError(
                f"a batch of {count} over {world_size} rank(s) does not fit a bank of {self.size} rows; make size at "
                f"least {count}."
            )
        return count

    @override
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.pointer)

    @override
    def set_extra_state(self, state: Tensor) -> None:
        self.pointer = int(state)

    @override
    def extra_repr(self) -> str:
        return f"{self.dims}, size={self.size}, pointer={self.pointer}"
