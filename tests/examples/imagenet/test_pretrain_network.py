"""What crosses the network in a step, and that its sums do not depend on where a run was resumed."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import socket
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import cgh
from tests.distributed.processes import spawn
from tests.distributed.test_training import Tiny
from tests.examples.imagenet.runs import EXAMPLE

pytestmark = [
    pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here"),
    pytest.mark.skipif(sys.platform != "linux", reason="the kernel's counts of bytes are Linux's"),
]

IMAGES, SIZE, DIM = 16, 32, 64  # images of a rank, their side, and the width of both embeddings


def script() -> ModuleType:
    sys.path.insert(0, str(EXAMPLE))
    return importlib.import_module("pretrain")


def received() -> int:
    """Bytes that all connections of this process have received, by the kernel's count."""
    total = 0
    for path in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):  # a connection of another kind, or closed by now
            if path.readlink().name.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(path.name))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                total += struct.unpack_from("Q", info, 128)[0]
    return total


def steps(memory_size: int) -> list[int]:
    """Return the bytes received in each step beside the gradients."""
    pretrain = script()
    torch.manual_seed(0)
    model = cgh.CGH(Tiny(), dim=DIM, hidden_dim=16, memory_size=memory_size, image_shape=(3, SIZE, SIZE))
    wrapped, stop = pretrain.wrap(model, SimpleNamespace(compile=False)), pretrain.Stop()
    # With two ranks, the sum of all gradients takes as many bytes as there are gradients, in each direction.
    gradients = 4 * sum(p.numel() for p in model.student.parameters())
    bytes_by_step = []
    for _ in range(4):
        dist.barrier()
        before = received()
        output = wrapped(torch.randn(IMAGES, 3, SIZE, SIZE), torch.randn(IMAGES, 3, SIZE, SIZE))
        output.loss.backward()
        model.update(output)
        stop()
        dist.barrier()
        bytes_by_step.append(received() - before - gradients)
    return bytes_by_step[1:]


def count() -> dict[str, list[int]]:
    return {"small": steps(64), "large": steps(50_000)}


def test_bytes_beside_the_gradients(tmp_path: Path) -> None:
    images = IMAGES * 3 * SIZE * SIZE * 4
    embeddings = IMAGES * 2 * DIM * 4  # to every bank, and back from the rank that computed them
    for rank in spawn(count, 2, tmp_path):
        for small, large in zip(rank["small"], rank["large"], strict=True):
            assert 0.2 * images < large < images + 2 * embeddings + 4096
            assert abs(large - small) < 2048  # the banks hold 50 MB more


def gradients_before_and_after_resuming() -> list[Tensor]:
    """Return the same step's gradients from a model that has made steps before, and from a copy that has not."""
    pretrain, rank, config = script(), dist.get_rank(), SimpleNamespace(compile=False)
    torch.manual_seed(0)
    model = nn.Sequential(Tiny(), nn.Linear(32, 3000), nn.Linear(3000, 300))  # several of DDP's buckets

    def gradients(wrapped: nn.Module, step: int) -> Tensor:
        torch.manual_seed(10 * step + rank)
        wrapped.zero_grad()
        wrapped(torch.randn(4, 3, 32, 32)).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in wrapped.parameters()])

    wrapped = pretrain.wrap(model, config)
    for step in range(3):
        gradients(wrapped, step)
    resumed = pretrain.wrap(copy.deepcopy(model), config)
    return [gradients(wrapped, 3), gradients(resumed, 3)]


@pytest.mark.slow
def test_a_resumed_sum_over_three_ranks_has_the_same_bits(tmp_path: Path) -> None:
    for before, after in spawn(gradients_before_and_after_resuming, 3, tmp_path):
        assert torch.equal(before, after)
