"""The reference's checkpoints are read and written back exactly, and training goes on from them as it would there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import cgh
from cgh.interop import reference
from tests import golden
from tests.conftest import small_backbone

CASES = golden.load("steps")


def started(case: dict[str, Any]) -> tuple[cgh.CGH, dict[str, Tensor]]:
    """The case's model, and the checkpoint in the reference's own names that it starts from, which it has not read."""
    backbone: nn.Module = getattr(torchvision.models, case["arch"])()
    if case["bn_splits"] > 1:
        backbone = cgh.SplitBatchNorm2d.convert(backbone, case["bn_splits"])
    model = cgh.CGH(
        backbone,
        case["layers"],
        dim={"global": case["dim"], "hypercolumn": case["hypercolumn_dim"]},
        hidden_dim=case["hidden_dim"],
        memory_size=case["memory"],
        momentum=case["momentum"],
        student_temperature={"global": 0.1, "hypercolumn": case["temp_s"]},
        teacher_temperature={"global": 0.04, "hypercolumn": case["temp_t"]},
        infonce_temperature=case["infonce_temperature"],
        warmup_steps=case["warmup_steps"],
        centring_momentum=0.9,
        shuffle=False,
    ).double()
    state = reference.state_dict(model)
    for key, x in state.items():
        if key.startswith(("encoder", "hypercols_proj")) and not key.endswith(("scale", "num_batches_tracked")):
            state[key] = golden.parameter(key, tuple(x.shape))
    for key, dim in (("queue", case["dim"]), ("queue_hyper", case["hypercolumn_dim"])):
        state[key] = golden.unit_rows(key, (case["memory"], dim)).T
    return model, state


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_golden_steps_from_a_checkpoint_and_back(case: dict[str, Any], tmp_path: Path) -> None:
    model, state = started(case)
    checkpoint = {"epoch": 0, "arch": case["arch"], "best_acc1": 0, "net": {f"module.{k}": x for k, x in state.items()}}
    torch.save(checkpoint, tmp_path / "start.pth.tar")
    rest = reference.load(model, reference.read(tmp_path / "start.pth.tar"))
    centring = model.relation_loss.centring
    assert centring is not None
    if not case["norm_center"]:
        model.relation_loss.centring = None  # the reference keeps a mean all the same, and does not take it off

    names = {x.data_ptr(): key for key, x in reference._live_tensors(model).items()}
    by_decay: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.student.parameters():
        key = names[parameter.data_ptr()]
        by_decay["bn" not in key and "bias" not in key].append(parameter)
    optimizer = torch.optim.SGD(
        [{"params": by_decay[True], "weight_decay": 1e-4}, {"params": by_decay[False]}], lr=case["lr"], momentum=0.9
    )
    for step in case["steps"]:
        model.teacher.update(model.student)  # the reference's order
        output = model(*views(case, step["step"]))
        assert output.loss.item() == pytest.approx(step["total"], rel=1e-9)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        centring.update(output.teacher, model.memory)
        model.memory.enqueue(output.teacher)
        model.steps += 1

    model.relation_loss.centring = centring
    final = reference.state_dict(model) | rest
    assert final.keys() == state.keys()
    for key, expected in case["final"].items():
        assert golden.fingerprint(f"final/{key}", final[key]) == pytest.approx(expected, rel=1e-9, abs=1e-9), key
    assert final["queue_ptr"].tolist() == final["queue_hyper_ptr"].tolist() == [case["queue_ptr"]]


def views(case: dict[str, Any], step: int) -> tuple[Tensor, Tensor]:
    """The strong and the weak view of a step."""
    size = (case["batch"], 3, case["image_size"], case["image_size"])
    strong, weak = (golden.array(f"{case['name']}/image/{step}/{view}", size) for view in ("strong", "weak"))
    return strong, weak


def as_the_reference_builds_it(model: cgh.CGH, imagenet: bool, lr: float) -> tuple[torch.optim.SGD, list[str]]:
    """Its optimiser: of all parameters, the teacher's too, as its modules are registered; and their names."""
    live, unused = reference._live_tensors(model), reference._unused_tensors(model)
    students = reference._named_parameters(model)
    parameters: dict[str, nn.Parameter] = {}
    for module in ("encoder_q", "encoder_k", "hypercols_proj_q", "hypercols_proj_k"):
        if module.startswith("hypercols"):  # the scale is the module's own, so it comes before those of its children
            parameters[f"{module}.scale"] = nn.Parameter(unused[f"{module}.scale"], requires_grad=False)
        for key, x in live.items():
            if key.startswith(module) and not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
                parameters[key] = students.get(key, nn.Parameter(x, requires_grad=False))
    if not imagenet:
        return torch.optim.SGD(parameters.values(), lr=lr, momentum=0.9, weight_decay=1e-4), list(parameters)
    spared = {key: p for key, p in parameters.items() if "bn" in key or "bias" in key}
    decayed = {key: p for key, p in parameters.items() if key not in spared}
    groups = [{"params": list(spared.values()), "weight_decay": 0}, {"params": list(decayed.values())}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=1e-4), [*spared, *decayed]


def same_momentum(optimizer: torch.optim.SGD, names: list[str], ours: torch.optim.SGD, model: cgh.CGH) -> bool:
    """Whether the reference's optimiser has the momentum of ours."""
    there = dict(zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    return all(
        torch.equal(optimizer.state[there[key]]["momentum_buffer"], ours.state[parameter]["momentum_buffer"])
        for key, parameter in reference._named_parameters(model).items()
    )


@pytest.mark.parametrize(
    ("case", "cut"),
    [(CASES[0], 1), (CASES[1], 2), (CASES[2], 1)],
    ids=lambda x: x["name"] if isinstance(x, dict) else str(x),
)
def test_a_run_cut_in_two_is_the_golden_one_and_goes_back(case: dict[str, Any], cut: int, tmp_path: Path) -> None:
    """The reference takes the first steps and writes a file; the library goes on from it, and writes one at the end."""
    theirs, state = started(case)
    reference.load(theirs, state)
    optimizer, names = as_the_reference_builds_it(theirs, imagenet=True, lr=case["lr"])
    centring = theirs.relation_loss.centring  # the reference keeps a mean, whether or not it takes it off
    assert centring is not None
    theirs.relation_loss.centring = centring if case["norm_center"] else None
    for step in range(cut):
        theirs.teacher.update(theirs.student)
        output = theirs(*views(case, step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        centring.update(output.teacher, theirs.memory)
        theirs.memory.enqueue(output.teacher)
        theirs.steps += 1
    theirs.relation_loss.centring = centring
    net = {f"module.{key}": x for key, x in reference.state_dict(theirs).items()}
    file = {"epoch": cut, "arch": case["arch"], "best_acc1": 0.0, "net": net, "optimizer0": optimizer.state_dict()}
    torch.save(file, tmp_path / "theirs.pth.tar")

    model, _ = started(case)
    sgd = torch.optim.SGD(reference.parameter_groups(model), lr=case["lr"], momentum=0.9)
    resumed = reference.resume(tmp_path / "theirs.pth.tar", model, sgd, steps_per_epoch=1)
    assert (resumed.epoch, resumed.step, int(model.steps)) == (cut, cut, cut)
    centring = model.relation_loss.centring
    assert centring is not None
    for expected in case["steps"][cut:]:
        model.relation_loss.centring = centring if case["norm_center"] else None
        output = model(*views(case, expected["step"]))
        assert output.loss.item() == pytest.approx(expected["total"], rel=1e-9), expected["step"]
        sgd.zero_grad()
        output.loss.backward()
        sgd.step()
        model.relation_loss.centring = centring
        model.update(output)

    reference.save(tmp_path / "ours.pth.tar", model, sgd, len(case["steps"]), case["arch"], resumed.rest)
    final = reference.read(tmp_path / "ours.pth.tar")
    for key, fingerprint in case["final"].items():
        assert golden.fingerprint(f"final/{key}", final[key]) == pytest.approx(fingerprint, rel=1e-9, abs=1e-9), key
    written = cgh.checkpoint.load(tmp_path / "ours.pth.tar")
    assert (written["epoch"], written["arch"]) == (len(case["steps"]), case["arch"])
    optimizer.load_state_dict(written["optimizer0"])
    assert same_momentum(optimizer, names, sgd, model)


def trained(imagenet: bool) -> tuple[cgh.CGH, torch.optim.SGD, list[str]]:
    """A model after a step, and the reference's optimiser of it."""
    model = small_model()
    optimizer, names = as_the_reference_builds_it(model, imagenet, lr=0.05)
    model(*torch.randn(2, 4, 3, 32, 32)).loss.backward()
    optimizer.step()
    return model, optimizer, names


@pytest.mark.parametrize("imagenet", [True, False], ids=["imagenet", "cifar"])
def test_both_variants_momentum_both_ways(imagenet: bool, tmp_path: Path) -> None:
    theirs, optimizer, names = trained(imagenet)
    net = reference.state_dict(theirs)
    torch.save({"epoch": 7, "net": net, "optimizer0": optimizer.state_dict()}, tmp_path / "theirs.pth.tar")
    model = small_model()
    parameters: Any = reference.parameter_groups(model) if imagenet else model.student.parameters()
    sgd = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.0 if imagenet else 1e-4)
    assert reference.resume(tmp_path / "theirs.pth.tar", model, sgd, steps_per_epoch=10)[:2] == (7, 70)
    assert same_momentum(optimizer, names, sgd, model)
    assert sgd.param_groups[0]["lr"] == 0.1, "what the optimiser was built with stays"

    reference.save(tmp_path / "ours.pth.tar", model, sgd, epoch=7, arch="resnet18")
    written = cgh.checkpoint.load(tmp_path / "ours.pth.tar")
    expected = optimizer.state_dict()
    assert [group["params"] for group in written["optimizer0"]["param_groups"]] == [
        group["params"] for group in expected["param_groups"]
    ]
    decays = [group["weight_decay"] for group in written["optimizer0"]["param_groups"]]
    assert decays == [group["weight_decay"] for group in expected["param_groups"]]
    assert written["optimizer0"]["state"].keys() == expected["state"].keys()
    for key, x in reference.read(tmp_path / "ours.pth.tar").items():
        torch.testing.assert_close(x, net[key], msg=key)


def test_what_cannot_be_resumed_is_refused_before_anything_changes(tmp_path: Path) -> None:
    theirs, optimizer, _ = trained(imagenet=True)
    good = {"epoch": 7, "net": reference.state_dict(theirs), "optimizer0": optimizer.state_dict()}
    model = small_model()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    sgd = torch.optim.SGD(model.student.parameters(), lr=0.1, momentum=0.9)
    few = torch.optim.SGD(theirs.student.heads.parameters(), lr=0.1, momentum=0.9).state_dict()
    for wrong, message in (
        ({"epoch": None}, "no count of epochs"),
        ({"optimizer0": None}, "no momentum of SGD under 'optimizer0'"),
        (
            {"optimizer0": few},
            r"of \[11\] parameters in its groups; the reference's has \[96\] \(CIFAR\) or \[52, 44\]",
        ),
        ({"optimizer0": {**good["optimizer0"], "state": {}}}, r"missing: encoder_q.conv1.weight \(64, 3, 7, 7\)"),
    ):
        torch.save(good | wrong, tmp_path / "wrong.pth.tar")
        with pytest.raises(ValueError, match=message):
            reference.resume(tmp_path / "wrong.pth.tar", model, sgd, steps_per_epoch=10)
    torch.save(good, tmp_path / "good.pth.tar")
    with pytest.raises(ValueError, match="Adam, and 0 of its"):
        reference.resume(tmp_path / "good.pth.tar", model, torch.optim.Adam(model.student.parameters()), 10)
    with pytest.raises(ValueError, match="SGD, and 47 of its 47 parameters are not the student's"):
        reference.resume(tmp_path / "good.pth.tar", model, torch.optim.SGD(theirs.student.parameters(), 0.1), 10)
    with pytest.raises(ValueError, match="steps_per_epoch is 0"):
        reference.resume(tmp_path / "good.pth.tar", model, sgd, steps_per_epoch=0)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not sgd.state


def test_what_the_reference_decays_and_the_paper_does_not() -> None:
    model = cgh.CGH(torchvision.models.resnet50(), dim=8, hidden_dim=8, memory_size=8)
    spared, decayed = reference.parameter_groups(model, weight_decay=0.1)
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    assert sum(p.numel() for p in decayed["params"] if p.ndim == 1) == 5_888
    assert all(p.ndim == 1 for p in spared["params"])


def small_model(**options: Any) -> cgh.CGH:
    return cgh.CGH(small_backbone(), dim=8, hidden_dim=16, memory_size=32, **options)


def cifar_model() -> cgh.CGH:
    backbone = small_backbone()
    backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    backbone.maxpool = nn.Identity()
    return cgh.CGH(backbone, dim=8, hidden_dim=16, memory_size=32, image_shape=(3, 32, 32))


@pytest.mark.parametrize("build", [small_model, cifar_model])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"epoch": 3, "net": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_round_trips_are_exact(build: Any, wrap: Any, prefix: str, tmp_path: Path) -> None:
    original = build()
    original.memory.enqueue({name: torch.randn(5, 8) for name in original.memory})
    state = reference.state_dict(original)
    state |= {
        "queue_targets": torch.arange(32) % 10,  # what a run would have put there
        "queue_index": torch.arange(32).flip(0),
        "center": torch.randn(32),
        "center_hyper": torch.randn(1, 32),
    }
    cgh.checkpoint.save(wrap({prefix + key: x for key, x in state.items()}), tmp_path / "saved.pth")

    model = build()
    rest = reference.load(model, reference.read(tmp_path / "saved.pth"))
    written = reference.state_dict(model) | rest
    state["center"] = state["center"][None]
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], x) for key, x in state.items())
    assert model.memory.pointer == 5
    images = torch.randn(4, 3, 32, 32)
    original.eval(), model.eval()
    torch.testing.assert_close(model.student(images), original.student(images), rtol=0, atol=0)
    torch.testing.assert_close(model.teacher(images), original.teacher(images), rtol=0, atol=0)


def test_everything_that_does_not_fit_is_listed_and_nothing_is_copied() -> None:
    model = small_model(centring_momentum=0.9)
    state = reference.state_dict(small_model())
    state["queue"] = state["queue"][:, :16]
    state["encoder_q.stem.weight"] = state.pop("encoder_q.conv1.weight")
    del state["center"]
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit") as error:
        reference.load(model, state)
    assert str(error.value).splitlines() == [
        "the checkpoint does not fit the model:",
        "  missing: encoder_q.conv1.weight (64, 3, 7, 7)",
        "  missing: center (1, 32)",
        "  unexpected: encoder_q.stem.weight (64, 3, 7, 7)",
        "  misshapen: queue is (8, 16), the model's is (8, 32)",
    ]
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_pointers_that_differ_are_refused() -> None:
    model = small_model()
    state = reference.state_dict(model) | {"queue_hyper_ptr": torch.tensor([3])}
    with pytest.raises(ValueError, match="'queue_ptr': 0, 'queue_hyper_ptr': 3"):
        reference.load(model, state)


def test_models_that_the_reference_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"the model's contexts are \['global', 'deep'\]"):
        reference.state_dict(small_model(layers={"deep": ["layer4"]}, student_temperature=0.1, teacher_temperature=0.1))
    with pytest.raises(ValueError, match=r"layers are \['maxpool', 'layer4'\]"):
        reference.state_dict(small_model(layers=["maxpool", "layer4"]))


class RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("was-run",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"net": reference.state_dict(small_model()), "best_acc1": RunsCode()}, "evil.pth")
    with pytest.raises(ValueError, match="not a checkpoint of plain data"):
        reference.read("evil.pth")
    with pytest.raises(ValueError, match="not a checkpoint of plain data"):
        cgh.interop.load_backbone(small_backbone(), "evil.pth")
    assert not Path("was-run").exists()
    torch.load("evil.pth", weights_only=False)
    assert Path("was-run").exists(), "the pickle does run code where it is let"


@pytest.mark.parametrize("content", [{"net": {}}, {"epoch": 3}, {"net": {"encoder_q.conv1.weight": 3}}])
def test_what_holds_no_tensors_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    cgh.checkpoint.save(content, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"empty\.pth must map names to tensors"):
        reference.read(tmp_path / "empty.pth")
