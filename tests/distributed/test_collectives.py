"""Gathering and permuting a batch over ranks equals doing it in one place, and moves no row needlessly."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cgh import distributed
from tests.distributed.processes import spawn

LOCAL = 6


def work(permutations: list[list[int]]) -> dict[str, object]:
    rank, world_size = distributed.rank_and_world_size()
    images = torch.arange(LOCAL * world_size * 12.0).view(-1, 3, 2, 2)  # the global batch, in order
    mine = images[rank::world_size]
    sent: list[int] = []
    exchange = dist.all_to_all_single

    def counting(output: Tensor, rows: Tensor, *, output_split_sizes: list[int], input_split_sizes: list[int]) -> None:
        sent.append(sum(n for other, n in enumerate(input_split_sizes) if other != rank))
        exchange(output, rows, output_split_sizes=output_split_sizes, input_split_sizes=input_split_sizes)

    dist.all_to_all_single = counting
    wrong = 0
    for permutation in map(torch.tensor, permutations):
        expected = images[permutation][rank::world_size]
        wrong += not torch.equal(distributed.permute(mine, permutation), expected)
        last = distributed.permute(mine.contiguous(memory_format=torch.channels_last), permutation)
        wrong += not (torch.equal(last, expected) and last.is_contiguous(memory_format=torch.channels_last))
    return {
        "wrong": wrong,
        "sent": sent[::2],
        "gathered": distributed.gather(mine.flatten(1)),
        "mean": distributed.mean(torch.tensor([float(rank)])),
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives(world_size: int, tmp_path: Path) -> None:
    count = LOCAL * world_size
    torch.manual_seed(0)
    permutations = [torch.randperm(count) for _ in range(5)] + [torch.arange(count), torch.arange(count).flip(0)]
    results = spawn(work, world_size, tmp_path, [p.tolist() for p in permutations])
    for rank, result in enumerate(results):
        assert result["wrong"] == 0
        assert torch.equal(result["gathered"], torch.arange(count * 12.0).view(-1, 12))
        assert result["mean"].item() == (world_size - 1) / 2
        # A rank sends the rows that others need of it, and never more than it has.
        for permutation, sent in zip(permutations, result["sent"], strict=True):
            home, destination = permutation % world_size, torch.arange(count) % world_size
            assert sent == int(((home == rank) & (destination != rank)).sum()) <= LOCAL


def test_a_process_group_ends_when_it_is_destroyed(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    world = weakref.ref(dist.group.WORLD)
    assert distributed._hosts() is world()
    dist.destroy_process_group()
    assert world() is None
