"""The schedules are the reference's, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cgh
from tests import golden


@pytest.mark.parametrize("row", golden.load("schedule"), ids=str)
def test_golden(row: dict[str, Any]) -> None:
    per_epoch = row["steps_per_epoch"]
    step, warmup = row["epoch"] * per_epoch + row["step"], row["warmup_epochs"] * per_epoch
    assert cgh.LearningRate(row["base_lr"], row["epochs"] * per_epoch, warmup)(step) == row["lr"]
    assert cgh.LossWeights(warmup)(step) == (row["infonce_weight"], row["relation_weight"])


def test_ends_at_zero_also_where_all_is_warmup() -> None:
    assert cgh.LearningRate(0.1, steps=10)(10) == 0.0
    assert cgh.LearningRate(0.1, steps=10, warmup_steps=10)(10) == 0.0


def test_drives_a_torch_scheduler() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = cgh.LearningRate(base=1.0, steps=20, warmup_steps=4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * schedule(step))
        optimizer.step()
        scheduler.step()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="warmup_steps is 11 of 10 steps"):
        cgh.LearningRate(0.1, steps=10, warmup_steps=11)
    with pytest.raises(ValueError, match="base is -0.1; a learning rate is 0 or more"):
        cgh.LearningRate(-0.1, steps=10)
    with pytest.raises(ValueError, match="step is 11 of 10"):
        cgh.LearningRate(0.1, steps=10)(11)
    with pytest.raises(ValueError, match="warmup_steps is -1"):
        cgh.LossWeights(-1)
    with pytest.raises(ValueError, match="step is -1"):
        cgh.LossWeights(3)(-1)
    with pytest.raises(ValueError, match="final 1.1"):
        cgh.TeacherMomentum(0.99, steps=10, final=1.1)


def test_the_teachers_momentum_rises_in_a_cosine_and_stays() -> None:
    momentum = cgh.TeacherMomentum(0.9, steps=4, final=1.0)
    assert [round(momentum(n), 4) for n in range(6)] == [0.9, 0.9146, 0.95, 0.9854, 1.0, 1.0]
    student, teacher = torch.nn.Linear(1, 1), cgh.EMATeacher(torch.nn.Linear(1, 1), momentum)
    torch.nn.init.ones_(student.weight)
    torch.nn.init.zeros_(teacher.encoder.weight)
    teacher.update(student)
    assert teacher.encoder.weight.item() == pytest.approx(0.1)


def test_weights_of_a_step_on_the_device_are_those_of_its_number() -> None:
    for weights in (cgh.LossWeights(3), cgh.LossWeights(0)):
        for step in range(6):
            assert tuple(weights.of(torch.tensor(step, dtype=torch.float64))) == tuple(weights(step))


def test_as_a_scheduler_of_torch() -> None:
    schedule = cgh.LearningRate(0.5, steps=6, warmup_steps=2)
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.1}], lr=schedule.base)
    scheduler = schedule.scheduler(optimizer)
    for step in range(7):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([schedule(step), schedule(step) / 5])
        optimizer.step()
        if step < 6:
            scheduler.step()


def test_a_run_resumed_with_more_steps_follows_the_new_schedule() -> None:
    def start(steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        return optimizer, cgh.LearningRate(0.5, steps).scheduler(optimizer)

    optimizer, scheduler = start(4)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    states = optimizer.state_dict(), scheduler.state_dict()
    optimizer, scheduler = start(100)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(cgh.LearningRate(0.5, 100)(3))]
