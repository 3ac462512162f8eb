"""CGH as one module is its parts in a loop, and its whole state is in `state_dict`."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

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


def tiny(**options: Any) -> cgh.CGH:
    """A method whose network has no batch norm but the hypercolumn head's, which stands in evaluation mode."""
    backbone = nn.Sequential(
        OrderedDict(
            layer3=nn.Conv2d(3, 8, 3), layer4=nn.Conv2d(8, 8, 3), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()
        )
    )
    settings = {"dim": 8, "hidden_dim": 16, "memory_size": 20, "image_shape": (3, 12, 12)} | options
    model = cgh.CGH(backbone, **settings).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def small_views(step: int, size: int = 12) -> tuple[Tensor, Tensor]:
    strong, weak = images(step, size).double()[:, None].expand(-1, 2, -1, -1, -1).unbind(1)
    return strong, weak.flip(-1)


def test_accumulated_batches_train_as_one() -> None:
    whole = tiny(warmup_steps=3, centring_momentum=0.9, momentum=lambda update: 1 - 0.5 / (update + 1))
    parts = copy.deepcopy(whole)
    for model, pieces in ((whole, 1), (parts, 4)):
        optimizer = sgd(model)
        for step in range(5):
            outputs = []
            for views in zip(*(view.chunk(pieces) for view in small_views(step)), strict=True):
                outputs.append(model(*views))
                (outputs[-1].loss / pieces).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update(*outputs)
    assert parts.steps == parts.teacher.updates == 5
    assert parts.shuffle.calls == 4 * whole.shuffle.calls
    for part in ("student", "teacher", "memory", "relation_loss"):
        torch.testing.assert_close(getattr(parts, part).state_dict(), getattr(whole, part).state_dict())


def test_update_takes_an_output_once() -> None:
    model = tiny()
    first, second = model(*small_views(0)), model(*small_views(1))
    with pytest.raises(ValueError, match="got none"):
        model.update()
    with pytest.raises(ValueError, match="given to update twice"):
        model.update(first, first)
    assert model.steps == model.memory.pointer == 0
    model.update(first, second)
    for output in (first, second):
        with pytest.raises(ValueError, match="given to update twice"):
            model.update(output)
    assert (model.steps, model.memory.pointer) == (1, 16)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_compiled_run_is_the_eager_one_in_two_graphs(shuffle: bool) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    eager = tiny(warmup_steps=3, shuffle=shuffle)
    model = copy.deepcopy(eager)
    compiled, losses = torch.compile(model, backend=backend), []
    for run, of in ((eager, eager), (compiled, model)):
        optimizer = sgd(of)
        for step in range(12):
            output = run(*small_views(step))
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            of.update(output)
            losses.append(output.loss.item())
    assert losses[:12] == pytest.approx(losses[12:], rel=1e-12)
    assert len(graphs) == 2
    torch.testing.assert_close(model.state_dict(), eager.state_dict())
    torch.compiler.reset()


@pytest.mark.parametrize(
    "pairs", [[("global", "global")], [("global", "hypercolumn")], [("hypercolumn", "hypercolumn")], None]
)
def test_every_parameter_has_a_gradient_at_every_step(pairs: list[tuple[str, str]] | None) -> None:
    model = tiny(pairs=pairs, warmup_steps=1)
    for step in range(3):
        output = model(*small_views(step))
        output.loss.backward()
        assert all(p.grad is not None for p in model.student.parameters())
        expected = (1 - min(step, 1)) * output.infonce + min(step, 1) * torch.stack(list(output.terms.values())).mean()
        torch.testing.assert_close(output.loss, expected)
        model.zero_grad()
        model.update(output)


@pytest.mark.parametrize("part", ["stem", "norms", "heads", "backbone", "unused"])
def test_parts_of_the_student_may_be_frozen(part: str) -> None:
    torch.manual_seed(0)
    model = cgh.CGH(small_backbone(), **SETTINGS, momentum=0.5)
    frozen: list[nn.Module] = {
        "stem": [model.student.extractor.backbone.conv1, model.student.extractor.backbone.bn1],
        "norms": [m for m in model.student.modules() if isinstance(m, nn.BatchNorm2d)],
        "heads": [model.student.heads],
        "backbone": [model.student.extractor.backbone],
        "unused": [],
    }[part]
    if part == "unused":
        model.student.extractor.backbone.register_parameter("unused", nn.Parameter(torch.ones(3)))
        model.teacher = cgh.EMATeacher(model.student, 0.5)
    for module in frozen:
        module.requires_grad_(False)
    fixed = [p for module in frozen for p in module.parameters()]
    before = [p.clone() for p in fixed]
    moving = model.student.heads["global"][0] if part != "heads" else model.student.extractor.backbone.conv1
    start = model.teacher.encoder.get_parameter(names_of(model.student)[moving.weight]).clone()
    optimizer = torch.optim.SGD([p for p in model.student.parameters() if p.requires_grad], lr=0.05)
    for step in range(2):
        output = model(images(2 * step), images(2 * step + 1))
        output.loss.backward()
        optimizer.step()
        model.update(output)
    twins = dict(model.teacher.encoder.named_parameters())
    for p, old in zip(fixed, before, strict=True):
        assert torch.equal(p, old)
        assert torch.equal(twins[names_of(model.student)[p]], old)
    assert not torch.equal(twins[names_of(model.student)[moving.weight]], start)


def names_of(module: nn.Module) -> dict[Tensor, str]:
    return {x: name for name, x in module.named_parameters()}


def test_states_go_through_meta_and_distributed_checkpoints(tmp_path: Path) -> None:
    model, read = tiny(centring_momentum=0.9), tiny(centring_momentum=0.9)
    optimizer = sgd(model)
    for step in range(2):
        output = model(*small_views(step))
        output.loss.backward()
        optimizer.step()
        model.update(output)
    with torch.device("meta"):
        empty = tiny(centring_momentum=0.9)
    empty.load_state_dict(model.state_dict(), assign=True)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=tmp_path)
    state = {"model": get_model_state_dict(read)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(read, state["model"])
    expected = model(*small_views(2)).loss
    for twin in (empty, read):
        assert torch.equal(twin(*small_views(2)).loss, expected)
        torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)


class Waits(TorchDispatchMode):
    """Refuses what makes the host wait for the device: values that come to it, and shapes that depend on values."""

    NAMES = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "_assert")

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.split("::")[1], kwargs or {}
        result = func(*args, **kwargs)
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        copied = name in ("_to_copy", "copy_") and {x.device.type for x in (*tensors, result)} == {"cpu", "meta"}
        boolean = name.startswith("index") and any(x.dtype == torch.bool for x in tensors)
        waits = copied or boolean or name.rstrip("_").startswith(self.NAMES)
        assert not waits, f"{func} waits for the device"
        return result


@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_a_step_never_waits_for_the_device(warmup_steps: int) -> None:
    model = tiny(warmup_steps=warmup_steps, centring_momentum=0.9, momentum=lambda update: 0.9).to("meta")
    optimizer = sgd(model)
    with Waits():
        for _ in range(3):
            views = torch.empty(3, 8, 3, 12, 12, dtype=torch.float64, device="meta")
            output = model(*views)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update(output)
    for broken in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.cpu()):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Waits():
            broken(torch.empty(2, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_step_never_waits_and_what_is_not_finite_is_told_and_left_out() -> None:
    model = tiny(warmup_steps=2, centring_momentum=0.9).cuda()
    optimizer = sgd(model)

    def train(views: tuple[Tensor, ...]) -> None:
        output = model(*views)
        output.loss.backward()
        optimizer.zero_grad()  # as a scaler skips a step
        model.update(output)

    train(tuple(view.cuda() for view in small_views(0)))
    batches = [tuple(view.cuda() for view in small_views(step)) for step in range(4)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for views in batches:
            train(views)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    pointer, banks = model.memory.pointer, copy.deepcopy(dict(model.memory.state_dict()))
    train((batches[0][0], batches[0][1] * float("nan")))
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"teacher\['global'\], .* held values that are not finite"):
        train(batches[1])
    assert model.memory.pointer == pointer
    torch.testing.assert_close(dict(model.memory.state_dict()), banks, rtol=0, atol=0)


def test_an_output_shows_its_losses_and_shapes() -> None:
    model = cgh.CGH(small_backbone(), dim=8, hidden_dim=16, memory_size=32, warmup_steps=4)
    output = model(*torch.randn(2, 4, 3, 64, 64))
    first, infonce, *terms, student, teacher = repr(output).splitlines()
    assert first == f"CGHOutput: loss {output.loss.item():.4f}"
    assert infonce == f"  InfoNCE: {output.infonce.item():.4f}, weight 1; each relation below: weight 0"
    assert terms[0] == f"  global from hypercolumn: {output.terms['global', 'hypercolumn'].item():.4f}"
    assert student == "  student: global (4, 8), hypercolumn (4, 8)"
    assert teacher == "  teacher: global (4, 8), hypercolumn (4, 8)"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_whole_step_is_one_graph() -> None:
    eager = tiny(warmup_steps=5, centring_momentum=0.9, memory_size=21).cuda()
    model = copy.deepcopy(eager)
    views = [view.cuda() for view in small_views(0)]
    optimizers = {id(run): sgd(run) for run in (eager, model)}

    def step(run: cgh.CGH) -> None:
        optimizer = optimizers[id(run)]
        output = run(*views)
        optimizer.zero_grad(set_to_none=False)
        output.loss.backward()
        optimizer.step()
        run.update(output)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model)
    for number in range(3, 9):  # across the end of the warm-up, and of the bank
        for view, new in zip(views, small_views(number), strict=True):
            view.copy_(new)
        graph.replay()
    for number in (0, 0, 0, *range(3, 9)):
        for view, new in zip(views, small_views(number), strict=True):
            view.copy_(new)
        step(eager)
    assert model.steps == model.teacher.updates == model.shuffle.calls == 9
    assert model.memory.pointer == 9 * 8 % 21
    torch.testing.assert_close(model.state_dict(), eager.state_dict())
