"""The teacher is an exponential moving average of the student's parameters, and of nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import cgh
from tests.conftest import small_encoder


def perturbed(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for x in [*twin.parameters(), *(b for b in twin.buffers() if b.is_floating_point())]:
            x.add_(torch.randn_like(x))
    return twin


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_update(momentum: float) -> None:
    student = small_encoder()
    teacher = cgh.EMATeacher(student, momentum)
    before, moved = copy.deepcopy(teacher.encoder.state_dict()), perturbed(student)
    teacher.update(moved)
    for name, x in teacher.encoder.named_parameters():
        new = moved.get_parameter(name)
        if momentum in (0.0, 1.0):
            assert torch.equal(x, before[name] if momentum else new)
        torch.testing.assert_close(x, momentum * before[name] + (1 - momentum) * new)
    for name, x in teacher.encoder.named_buffers():
        assert torch.equal(x, before[name])


def test_batch_norm_statistics_are_its_own() -> None:
    student = small_encoder()
    teacher = cgh.EMATeacher(student)
    images = torch.randn(4, 3, 64, 64)
    teacher(images)
    student(5 * images)
    assert teacher.training
    ours, theirs = teacher.encoder.extractor.backbone.bn1, student.extractor.backbone.bn1
    assert (ours.num_batches_tracked, theirs.num_batches_tracked) == (1, 1)
    assert not torch.allclose(ours.running_var, theirs.running_var)


def test_gives_no_gradient_and_keeps_none() -> None:
    student = small_encoder()
    student(torch.randn(2, 3, 64, 64))["global"].sum().backward()
    teacher = cgh.EMATeacher(student)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not teacher(torch.randn(2, 3, 64, 64))["global"].requires_grad


def test_scheduled_momentum_goes_on_after_loading() -> None:
    def momentum(update: int) -> float:
        return 1 - 0.5**update

    student = nn.Linear(2, 2)
    teacher, twin = cgh.EMATeacher(student, momentum), cgh.EMATeacher(student, momentum)
    states = [perturbed(student) for _ in range(4)]
    for state in states[:2]:
        teacher.update(state)
    twin.load_state_dict(copy.deepcopy(teacher.state_dict()))
    expected = teacher.encoder.weight.clone()
    for update, state in enumerate(states[2:], start=2):
        teacher.update(state)
        twin.update(state)
        expected.lerp_(state.weight, 0.5**update)
    torch.testing.assert_close(teacher.encoder.weight, expected)
    assert torch.equal(teacher.encoder.weight, twin.encoder.weight)


def test_a_compiled_student_is_unwrapped() -> None:
    student = nn.Linear(2, 2)
    teacher = cgh.EMATeacher(torch.compile(student, backend="eager"), momentum=0.0)
    moved = perturbed(student)
    teacher.update(torch.compile(moved, backend="eager"))
    assert torch.equal(teacher.encoder.weight, moved.weight)


def test_bad_input() -> None:
    student = nn.Linear(2, 2)
    for momentum in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"momentum is {momentum}; it lies between 0"):
            cgh.EMATeacher(student, momentum)
        with pytest.raises(ValueError, match=f"momentum is {momentum}"):
            cgh.EMATeacher(student, lambda update, m=momentum: m).update(student)
    teacher = cgh.EMATeacher(student)
    before = teacher.encoder.weight.clone()
    with pytest.raises(ValueError, match=r"differ in 2 parameters, the first 'bias': student \(3,\), teacher \(2,\)"):
        teacher.update(nn.Linear(2, 3))
    assert torch.equal(teacher.encoder.weight, before)
