"""What the script for GPUs checks holds here too, and a part of it that fails does not keep the next from running."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not here")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for package in ("matplotlib", "rich", "tyro"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.mark.parametrize("name", ["host waits", "graphs compiled", "resumed to the bit"])
def test_a_step_of_the_cpu(gpu: ModuleType, name: str) -> None:
    gpu.CHECKS[name]()


@pytest.mark.cuda
@pytest.mark.parametrize(
    "name",
    [
        "the reference's losses",
        "losses in autocast",
        "views by the same seed",
        "host waits",
        "graphs compiled",
        "resumed to the bit",
        "replayed to the bit",
        "reduce-overhead",
    ],
)
def test_a_step_of_a_gpu(gpu: ModuleType, name: str) -> None:
    gpu.CHECKS[name]()


def test_parts_fail_by_themselves_and_keep_to_the_time(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10_000, 30))  # half a minute between looks

    def fails() -> str:
        raise AssertionError("5 in 12 steps")

    def rows(report: object) -> None:
        report.rows.append(gpu.Row("a step", 3.0, 6.0, "the usual step", 0.25))  # type: ignore[attr-defined]

    monkeypatch.setattr(gpu, "CHECKS", {"bad": fails, "good": lambda: "well", "late": fails})
    monkeypatch.setattr(gpu, "LAST", ("good", "late"))
    monkeypatch.setattr(gpu, "ROWS", (rows,))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    with pytest.raises(SystemExit):
        gpu.main(gpu.Config(minutes=2.9, out=tmp_path / "new" / "gpu.json"))
    printed = capsys.readouterr().out
    for words in ("bad: AssertionError: 5 in 12 steps", "good  well", "left out for want of time: late", "0.5"):
        assert words in printed
    if not torch.cuda.is_available():
        assert printed.startswith("no GPU")
    found = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert found["failures"] == {"bad": "AssertionError: 5 in 12 steps"}
    assert found["checks"] == {"good": "well"}
    assert [(row["ratio"], row["reached"]) for row in found["rows"]] == [(0.5, False)]
