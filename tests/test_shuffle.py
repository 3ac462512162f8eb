"""Shuffling hides a batch's order from the encoder and from nobody else."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cgh
from cgh.shuffle import permutation
from tests.conftest import small_encoder


def test_the_encoder_sees_a_permutation_and_the_caller_does_not() -> None:
    seen: list[Tensor] = []

    def encoder(images: Tensor) -> dict[str, Tensor]:
        seen.append(images)
        return {"global": images.flatten(1), "hypercolumn": 2 * images.flatten(1)[:, :2]}

    shuffle, images = cgh.BatchShuffle(seed=3), torch.randn(16, 3, 2, 2)
    for _ in range(2):
        output = shuffle(encoder, images)
        assert torch.equal(output["global"], images.flatten(1))
        assert torch.equal(output["hypercolumn"], 2 * images.flatten(1)[:, :2])
    first, second = (x.flatten(1)[:, 0] for x in seen)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, images[:, 0, 0, 0].sort().values)


def test_changes_what_split_batch_norm_computes() -> None:
    encoder = cgh.SplitBatchNorm2d.convert(small_encoder(), 2)
    images = torch.randn(8, 3, 64, 64)
    shuffled, plain = cgh.BatchShuffle()(encoder, images), encoder(images)
    assert not torch.allclose(shuffled["global"], plain["global"], atol=1e-3)


def test_goes_on_after_loading() -> None:
    shuffle, images = cgh.BatchShuffle(), torch.randn(16, 1, 1, 1)
    order: list[Tensor] = []

    def encoder(images: Tensor) -> dict[str, Tensor]:
        order.append(images.flatten())
        return {"global": images.flatten(1)}

    shuffle(encoder, images)
    twin = cgh.BatchShuffle()
    twin.load_state_dict(copy.deepcopy(shuffle.state_dict()))
    shuffle(encoder, images)
    twin(encoder, images)
    assert torch.equal(order[1], order[2])


def test_keeps_channels_last() -> None:
    images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)

    def encoder(x: Tensor) -> dict[str, Tensor]:
        assert x.is_contiguous(memory_format=torch.channels_last)
        return {"global": x.flatten(1)}

    assert torch.equal(cgh.BatchShuffle()(encoder, images)["global"], images.flatten(1))


def test_permutations_are_even_and_the_same_wherever_they_are_computed() -> None:
    cpu = torch.device("cpu")
    drawn = [tuple(permutation(3, seed, call, cpu).tolist()) for seed in range(40) for call in range(60)]
    counts = [drawn.count(order) for order in itertools.permutations(range(3))]
    assert sum(counts) == 2400
    assert max(abs(count - 400) for count in counts) < 4 * (400 * 5 / 6) ** 0.5
    big = permutation(4096, 2**40 + 1, 5, cpu)
    assert torch.equal(big.sort().values, torch.arange(4096))
    assert torch.equal(big, permutation(4096, 2**40 + 1, torch.tensor(5), cpu))


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        (lambda images: images, TypeError, "what the encoder gives must map context names"),
        (lambda images: {"global": torch.cat([images, images])}, ValueError, "gives 8 rows for 4 images"),
    ],
)
def test_an_encoder_of_other_outputs(encoder: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cgh.BatchShuffle()(encoder, torch.randn(4, 3))
