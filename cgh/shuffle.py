"""Batch shuffling for the teacher, so that batch-norm statistics cannot tell which images belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from cgh import distributed
from cgh.contexts import check_contexts
from cgh.state import Counted

Integer = TypeVar("Integer", int, Tensor)


class BatchShuffle(Counted):
    """Runs an encoder on a shuffled batch and puts its outputs back in order (MoCo's "shuffling BN").

    Without it, a student and a teacher that see the same images on the same device can find the positive pair by its
    batch-norm statistics. The batch is shuffled across all ranks: each receives its own share of the images and no
    more. The permutation follows from the seed and the number of calls, so it is the same on every rank without being
    sent, and after resuming from `state_dict`.

    On a single device with plain batch norm it changes nothing; there, put `SplitBatchNorm2d` in the encoder.

    Args:
        seed: of the permutations.

    Shape:
        `(encoder, images (N, ...))` -> the encoder's contexts, `(N, D)` each.

    Raises:
        TypeError: the encoder gives no contexts.
        ValueError: the ranks' batches have different sizes; every rank says so. The encoder gives other than one row
            for each image.
        RuntimeError: a rank is missing.

    Example:
        >>> import torch, cgh
        >>> shuffle = cgh.BatchShuffle(seed=0)
        >>> teacher = lambda images: {"global": images.flatten(1)}
        >>> images = torch.randn(4, 3, 2, 2)
        >>> torch.equal(shuffle(teacher, images)["global"], images.flatten(1))
        True
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        # The count once more, no buffer, as it stays on the host: that has to know which rank sends how much to which.
        self._on_host = torch.zeros((), dtype=torch.long, device="cpu")

    @property
    def calls(self) -> int:
        """Batches shuffled so far. Reading it waits for an accelerator."""
        return self._get_count()

    @calls.setter
    def calls(self, calls: int) -> None:
        self._set_count(calls)

    @override
    def _set_count(self, count: int) -> None:
        super()._set_count(count)
        self._on_host.fill_(count)

    @override
    @torch.no_grad()
    def forward(self, encoder: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
        """Return what `encoder` makes of `images`, which it sees in another order."""
        _, world_size = distributed.rank_and_world_size()
        if world_size == 1:
            order = permutation(len(images), self.seed, self._count, self._count.device)
        else:
            order = _shared_order(self._on_host, len(images), self.seed)
        self._count.add_(1)
        contexts = encoder(distributed.permute(images, order))
        check_contexts(contexts, "what the encoder gives")
        if (rows := len(next(iter(contexts.values())))) != len(images):
            raise ValueError(f"the encoder gives {rows} rows for {len(images)} images; it gives one for each.")
        inverse = torch.argsort(order)
        embeddings = distributed.permute(torch.cat(list(contexts.values()), dim=1), inverse)
        widths = [x.shape[1] for x in contexts.values()]
        return dict(zip(contexts, embeddings.split(widths, dim=1), strict=True))

    @override
    def extra_repr(self) -> str:
        return f"seed={self.seed}"


# An operator of its own, so that a graph of `torch.compile` holds it as one call, and talks to the other ranks in it.
@torch.library.custom_op(
    "cgh::shared_order", mutates_args=("calls",), schema="(Tensor(a!) calls, int size, int seed) -> Tensor"
)
def _shared_order(calls: Tensor, size: int, seed: int) -> Tensor:
    """Return the order of the global batch, `size` images a rank, on the host, and count the call."""
    distributed.check_sizes(size)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph cannot shuffle over several ranks, as all its replays would be of one order: pass "
            "shuffle=False, and use synchronised batch norm."
        )
    _, world_size = distributed.rank_and_world_size()
    order = permutation(size * world_size, seed, int(calls), torch.device("cpu"))
    calls.add_(1)
    return order


@_shared_order.register_fake
def _(calls: Tensor, size: int, seed: int) -> Tensor:
    _, world_size = distributed.rank_and_world_size()
    return calls.new_empty(size * world_size)


def permutation(size: int, seed: int, call: Integer, device: torch.device) -> Tensor:
    """Return a permutation of `range(size)` that follows from the seed and the number of the call.

    It is computed by whole numbers alone: it is the same on every device and in every graph, and no generator's state
    has to travel.

    Example:
        >>> import torch
        >>> from cgh.shuffle import permutation
        >>> permutation(5, seed=0, call=3, device=torch.device("cpu")).sort().values
        tensor([0, 1, 2, 3, 4])
    """
    start = _mix((call + _mix(seed & _MASK)) & _MASK)
    return torch.argsort(_mix((torch.arange(size, device=device) + start) & _MASK))


_MASK = 2**31 - 1
"""Numbers of 31 bits, whose products fit the 63 of an integer tensor."""


def _mix(x: Integer) -> Integer:
    """Map numbers of 31 bits to one another, one to one, such that neighbours come to lie anywhere."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & _MASK
    return x ^ (x >> 16)
