"""CGH as one module is its parts in a loop, and its whole state is in `state_dict`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cgh
from tests.conftest import small_backbone

SETTINGS: dict[str, Any] = {"dim": 16, "hidden_dim": 32, "memory_size": 50, "image_shape": (3, 64, 64)}


def images(step: int, size: int = 64) -> Tensor:
    return torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(step))


def sgd(model: cgh.CGH) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.student.parameters(), lr=0.05, momentum=0.9)


def train(model: cgh.CGH, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        output = model(images(2 * step), images(2 * step + 1), images(step, size=32))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.update(output)
        losses.append(output.loss.item())
    return losses


def test_a_run_saved_and_restored_equals_one_never_stopped(tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(True)

    def build() -> cgh.CGH:
        backbone = cgh.SplitBatchNorm2d.convert(small_backbone(), 2)
        return cgh.CGH(
            backbone, **SETTINGS, warmup_steps=4, centring_momentum=0.9, momentum=lambda update: 1 - 0.5 / (update + 1)
        )

    model = build()
    optimizer = sgd(model)
    losses = train(model, optimizer, range(3))
    cgh.checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    losses += train(model, optimizer, range(3, 6))

    torch.manual_seed(1)
    resumed = build()
    resumed_optimizer = sgd(resumed)
    state = cgh.checkpoint.load(tmp_path / "run.pt")
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    assert train(resumed, resumed_optimizer, range(3, 6)) == losses[3:]
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.use_deterministic_algorithms(False)


def test_equals_the_plain_loop() -> None:
    model = cgh.CGH(small_backbone(), **SETTINGS)
    student = copy.deepcopy(model.student)
    teacher = cgh.EMATeacher(student)
    memory = cgh.MemoryBank(student.dims, size=50)
    criterion = cgh.CrossContextLoss()
    shuffle = cgh.BatchShuffle()
    optimizer, plain = sgd(model), torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        strong, weak = images(2 * step), images(2 * step + 1)
        output = model(strong, weak)
        z, t = student(strong), shuffle(teacher, weak)
        loss = criterion(z, t, memory)
        assert loss.item() == output.loss.item()
        for part, total in ((optimizer, output.loss), (plain, loss)):
            total.backward()
            part.step()
            part.zero_grad()
        model.update(output)
        teacher.update(student)
        memory.enqueue(t)
    torch.testing.assert_close(model.student.state_dict(), student.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(model.teacher.state_dict(), teacher.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(model.memory.state_dict(), memory.state_dict(), rtol=0, atol=0)


def test_warm_up_fades_infonce_into_relations() -> None:
    model = cgh.CGH(small_backbone(), **SETTINGS, warmup_steps=2)
    optimizer = sgd(model)
    for step, a in enumerate([0.0, 0.5, 1.0, 1.0]):
        output = model(images(2 * step), images(2 * step + 1))
        relations = sum(output.terms.values())
        torch.testing.assert_close(output.loss, (1 - a) * output.infonce + a / 2 * relations)
        assert (output.infonce == 0) == (a == 1)
        output.loss.backward()
        optimizer.step()
        model.update(output)


def test_local_views_join_the_global_term() -> None:
    model = cgh.CGH(small_backbone(), **SETTINGS).eval()
    strong, weak, local = images(0), images(1), images(2, size=32)
    one, two = model(strong, weak), model(strong, weak, local)
    pair = ("hypercolumn", "global")
    torch.testing.assert_close(one.terms[pair], two.terms[pair])
    extra = model(strong, weak, local, local).terms["global", "hypercolumn"]
    single, double = one.terms["global", "hypercolumn"], two.terms["global", "hypercolumn"]
    torch.testing.assert_close(extra, (single + 2 * (2 * double - single)) / 3)


def test_views_of_different_batches_are_an_error() -> None:
    model = cgh.CGH(small_backbone(), **SETTINGS)
    with pytest.raises(ValueError, match="strong has 8 images and weak 4"):
        model(images(0), images(1)[:4])


def test_a_bad_batch_changes_no_state() -> None:
    model = cgh.CGH(small_backbone(), **SETTINGS)
    output = model(images(0), images(1))
    before = copy.deepcopy(model.state_dict())
    broken = {**output.teacher, "global": output.teacher["global"] * float("nan")}
    with pytest.raises(ValueError, match=r"\['global'\] holds .* not finite"):
        model.update(output._replace(teacher=broken))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
