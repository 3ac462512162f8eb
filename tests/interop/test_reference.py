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
    size = (case["batch"], 3, case["image_size"], case["image_size"])
    for step in case["steps"]:
        model.teacher.update(model.student)  # the reference's order
        views = (golden.array(f"{case['name']}/image/{step['step']}/{view}", size) for view in ("strong", "weak"))
        output = model(*views)
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
