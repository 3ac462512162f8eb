"""Two processes with half a batch each train as one process with all of it."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cgh
from tests.distributed.processes import spawn

BATCH, STEPS = 8, 3


class Tiny(nn.Sequential):
    """A backbone small enough for float64 on one core."""

    def __init__(self) -> None:
        def stage(channels: int, width: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(OrderedDict(layer2=stage(3, 8), layer3=stage(8, 16), layer4=stage(16, 32), pool=pool))


def images(step: int, view: int, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + view)
    return torch.randn(BATCH, 3, size, size, generator=generator, dtype=torch.float64)


def train(shuffle: bool) -> dict[str, Any]:
    """Train `CGH` under DistributedDataParallel, or as one process where the split batch norm stands in for two."""
    torch.manual_seed(0)
    backbone, distributed = Tiny(), dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    model = cgh.CGH(
        backbone,
        dim=8,
        hidden_dim=16,
        memory_size=21,  # no multiple of the batch, so that the queue wraps in between
        warmup_steps=2,
        centring_momentum=0.9,
        shuffle=shuffle,
        image_shape=(3, 32, 32),
        momentum=0.9,
    ).double()
    wrapped: nn.Module = model
    if distributed:
        torch.manual_seed(rank + 1)  # ranks need not agree on the global seed
        wrapped = DistributedDataParallel(model)
    else:
        cgh.SplitBatchNorm2d.convert(model, 2)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.05, momentum=0.9)
    losses, gradients = [], []
    for step in range(STEPS):
        strong, weak, local = (images(step, v, size)[rank::world_size] for v, size in ((0, 32), (1, 32), (2, 16)))
        output = wrapped(strong, weak, local)
        optimizer.zero_grad()
        output.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.student.parameters()]))
        optimizer.step()
        model.update(output)
        losses.append(torch.stack([output.loss, output.infonce, *output.terms.values()]).detach())
    return {
        "losses": torch.stack(losses),
        "gradients": torch.stack(gradients),
        "student": dict(model.student.named_parameters()),
        "teacher": dict(model.teacher.named_parameters()),
        "memory": model.memory.state_dict(),
        "centring": model.relation_loss.centring.state_dict(),
    }


def train_both() -> dict[str, Any]:
    return {"plain": train(shuffle=False), "shuffled": train(shuffle=True)}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    first, second = spawn(train_both, 2, tmp_path)
    for way, one in train_both().items():
        for part in ("student", "teacher", "memory", "centring", "gradients"):
            torch.testing.assert_close(first[way][part], second[way][part], rtol=0, atol=0)
            torch.testing.assert_close(first[way][part], one[part], rtol=1e-9, atol=1e-9)
        losses = (first[way]["losses"] + second[way]["losses"]) / 2
        torch.testing.assert_close(losses, one["losses"], rtol=1e-9, atol=1e-9)
    # Shuffling matters here: without it this test would not notice a lost permutation.
    assert not torch.allclose(first["plain"]["losses"], first["shuffled"]["losses"], atol=1e-3)


class Users(nn.Module):
    """A module of a user's own around the method."""

    def __init__(self) -> None:
        super().__init__()
        self.method = cgh.CGH(Tiny(), dim=8, hidden_dim=16, memory_size=16, image_shape=(3, 32, 32))

    def forward(self, strong: Tensor, weak: Tensor) -> Tensor:
        return self.method(strong, weak).loss


def mark_and_run() -> list[Tensor]:
    banks = []
    for whole in (True, False):
        model = Users()
        model.method.memory["global"].fill_(dist.get_rank())
        wrapped = DistributedDataParallel(model if whole else model.method)
        for _ in range(2):
            wrapped(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32))
        banks.append(model.method.memory["global"])
    return banks


def test_no_bank_is_broadcast(tmp_path: Path) -> None:
    for rank, banks in enumerate(spawn(mark_and_run, 2, tmp_path)):
        for bank in banks:
            assert torch.equal(bank, torch.full_like(bank, rank))
