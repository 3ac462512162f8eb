"""The method's own settings on the command line of `pretrain.py`, and the recipes that are their defaults."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import cgh
from tests.examples.imagenet.runs import EXAMPLE, SMALL, figures, make_images, run

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")

PAPER = (["global=0.1", "hypercolumn=0.08"], ["global=0.04", "hypercolumn=0.08"])


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("tyro")
    pytest.importorskip("tensorboard")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("pretrain")


def test_options_become_the_method(pretrain: ModuleType) -> None:
    method = pretrain.parse(["layer3", "layer4"], [], *PAPER)
    assert method.contexts == ("global", "hypercolumn")
    assert method.hypercolumns == {"hypercolumn": ["layer3", "layer4"]}
    assert method.pairs == [("global", "hypercolumn"), ("hypercolumn", "global")]
    assert method.student_temperature == cgh.losses.STUDENT_TEMPERATURE
    assert method.teacher_temperature == cgh.losses.TEACHER_TEMPERATURE

    three = pretrain.parse(["shallow=layer1,layer2", "deep=layer4"], ["global:deep"], ["0.2"], [*PAPER[1], "deep=0.05"])
    assert three.hypercolumns == {"shallow": ["layer1", "layer2"], "deep": ["layer4"]}
    assert three.pairs == [("global", "deep")]
    assert three.student_temperature == {"global": 0.2, "shallow": 0.2, "deep": 0.2}
    assert three.teacher_temperature == {"global": 0.04, "shallow": 0.08, "deep": 0.05}


@pytest.mark.parametrize(
    ("layers", "pairs", "temperature", "message"),
    [
        (["a=layer1", "layer2"], [], ["0.1"], "--layers a=layer1 layer2: name the layers of one"),
        (["a=layer1", "a=layer2"], [], ["0.1"], "by a name of its own"),
        (["layer4"], ["global"], ["0.1"], "--pairs global: it is LEARNER:GUIDE, such as global:hypercolumn"),
        (["layer4"], ["global:deep"], ["0.1"], "of the contexts global, hypercolumn"),
        (["layer4"], [], ["warm"], "--student-temperature warm: it is one number"),
        (["layer4"], [], ["global=0.1"], "name each of the contexts global, hypercolumn"),
        (["layer4"], [], ["hypercolumn=0.1"], "name each of the contexts"),
        (["a=layer4"], [], ["0.1", "deep=0.1"], "name each of the contexts global, a and no other"),
    ],
)
def test_what_cannot_be_read(
    layers: list[str], pairs: list[str], temperature: list[str], message: str, pretrain: ModuleType
) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain.parse(layers, pairs, temperature, ["0.1"])


@pytest.mark.parametrize("name", ["imagenet", "cifar", "small"])
def test_a_recipe_is_the_default_of_each_option_and_every_option_wins(name: str, pretrain: ModuleType) -> None:
    given = ["--folder=runs", "--root=data", f"--recipe={name}"]
    config = pretrain.parse_arguments(given)
    assert config.recipe == name
    for option, value in pretrain.RECIPES[name].items():
        assert getattr(config, option) == value
    assert pretrain.parse_arguments([*given, "--dim=24", "--arch=resnet34"]).dim == 24
    if name == "imagenet":
        assert (config.arch, config.epochs, config.batch, config.lr) == ("resnet50", 200, 256, 0.05)
        assert pretrain.parse_arguments(given[:2]) == config


def test_collapse_is_measured_at_the_runs_own_temperatures(pretrain: ModuleType) -> None:
    torch.manual_seed(0)
    method = pretrain.parse(["a=layer3", "b=layer4"], ["global:a", "b:b"], ["0.5", "b=0.3"], ["0.2"])
    model = cgh.CGH(
        cgh.interop.resnet("resnet18", small_images=True),
        method.hypercolumns,
        dim=8,
        hidden_dim=16,
        memory_size=32,
        student_temperature=method.student_temperature,
        teacher_temperature=method.teacher_temperature,
        pairs=method.pairs,
        image_shape=(3, 16, 16),
    )
    output = model(*torch.randn(2, 8, 3, 16, 16))
    found = pretrain.collapse(output, model.memory, method)
    for who, context, temperature in (("student", "b", 0.3), ("student", "a", 0.5), ("teacher", "global", 0.2)):
        relation = torch.softmax(getattr(output, who)[context] @ model.memory[context].T / temperature, dim=1)
        entropy = -(relation * relation.log()).sum(1).mean().item()
        assert found[f"entropy/{who}_{context}"] == pytest.approx(entropy, rel=1e-4)
    assert {name for name in found if name.startswith("agreement/")} == {
        "agreement/global_from_a",
        "agreement/b_from_b",
    }
    assert set(found) <= set(pretrain.figures_of(method))


def test_a_run_of_three_contexts(tmp_path: Path, pretrain: ModuleType) -> None:
    root = make_images(tmp_path / "images", train=16)
    method = ["--layers", "shallow=layer1,layer2", "deep=layer3,layer4", "--pairs", "global:deep", "shallow:deep"]
    settings = ["--infonce-temperature=0.3", "--teacher-momentum=0.9", "--teacher-momentum-end=1.0"]
    run([*SMALL, f"--root={root}", f"--folder={tmp_path}", *method, *settings], tmp_path / "output.txt")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["layers"] == ["shallow=layer1,layer2", "deep=layer3,layer4"]
    assert (config["recipe"], config["pairs"]) == ("imagenet", ["global:deep", "shallow:deep"])
    last = figures(tmp_path)[-1]
    assert {"loss/global_from_deep", "loss/shallow_from_deep", "rank/student_shallow"} <= {
        k for k, v in last.items() if v
    }
    assert cgh.interop.trained_backbone(tmp_path / "checkpoint.pt")(torch.randn(2, 3, 32, 32)).shape == (2, 512)
