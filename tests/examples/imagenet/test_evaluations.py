"""The four evaluations: what they find, that they go on where they stopped, and what they say of bad input."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

import cgh
from tests.examples.imagenet.runs import EXAMPLE, SMALL, make_images, same

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")

SHORT = ["--crop-size=32", "--batch=16", "--workers=0", "--device=cpu"]


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("rich", "sklearn", "tensorboard", "tyro"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLE))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def evaluate(script: str, folder: Path, *options: object) -> dict[str, Any]:
    """Run a script in this process and return its results."""
    importlib.import_module(script).main([f"--folder={folder}", *SHORT, *map(str, options)])
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def test_features_are_extracted_once_and_kept(
    root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = f"--features={tmp_path / 'features'}"
    of_weights = [f"--weights={weights}", f"--root={root}"]
    results = evaluate("knn", tmp_path / "knn", *of_weights, kept, "--k", 1, 10)
    assert results["10 neighbours"]["top1"] > 90  # each class has a colour
    config = json.loads((tmp_path / "knn" / "config.json").read_text())
    assert (config["k"], config["batch"], config["data"]["dataset"]) == ([1, 10], 16, "folder")

    monkeypatch.setattr(importlib.import_module("evaluation"), "extract_features", None)
    assert evaluate("knn", tmp_path / "again", *of_weights, kept, "--k", 1, 10) == results
    assert evaluate("knn", tmp_path / "without", kept, "--k", 10) == {"10 neighbours": results["10 neighbours"]}
    scores = evaluate("cluster", tmp_path / "cluster", kept)
    assert scores["accuracy"] > 60
    assert 0 < scores["ari"] <= scores["nmi"] <= 1
    assert scores["ami"] <= scores["nmi"]

    other = tmp_path / "other.pth"
    torch.save(torchvision.models.resnet18().state_dict(), other)
    with pytest.raises(ValueError, match="holds features of something else: weights is "):
        evaluate("knn", tmp_path / "other", f"--weights={other}", f"--root={root}", kept, "--k", 1)
    for view in ("--resize=40", "--interpolation=bilinear"):
        with pytest.raises(ValueError, match="of something else: view is .*Extract into another file"):
            evaluate("cluster", tmp_path / "other", *of_weights, kept, view)


def test_the_bicubic_view_is_pillows() -> None:
    evaluation = importlib.import_module("evaluation")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (1, 3, 60, 80), generator=generator).float()
    image = torch.nn.functional.interpolate(coarse, size=(375, 500), mode="bicubic").clamp(0, 255)[0].to(torch.uint8)
    config = evaluation.FeatureEvaluation(folder=Path("here"))
    view = evaluation.centre_view(config, torchvision.models.resnet18())(image)
    pillow = to_pil_image(image).resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 282, 240))
    expected = evaluation.normalise()(pil_to_tensor(pillow))
    difference = (view - expected).abs() * 255 * 0.225
    assert difference.max() < 1.1, "one level, where the two round otherwise"
    assert difference.mean() < 0.01


def test_clusters_beside_classes_of_classes(root: Path, weights: Path, tmp_path: Path) -> None:
    cluster = importlib.import_module("cluster")
    given = ["class_0", "class_1", "class_2", "class_3"]
    path = tmp_path / "is_a.txt"
    path.write_text("even class_0\nodd class_1\neven class_2\nodd class_3\nother class_1\nthing even\n")
    assert cluster.super_classes(path, given).tolist() == [0, 1, 0, 1]
    kept = f"--features={tmp_path / 'features'}"
    fine = evaluate("cluster", tmp_path / "fine", f"--weights={weights}", f"--root={root}", kept)
    coarse = evaluate("cluster", tmp_path / "coarse", kept, f"--super-classes={path}", "--clusters=4")
    assert coarse["nmi"] != fine["nmi"]
    path.write_text("even\tclass_0\nodd\tclass_1\n")
    with pytest.raises(ValueError, match=r"no class above 2 of 4 classes: \['class_2', 'class_3'\]"):
        cluster.super_classes(path, given)
    path.write_text("even class_0 odd\n")
    with pytest.raises(ValueError, match="line 1: 'even class_0 odd'; a line is SUPERCLASS CLASS"):
        cluster.super_classes(path, given)


@pytest.mark.parametrize(
    ("script", "more"), [("linear", ["--lr=0.1"]), ("semisup", ["--fraction=0.5", "--milestones", "1"])]
)
def test_a_run_that_stopped_goes_on_bit_by_bit(
    script: str, more: list[str], root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"--weights={weights}", f"--root={root}", "--epochs=2", "--validation-epochs=1", *more]
    whole = evaluate(script, tmp_path / "whole", *options)
    assert whole["epoch"] == 2
    tops = [row["top1"] for row in csv.DictReader((tmp_path / "whole" / "log.csv").read_text().splitlines())]
    assert whole["best_top1"] == pytest.approx(max(map(float, tops)), rel=1e-4)
    assert float(tops[whole["best_epoch"] - 1]) == max(map(float, tops))

    run = importlib.import_module("run").Run
    save = run.save

    def save_and_stop(self: Any, state: Any) -> None:
        save(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(script, tmp_path / "stopped", *options)
    torch.manual_seed(1)  # nothing of the first process is left
    assert evaluate(script, tmp_path / "stopped", *options, "--workers=2") == whole
    first, second = (cgh.checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "stopped"))
    assert same(first, second)
    assert (tmp_path / "whole" / "log.csv").read_text() == (tmp_path / "stopped" / "log.csv").read_text()

    before = (tmp_path / "whole" / "checkpoint.pt").read_bytes()
    assert evaluate(script, tmp_path / "whole", *options) == whole, "a run that has ended stays as it is"
    assert (tmp_path / "whole" / "checkpoint.pt").read_bytes() == before
    with pytest.raises(ValueError, match="seed was 0 and is now 1"):
        evaluate(script, tmp_path / "whole", *options, "--seed=1")
    older = {name: value for name, value in first["config"].items() if name not in ("layer_decay", "seed")}
    cgh.checkpoint.save(first | {"config": older}, tmp_path / "whole" / "checkpoint.pt")
    assert evaluate(script, tmp_path / "whole", *options) == whole, "options that came later have their defaults"


def test_bad_input(root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [f"--weights={weights}", f"--root={root}"]
    with pytest.raises(ValueError, match=r"missing: layer1\.2\.conv1\.weight \(64, 64, 3, 3\)"):
        evaluate("linear", tmp_path, *given, "--arch=resnet34")
    with pytest.raises(ValueError, match="no tensors under 'net'"):
        evaluate("semisup", tmp_path, *given, "--checkpoint-key=net")
    with pytest.raises(ValueError, match="--k 65, but there are 64 training images"):
        evaluate("knn", tmp_path, *given, "--k", 1, 65)
    with pytest.raises(ValueError, match="neither --weights nor --features"):
        evaluate("cluster", tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda.* sees 0 GPU"):
            evaluate("knn", tmp_path, *given, "--device=cuda")
    with pytest.raises(
        ValueError, match=r"train and val differ, 2 and 2: only in train are \['dog'\], only in val \['ox"
    ):
        importlib.import_module("evaluation").check_classes({"train": ["cat", "dog"], "val": ["cat", "ox"]})
    monkeypatch.setattr(cgh.distributed, "rank_and_world_size", lambda: (0, 3))
    with pytest.raises(ValueError, match="--batch 16 is not divisible over 3 ranks"):
        evaluate("knn", tmp_path, *given, "--k", 1)


def torchrun(processes: int, script: str, folder: Path, *options: object) -> dict[str, Any]:
    """Run a script as a user does and return its results, if it has any."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command: Sequence[str] = [sys.executable, *launcher, str(EXAMPLE / f"{script}.py"), f"--folder={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*command, *map(str, options)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.slow
def test_the_whole_chain_by_two_processes_as_by_one(root: Path, tmp_path: Path) -> None:
    torchrun(2, "pretrain", tmp_path / "run", *SMALL, f"--root={root}")
    given = [f"--weights={tmp_path / 'run' / 'checkpoint.pt'}", f"--root={root}", *SHORT]
    neighbours = torchrun(2, "knn", tmp_path / "knn", *given, f"--features={tmp_path / 'features'}", "--k", 1, 10)
    assert neighbours["10 neighbours"]["top1"] > 90  # each class has a colour
    assert neighbours == evaluate("knn", tmp_path / "knn-1", *given, "--k", 1, 10)

    clusters = torchrun(1, "cluster", tmp_path / "cluster", f"--features={tmp_path / 'features'}")
    assert clusters["accuracy"] > 60

    # Statistics of so short a run make large features, for which the paper's learning rate is none.
    probing = ["--epochs=20", "--lr=0.001"]
    linear = torchrun(2, "linear", tmp_path / "linear", *given, *probing)
    assert linear["top1"] > 60
    assert linear == pytest.approx(evaluate("linear", tmp_path / "linear-1", *given, *probing))

    rates = ["--trunk-lr=0.1", "--head-lr=0.5"]
    few = torchrun(2, "semisup", tmp_path / "semisup", *given, "--epochs=16", "--fraction=0.5", *rates)
    assert few["labels"] == 32
    assert few["top1"] > 40
