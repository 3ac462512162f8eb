"""Every loop trains as the plain one does."""

from __future__ import annotations

import importlib
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not here")


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / "loops"))


@pytest.mark.parametrize("package", ["lightning", "accelerate"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.filterwarnings("ignore")
def test_the_same_losses_and_counts_as_the_plain_loop(
    package: str, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    task, models = importlib.import_module("task"), []
    build = task.build

    def keeping() -> tuple[Any, ...]:
        models.append(parts := build())
        return parts

    monkeypatch.setattr(task, "build", keeping)
    plain = importlib.import_module("plain").train(accumulate)
    assert len(plain) == len(set(plain)) == 8
    assert importlib.import_module(f"with_{package}").train(accumulate) == pytest.approx(plain, rel=1e-6)
    for model, _, _ in models:
        assert model.steps == model.teacher.updates == 8 // accumulate
        assert model.memory.pointer == 8 * 48 % 256


@pytest.mark.slow
def test_beside_the_loss_of_another_method() -> None:
    for package in ("lightly", "kornia", "matplotlib", "tyro"):
        pytest.importorskip(package)
    example = importlib.import_module("with_lightly")
    features, entropy = example.train(epochs=12)
    assert entropy < math.log(example.MEMORY) - 1, "relations have collapsed"
    labels = importlib.import_module("quickstart").digits()[1]
    assert importlib.import_module("quickstart").accuracies(features, labels)[0] > 90


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("loops/plain.py", "--accumulate INT"),
        ("loops/with_accelerate.py", "--accumulate INT"),
        ("loops/with_lightning.py", "--accumulate INT"),
        ("three_contexts.py", "Two hypercolumns beside the global context"),
        ("with_lightly.py", "--epochs INT"),
    ],
)
def test_help_runs_nothing(
    script: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("accelerate", "kornia", "lightly", "lightning", "matplotlib", "tyro"):
        pytest.importorskip(package)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert says in capsys.readouterr().out
