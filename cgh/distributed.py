"""What crosses the network: the batch's embeddings, and each rank's own share of the shuffled images.

A global batch is numbered as a distributed sampler deals it out: image `i` of rank `r` is image `i * world_size + r`.
So several processes see, and remember, the order that a single process would.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch._compile import _disable_dynamo

Function = TypeVar("Function", bound=Callable[..., object])


def outside_graphs(function: Function) -> Function:
    """Keep `torch.compile` out of a function that works with numbers of the host, which it would take for constants."""
    # torch.compiler.disable does the same, but at the price of importing the compiler here.
    return cast("Function", _disable_dynamo(function))


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
        permutation: of `range(N * world_size)`, the same on every rank; on the CPU where there are several.
    """
    _, world_size = rank_and_world_size()
    return x[send(permutation, x.device)] if world_size == 1 else _exchange(x, permutation)


def send(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on `device`, without waiting for it where `x` comes from the CPU."""
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def check_sizes(size: int) -> None:
    """Compare batch sizes over all ranks; the hosts do it among themselves, so nothing waits for a device.

    Raises:
        ValueError: they differ, on every rank.
        RuntimeError: a rank has stopped, or does not come within the process group's timeout.
    """
    _, world_size = rank_and_world_size()
    if world_size > 1:
        _compare(size)


@outside_graphs
def _compare(size: int) -> None:
    """`check_sizes` over several ranks."""
    rank, world_size = rank_and_world_size()
    if (group := _hosts()) is None:
        return
    sizes = torch.zeros(world_size, dtype=torch.long, device="cpu")
    sizes[rank] = size
    try:
        dist.all_reduce(sizes, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {rank} brought a batch, and another rank did not: it has stopped, is late, or has fewer batches. "
            f"The first error in the other ranks' output says why. ({error})"
        ) from error
    if len(set(sizes.tolist())) > 1:
        raise ValueError(
            f"the batches have different sizes, {sizes.tolist()} by rank; all must be equal. Give the DataLoader "
            "drop_last=True, and every rank as many images."
        )


_groups: list[tuple[Callable[[], Any], Callable[[], Any]]] = []
"""The last default process group, and the one by which its hosts compare sizes.

By weak references: a group that outlives `destroy_process_group` has threads that may abort the process as it ends.
"""


def _hosts() -> Any:
    """The process group by which hosts talk, made at the first call; None where there is no backend for it."""
    world: Any = dist.group.WORLD
    if not _groups or _groups[0][0]() is not world:
        group = world
        if dist.get_backend() not in ("gloo", "mpi"):
            group = dist.new_group(backend="gloo") if dist.is_gloo_available() else None
        _groups[:] = [(weakref.ref(world), (lambda: None) if group is None else weakref.ref(group))]
    return _groups[0][1]()


# An operator of its own, so that a graph of `torch.compile` holds it as one call.
@torch.library.custom_op("cgh::exchange", mutates_args=(), schema="(Tensor x, Tensor permutation) -> Tensor")
def _exchange(x: Tensor, permutation: Tensor) -> Tensor:
    """`permute` over several ranks."""
    rank, world_size = rank_and_world_size()
    source = permutation.view(-1, world_size)  # column r: the rows that rank r is to hold
    sends = [source[source[:, r] % world_size == rank, r] // world_size for r in range(world_size)]
    origin = source[:, rank] % world_size
    # Channels-last rows are sent as they lie, so that neither end copies them into another layout.
    channels_last = _layout(x) == torch.channels_last
    rows = rearrange(x, "n c h w -> n h w c") if channels_last else x.contiguous()
    received = torch.empty_like(rows)
    dist.all_to_all_single(
        received,
        rows[send(torch.cat(sends), x.device)],
        output_split_sizes=torch.bincount(origin, minlength=world_size).tolist(),
        input_split_sizes=[len(rows_for) for rows_for in sends],
    )
    arrival = torch.argsort(origin, stable=True)  # rows arrive by rank of origin; row k belongs at arrival[k]
    result = received[send(torch.argsort(arrival), x.device)]
    return rearrange(result, "n h w c -> n c h w") if channels_last else result


@_exchange.register_fake
def _(x: Tensor, permutation: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_layout(x))


def _layout(x: Tensor) -> torch.memory_format:
    """The layout in which rows are sent and received."""
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
