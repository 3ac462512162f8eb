"""Batch shuffling for the teacher, so that batch-norm statistics cannot tell which images belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from cgh import distributed


class BatchShuffle(nn.Module):
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
        self.calls = 0

    @override
    @torch.no_grad()
    def forward(self, encoder: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
        _, world_size = distributed.rank_and_world_size()
        generator = torch.Generator().manual_seed(self.seed + self.calls)
        permutation = torch.randperm(len(images) * world_size, generator=generator)
        self.calls += 1
        contexts = encoder(distributed.permute(images, permutation))
        inverse = torch.argsort(permutation)
        embeddings = distributed.permute(torch.cat(list(contexts.values()), dim=1), inverse)
        widths = [x.shape[1] for x in contexts.values()]
        return dict(zip(contexts, embeddings.split(widths, dim=1), strict=True))

    @override
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.calls)

    @override
    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state)
