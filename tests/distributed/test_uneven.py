"""Ranks that bring different batches, or none, are an error on every rank, before anything is written."""

from __future__ import annotations

import copy
import datetime
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cgh
from tests.distributed.processes import spawn
from tests.distributed.test_training import Tiny

DIMS = {"global": 4, "hypercolumn": 2}


def told(call: Callable[[], object], state: Callable[[], dict[str, Tensor]]) -> str:
    """The error of a call that changes no state."""
    before = copy.deepcopy(state())
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    return f"{caught.type.__name__}: {caught.value}"


def bring_other_sizes() -> list[str]:
    rank = dist.get_rank()
    rows = {name: torch.ones(4 - rank, dim) for name, dim in DIMS.items()}
    memory, shuffle = cgh.MemoryBank(DIMS, size=16), cgh.BatchShuffle()
    messages = [
        told(lambda: memory.enqueue(rows), memory.state_dict),
        told(lambda: shuffle(lambda images: {"global": images}, rows["global"]), shuffle.state_dict),
    ]
    for shuffles in (True, False):
        model = cgh.CGH(Tiny(), dim=4, hidden_dim=8, memory_size=16, shuffle=shuffles, image_shape=(3, 32, 32)).eval()
        images = torch.randn(4 - rank, 3, 32, 32)
        messages.append(told(lambda m=model, x=images: m.update(m(x, x)), model.state_dict))
    memory.enqueue({name: x[:2] for name, x in rows.items()})  # the ranks are still in step
    assert memory.pointer == 4
    return messages


def test_different_sizes(tmp_path: Path) -> None:
    for messages in spawn(bring_other_sizes, 2, tmp_path):
        assert len(messages) == 4
        for message in messages:
            assert message.startswith(
                "ValueError: the batches have different sizes, [4, 3] by rank; all must be equal."
            )
            assert "drop_last=True" in message


def stop_early(rank: int, folder: str) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=5)
    )
    memory = cgh.MemoryBank(DIMS, size=16)
    rows = {name: torch.ones(4, dim) for name, dim in DIMS.items()}
    memory.enqueue(rows)
    if rank == 0:
        Path(folder, "told").write_text(told(lambda: memory.enqueue(rows), memory.state_dict))
    os._exit(0)


def test_a_rank_that_stops(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(stop_early, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    message = (tmp_path / "told").read_text()
    assert message.startswith("RuntimeError: rank 0 brought a batch, and another rank did not: it has stopped, is late")


def train(options: dict[str, object], accumulate: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = cgh.CGH(Tiny(), dim=4, hidden_dim=8, memory_size=16, warmup_steps=1, image_shape=(3, 32, 32), **options)
    model.student.extractor.backbone.layer2.requires_grad_(False)
    wrapped: nn.Module = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.student.parameters() if p.requires_grad], lr=0.05)
    for step in range(3):
        outputs = []
        for part in range(accumulate):
            torch.manual_seed(10 * step + part + 100 * dist.get_rank())
            last = part == accumulate - 1
            with wrapped.no_sync() if not last else torch.enable_grad():
                outputs.append(wrapped(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)))
                (outputs[-1].loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update(*outputs)
    assert model.steps == 3
    assert model.memory.pointer == 3 * accumulate * 8 % 16
    return [*model.student.parameters(), *model.teacher.parameters(), *model.memory.state_dict().values()]


def train_in_all_ways() -> list[list[Tensor]]:
    return [
        train({"pairs": [("global", "global")]}, 1),
        train({"pairs": [("global", "hypercolumn")]}, 1),
        train({}, 2),
    ]


def test_unpaired_contexts_frozen_stems_and_accumulation_run(tmp_path: Path) -> None:
    first, second = spawn(train_in_all_ways, 2, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
