"""What crosses the network: the batch's embeddings, and each rank's own share of the shuffled images.

A global batch is numbered as a distributed sampler deals it out: image `i` of rank `r` is image `i * world_size + r`.
So several processes see, and remember, the order that a single process would.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes, `(0, 1)` where nothing is distributed.

    Raises:
        RuntimeError: a launcher started several processes, but they have not joined a process group.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    started = os.environ.get("WORLD_SIZE", "1")
    if started not in ("", "1"):
        raise RuntimeError(
            f"WORLD_SIZE is {started}, but the process group is not initialised: the ranks' memory banks "
            "would drift apart. Call torch.distributed.init_process_group() first, or unset WORLD_SIZE to run alone."
        )
    return 0, 1


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Return every rank's rows `(N, D)` in the order of the global batch, `(N * world_size, D)`.

    Every rank has to bring the same `N`.
    """
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return x
    rows = x.new_empty((world_size * len(x), *x.shape[1:]))
    # PyTorch 2.14 renamed it, and warns of the old name.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(rows, x.contiguous())
    return rearrange(rows, "(r n) d -> (n r) d", r=world_size)


@torch.no_grad()
def mean(x: Tensor) -> Tensor:
    """Return the mean of `x` over all ranks."""
    _, world_size = rank_and_world_size()
    if world_size > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x / world_size


@torch.no_grad()
def permute(x: Tensor, permutation: Tensor) -> Tensor:
    """Reorder the global batch: row `j` of the result is row `permutation[j]`, and each rank keeps its own share.

    A row travels only from the rank that has it to the rank that needs it.

    Args:
        x: this rank's rows `(N, ...)`.
        permutation: of `range(N * world_size)`, on the CPU, the same on every rank.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return x[permutation.to(x.device)]
    source = permutation.view(-1, world_size)  # column r: the rows that rank r is to hold
    sends = [source[source[:, r] % world_size == rank, r] // world_size for r in range(world_size)]
    origin = source[:, rank] % world_size
    # Channels-last rows are sent as they lie, so that neither end copies them into another layout.
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    rows = rearrange(x, "n c h w -> n h w c") if channels_last else x
    received = torch.empty_like(rows)
    dist.all_to_all_single(
        received,
        rows[torch.cat(sends).to(x.device)],
        output_split_sizes=torch.bincount(origin, minlength=world_size).tolist(),
        input_split_sizes=[len(rows_for) for rows_for in sends],
    )
    arrival = torch.argsort(origin, stable=True)  # rows arrive by rank of origin; row k belongs at arrival[k]
    result = received[torch.argsort(arrival).to(x.device)]
    return rearrange(result, "n h w c -> n c h w") if channels_last else result
