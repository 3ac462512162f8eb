"""What is inside wrappers is found in whatever order they were put on."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import cgh
from cgh.wrappers import own_copy, plain_names, unwrap


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


def test_the_wrappers_of_other_tools_come_off() -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    timm = pytest.importorskip("timm.utils")
    net = nn.Sequential(nn.Linear(2, 2))
    for wrapper in (checkpoint_wrapper, fabric.setup_module):
        assert unwrap(wrapper(net)) is net
        assert unwrap(compiled(wrapper(net))) is net
        teacher = cgh.EMATeacher(wrapper(net), momentum=0.5)
        assert {*teacher.state_dict()} == {"encoder.0.weight", "encoder.0.bias", "_extra_state"}
        teacher.update(wrapper(net))
    for average in (timm.ModelEmaV2, timm.ModelEmaV3):
        assert type(unwrap(average(net))) is nn.Sequential


@pytest.mark.parametrize("part", ["", "0"])
def test_a_copy_that_would_run_the_original_is_refused(part: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    changed = net.get_submodule(part)
    changed.forward = torch.compile(changed.forward, backend="eager")
    for make in (own_copy, cgh.EMATeacher, lambda x: cgh.evaluate.LinearProbe(x, 2, 2), cgh.interop.exportable):
        with pytest.raises(
            TypeError, match=rf"the forward of the {type(changed).__name__} is a function .*net.compile"
        ):
            make(net)


def test_a_forward_that_a_copy_makes_its_own_is_kept() -> None:
    net, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    net.forward = types.MethodType(lambda self, x: x @ self.weight.T, net)
    copied = own_copy(net)
    nn.init.zeros_(copied.weight)
    assert not copied(x).any()
    assert net(x).any()
    net.forward = lambda x: 2 * x  # which runs no module
    assert torch.equal(own_copy(net)(x), 2 * x)


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
