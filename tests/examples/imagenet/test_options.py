"""Options of the reference implementation that a pre-training run has too, and going on with a run of either."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision

import cgh
from cgh.interop import reference
from tests.examples.imagenet.runs import EXAMPLE, SMALL, make_images, run, same, trained

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for package in ("rich", "sklearn", "tensorboard", "tyro"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("pretrain")


def configuration(pretrain: ModuleType, *options: str) -> Any:
    return pretrain.tyro.cli(pretrain.Config, args=["--folder=here", "--root=there", *SMALL, *options])


def test_learning_rates_by_epochs(pretrain: ModuleType) -> None:
    """After a warm-up in steps, the formulas of the reference, whose epochs count from 0."""
    options = ["--epochs=10", "--warmup-epochs=2", "--lr=0.5", "--batch=256"]
    cosine = pretrain.learning_rate(configuration(pretrain, *options), 4)
    by_epochs = pretrain.learning_rate(configuration(pretrain, *options, "--schedule=cosine-epochs"), 4)
    tenths = ["--schedule=milestones", "--milestones", "5", "8"]
    by_tenths = pretrain.learning_rate(configuration(pretrain, *options, *tenths), 4)
    for step in range(40):
        epoch = step // 4
        if epoch < 2:
            assert cosine(step) == by_epochs(step) == by_tenths(step) == pytest.approx(0.5 * step / 8)
            continue
        assert by_epochs(step) == pytest.approx(0.25 * (1 + math.cos(math.pi * (epoch - 2) / 8)))
        assert by_tenths(step) == pytest.approx(0.5 * (1 if epoch < 5 else 0.1 if epoch < 8 else 0.01))
        assert cosine(step) <= by_epochs(step)


def test_weights_to_start_with_and_a_width_of_each_context(pretrain: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    config = configuration(pretrain, f"--init={tmp_path / 'resnet18.pth'}", "--hypercolumn-dim=24")
    model, _ = pretrain.build_model(config, 0, 16)
    for encoder in (model.student, model.teacher.encoder):
        state = encoder.extractor.backbone.state_dict()
        assert all(torch.equal(x, weights[key]) for key, x in state.items())
    assert {name: model.memory[name].shape[1] for name in model.memory} == {"global": 16, "hypercolumn": 24}


def test_the_optimiser_of_the_reference(pretrain: ModuleType) -> None:
    config = configuration(pretrain, "--reference-weight-decay", "--nesterov")
    model, _ = pretrain.build_model(config, 0, 16)
    optimizer = pretrain.build_optimizer(model, config)
    assert [group["nesterov"] for group in optimizer.param_groups] == [True, True]
    expected = reference.parameter_groups(model)
    for group, other in zip(optimizer.param_groups, expected, strict=True):
        assert group["weight_decay"] == other["weight_decay"]
        assert {id(p) for p in group["params"]} == {id(p) for p in other["params"]}
    with pytest.raises(ValueError, match="are of SGD, but --optimizer is adamw"):
        pretrain.build_optimizer(model, configuration(pretrain, "--nesterov", "--optimizer=adamw"))


def test_a_run_with_layer_decay_keeps_the_rates_apart(pretrain: ModuleType, tmp_path: Path) -> None:
    root = make_images(tmp_path / "images", train=16)
    options = [*SMALL, f"--root={root}", "--schedule=milestones", "--milestones=1", "--warmup-epochs=0"]
    run([*options, f"--folder={tmp_path / 'run'}", "--layer-decay=0.5", "--lr=0.64"], tmp_path / "output.txt")
    groups = trained(tmp_path / "run")["optimizer"]["param_groups"]
    base = 0.64 * 8 / 256 / 10  # of the second epoch
    expected = [base * 0.5**depth for depth in range(9, -1, -1) for _ in range(2)]
    assert [group["lr"] for group in groups] == pytest.approx(expected)
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0] * 10
    config = configuration(pretrain, "--layer-decay=0.5", "--reference-weight-decay")
    model, _ = pretrain.build_model(config, 0, 16)
    with pytest.raises(ValueError, match=r"--layer-decay 0\.5 and --reference-weight-decay: .* leave one of them out"):
        pretrain.build_optimizer(model, config)


def test_plain_lines_tell_of_every_start(pretrain: ModuleType, tmp_path: Path) -> None:
    log = pretrain.Log(tmp_path, ["loss"], steps=8)
    for step in (2, 4):
        log.write(step, {"loss": 1 / step}, {"loss": f"{1 / step:.3f}"})
    size = log.size()
    log.write(6, {"loss": 0.1}, {"loss": "0.100"})
    log.close()
    pretrain.Log(tmp_path, ["loss"], steps=8, step=4, size=size).close()
    lines = [line.split("  ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines[:3] == ["starts at step 0 of 8", "step 2/8  loss 0.500", "step 4/8  loss 0.250"]
    assert lines[3:] == ["step 6/8  loss 0.100", "starts at step 4 of 8"]
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,loss", "2,0.5", "4,0.25"]


def test_a_run_goes_on_from_the_file_of_another_and_of_the_reference(pretrain: ModuleType, tmp_path: Path) -> None:
    root = make_images(tmp_path / "images")
    options = [*SMALL, f"--root={root}", "--both-strong", "--hypercolumn-dim=24", "--reference-weight-decay"]
    run([*options, f"--folder={tmp_path / 'whole'}"], tmp_path / "whole.txt")
    middle = tmp_path / "whole" / "checkpoint-previous.pt"  # after the first of two epochs
    run([*options, f"--folder={tmp_path / 'on'}", f"--resume-from={middle}"], tmp_path / "on.txt")
    assert same(trained(tmp_path / "on"), trained(tmp_path / "whole"))

    config = configuration(pretrain, "--hypercolumn-dim=24", "--reference-weight-decay")
    model, _ = pretrain.build_model(config, 8, 16)
    optimizer = pretrain.build_optimizer(model, config)
    state = cgh.checkpoint.load(middle)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    reference.save(tmp_path / "theirs.pth.tar", model, optimizer, epoch=1, arch="resnet18")
    from_theirs = [*options, f"--folder={tmp_path / 'theirs'}", f"--resume-from={tmp_path / 'theirs.pth.tar'}"]
    run(from_theirs, tmp_path / "theirs.txt")
    theirs, whole = (trained(tmp_path / name) for name in ("theirs", "whole"))
    assert (theirs["step"], theirs["epoch"]) == (16, 2)
    keys = [key for key, x in whole["model"].items() if x.is_floating_point() and not key.startswith("memory")]
    ends, other, start = (torch.cat([each["model"][key].flatten() for key in keys]) for each in (whole, theirs, state))
    # Half the way is there in both; the other order of the shuffled batches rounds otherwise.
    assert (other - ends).norm() < 0.05 * (ends - start).norm()
    for path, message in (
        (tmp_path / "images" / "nothing.pt", "No such file"),
        (middle, "is at step 8, with 8 in an epoch; here an epoch has 4"),
    ):
        with pytest.raises(AssertionError, match=message):
            extra = [f"--folder={tmp_path / 'wrong'}", f"--resume-from={path}", "--batch=16", "--warmup-epochs=0"]
            run([*options, *extra], tmp_path / "wrong.txt")
