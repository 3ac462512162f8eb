"""What is inside wrappers is found in whatever order they were put on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import cgh
from cgh.wrappers import plain_names, unwrap


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=(tmp_path / "meeting").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("order", list(itertools.permutations([DistributedDataParallel, DataParallel, compiled])))
def test_training_wrappers_come_off_in_any_order(order: tuple[Callable[[nn.Module], nn.Module], ...]) -> None:
    net = wrapped = nn.Linear(2, 2)
    for wrapper in order:
        wrapped = wrapper(wrapped)
    assert unwrap(wrapped) is net
    assert unwrap(net) is net


@pytest.mark.usefixtures("one_rank")
def test_averages_and_shards_come_off() -> None:
    net = nn.Linear(2, 2)
    for outer in (AveragedModel, cgh.EMATeacher):
        for inner in (lambda x: x, compiled, outer):
            copied = unwrap(outer(inner(net)))
            assert type(copied) is nn.Linear
            assert copied is not net
    assert unwrap(FullyShardedDataParallel(net, device_id=torch.device("cpu"))) is net


def test_a_teacher_of_a_wrapped_student_copies_and_follows_the_student_itself() -> None:
    student = nn.Linear(4, 2)
    for wrapper in (DataParallel, compiled, lambda x: DataParallel(compiled(x))):
        teacher = cgh.EMATeacher(wrapper(student), momentum=0.5)
        assert {*teacher.state_dict()} == {"encoder.weight", "encoder.bias", "_extra_state"}
        before = teacher.encoder.weight.clone()
        with torch.no_grad():
            student.weight.add_(1)
        teacher.update(wrapper(student))
        torch.testing.assert_close(teacher.encoder.weight, before + 0.5)


def test_names_without_the_wrappers_on_the_way() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = DataParallel(nn.Sequential(compiled(nn.Linear(2, 2))))  # the user's own "module"

    net = Net()
    plain = plain_names(compiled(net), compiled(net).state_dict())
    assert plain == {
        "module.0.weight": "_orig_mod.module.module.0._orig_mod.weight",
        "module.0.bias": "_orig_mod.module.module.0._orig_mod.bias",
    }
