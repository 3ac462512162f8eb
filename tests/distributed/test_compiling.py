"""A compiled method that shuffles over several ranks is the eager one, in two graphs."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

import cgh
from tests.distributed.processes import spawn
from tests.distributed.test_training import Tiny, images

STEPS, WARMUP = 5, 2


def train_eager_and_compiled() -> tuple[list[list[float]], int]:
    """Return the losses of both ways, and the graphs made."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> nn.Module:
        graphs.append(graph)
        return graph

    torch.manual_seed(0)
    model = cgh.CGH(Tiny(), dim=8, hidden_dim=16, memory_size=21, warmup_steps=WARMUP, image_shape=(3, 32, 32)).double()
    rank, losses = torch.distributed.get_rank(), []
    for method, compiled in ((copy.deepcopy(model), False), (model, True)):
        run = torch.compile(method, backend=backend) if compiled else method
        losses.append([])
        for step in range(STEPS):
            output = run(*(images(step, view)[rank::2] for view in (0, 1)))
            output.loss.backward()
            method.update(output)
            losses[-1].append(output.loss.item())
        assert method.shuffle.calls == STEPS
    return losses, len(graphs)


def test_two_graphs_and_the_losses_of_the_eager_steps(tmp_path: Path) -> None:
    for (eager, compiled), graphs in spawn(train_eager_and_compiled, 2, tmp_path):
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=0)
        assert graphs == 2
