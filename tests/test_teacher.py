"""The teacher is an exponential moving average of the student's parameters, and of nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("when", ["before", "after", "student alone", "teacher's encoder alone"])
def test_goes_almost_all_the_way_in_every_precision(dtype: torch.dtype, when: str) -> None:
    student = nn.Linear(8, 8)
    if when == "before":
        student.to(dtype)
    teacher = cgh.EMATeacher(student, momentum=0.99)
    for module, moment in ((student, "student alone"), (teacher.encoder, "teacher's encoder alone")):
        if when in ("after", moment):
            module.to(dtype)
    start = teacher.encoder.weight.double().clone()
    with torch.no_grad():
        student.weight.add_(0.01)
    for _ in range(600):
        teacher.update(student)
    goal = student.weight.double()
    assert ((teacher.encoder.weight.double() - start).sum() / (goal - start).sum()).item() == pytest.approx(1, abs=0.05)


def test_the_average_of_half_precision_is_saved_moved_and_begun_anew() -> None:
    student = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    teacher, twin = cgh.EMATeacher(student, 0.999), cgh.EMATeacher(student, 0.999)
    states = [perturbed(student) for _ in range(6)]
    for state in states[:3]:
        teacher.update(state)
    twin.load_state_dict(copy.deepcopy(teacher.state_dict()))
    twin.bfloat16()  # as a trainer does once more at every start
    for state in states[3:]:
        teacher.update(state)
        twin.update(state)
    assert all(x.dtype == torch.float32 for x in teacher.averages.state_dict().values())
    torch.testing.assert_close(twin.state_dict(), teacher.state_dict(), rtol=0, atol=0)

    copied = copy.deepcopy(teacher)
    with torch.no_grad():
        copied.encoder[0].weight.zero_()  # another's write: weights that were loaded by hand
    copied.update(student)
    torch.testing.assert_close(copied.encoder[0].weight, (student[0].weight.float() * 0.001).bfloat16())

    single = cgh.EMATeacher(nn.Sequential(nn.Linear(4, 4)))  # states go between precisions
    single.load_state_dict(teacher.state_dict())
    teacher.load_state_dict(single.state_dict())
    teacher.update(student)


def test_parameters_and_modules_that_are_replaced_are_followed() -> None:
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    teacher = cgh.EMATeacher(student, momentum=0.0)
    for change in (
        lambda: setattr(student[0], "weight", nn.Parameter(torch.randn(2, 2))),
        lambda: student.load_state_dict(perturbed(student).state_dict(), assign=True),
        lambda: student.__setitem__(1, nn.Linear(2, 2)),
        lambda: student[1].requires_grad_(False),
    ):
        teacher.update(student)
        change()
        teacher.update(student)
        for name, x in student.named_parameters():
            assert torch.equal(teacher.encoder.get_parameter(name), x), name
    student.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="differ in 2 parameters, the first '2.bias'"):
        teacher.update(student)


def test_wrappers_on_either_side_are_taken_off() -> None:
    student = nn.Sequential(nn.Linear(2, 2))
    teacher = cgh.EMATeacher(nn.DataParallel(torch.compile(student, backend="eager")), momentum=0.0)
    moved = perturbed(student)
    moved[0] = torch.compile(moved[0], backend="eager")
    teacher.update(torch.optim.swa_utils.AveragedModel(moved))
    assert torch.equal(teacher.encoder[0].weight, moved[0].weight)


def test_a_copy_of_the_teacher_holds_no_student() -> None:
    student = nn.Linear(2, 2)
    teacher = cgh.EMATeacher(student)
    teacher.update(student)
    copied = copy.deepcopy(teacher)
    assert copied._known is None
    copied.update(student)
    teacher.update(student)
    torch.testing.assert_close(copied.state_dict(), teacher.state_dict(), rtol=0, atol=0)


class Remembers(nn.Module):
    """Keeps what it computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.last = self.linear(torch.ones(1, 2))


def test_students_that_cannot_be_copied_or_have_gone_elsewhere() -> None:
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"'0.weight' was computed with gradient .* torch.nn.utils.parametrizations"):
        cgh.EMATeacher(nn.Sequential(normed))
    with pytest.raises(TypeError, match="'last' was computed with gradient .* detach it"):
        cgh.EMATeacher(Remembers())
    with pytest.raises(TypeError, match="'weight' has no shape yet; run a batch"):
        cgh.EMATeacher(nn.LazyLinear(2))
    student = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    cgh.EMATeacher(student).update(student)

    student = nn.Linear(2, 2)
    teacher = cgh.EMATeacher(student)
    with pytest.raises(ValueError, match=r"'weight' of the student is torch.bfloat16 on meta, of the teacher torch.fl"):
        teacher.update(student.bfloat16().to("meta"))


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_parameters_of_any_kind_follow(dtype: torch.dtype) -> None:
    student = nn.Linear(2, 2)
    student.register_parameter("extra", nn.Parameter(torch.ones(3).to(dtype), requires_grad=False))
    teacher = cgh.EMATeacher(student, momentum=0.5)
    with torch.no_grad():
        student.extra.zero_()
    for _ in range(3):
        teacher.update(student)
    expected = torch.full((3,), 0.125 if dtype.is_floating_point or dtype.is_complex else 0.0).to(dtype)
    assert torch.equal(teacher.encoder.extra.to(torch.complex64), expected.to(torch.complex64))
    cgh.EMATeacher(nn.ReLU()).update(nn.ReLU())


def test_an_update_is_one_grouped_operation() -> None:
    student = small_encoder()
    teacher = cgh.EMATeacher(student)
    teacher.update(student)
    with torch.profiler.profile() as profile:
        teacher.update(student)
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("aten::")}
    assert counts["aten::_foreach_lerp_"] == 1
    assert counts.keys() - {"aten::lerp_"} == {"aten::_foreach_lerp_", "aten::add_"}, counts  # and the count


def test_a_compiled_update_is_the_eager_one_and_no_graph_a_step() -> None:
    student, graphs = nn.Linear(3, 3), []
    eager, compiled = cgh.EMATeacher(student, momentum=0.5), cgh.EMATeacher(student, momentum=0.5)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(inputs)
        return graph

    update = torch.compile(compiled.update, backend=backend)
    for _ in range(12):
        with torch.no_grad():
            student.weight.add_(1)
        eager.update(student)
        update(student)
    assert len(graphs) <= 2
    assert compiled.updates == 12
    assert torch.equal(compiled.encoder.weight, eager.encoder.weight)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_scripted_student_is_refused() -> None:
    with pytest.raises(TypeError, match="the student is a ScriptModule; pass the module that it was made of"):
        cgh.EMATeacher(torch.jit.script(nn.Linear(2, 2)))


@pytest.mark.parametrize("how", ["new", "moved", "copied", "loaded", "updated"])
def test_weights_written_into_a_half_precision_teacher_stay(how: str) -> None:
    student = nn.Linear(4, 4).bfloat16()
    teacher = cgh.EMATeacher(student, 0.999)
    if how == "moved":
        teacher.to("cpu")
    elif how == "copied":
        teacher = copy.deepcopy(teacher)
    elif how == "loaded":
        teacher.load_state_dict(teacher.state_dict())
    elif how == "updated":
        teacher.update(student)
    teacher.encoder.load_state_dict({name: torch.full_like(x, 3.0) for name, x in student.state_dict().items()})
    teacher.update(student)
    assert all(x.min() > 2.9 for x in teacher.encoder.parameters())


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop_rate = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.drop_rate, self.training)


@pytest.mark.parametrize(
    "module", [Functional(), nn.LSTM(4, 4, 2, dropout=0.5), torchvision.ops.DropBlock2d(0.5, 3), nn.AlphaDropout(0.5)]
)
def test_no_rate_of_dropout_is_left(module: nn.Module) -> None:
    x = torch.randn(4, 3, 4, 4) if not isinstance(module, nn.LSTM) else torch.randn(8, 4, 4)
    for different, encoder in ((True, module), (False, cgh.EMATeacher(module))):
        first, second = (out[0] if isinstance(out := encoder(x), tuple) else out for _ in range(2))
        assert torch.equal(first, second) is not different
