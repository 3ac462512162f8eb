"""The benchmark of the losses compares like with like."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not here")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for package in ("matplotlib", "rich", "tyro"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("loss")


@pytest.mark.parametrize("name", ["cross-context", "InfoNCE"])
def test_all_implementations_compute_the_same(benchmark: ModuleType, name: str) -> None:
    rows = benchmark.inputs(batch=40, size=300, dim=16)
    truth = benchmark.exact(benchmark.LOSSES[name]["ours"], rows)
    for loss in benchmark.LOSSES[name].values():
        torch.testing.assert_close(benchmark.exact(loss, rows), truth, rtol=1e-9, atol=1e-12)
        assert max(benchmark.errors(benchmark.gradients(loss, rows), truth)) < (
            0.05 if torch.cuda.is_available() else 1e-5
        )


def test_prints_tables_and_draws_a_picture(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "loss.png"
    # The largest memory is left out of the baseline: its matrices would take 41 kB of the 40 allowed.
    benchmark.main(
        benchmark.Config(
            batch=8,
            dim=16,
            size=100,
            sizes=(50, 128),
            batches=(4,),
            repetitions=1,
            memory=40e-6,
            small=False,
            out=picture,
        )
    )
    table, growth = capsys.readouterr().out.split("cross-context, D 16")
    for words in (
        "torch",
        "N 8, K 100, D 16",
        "matrices kept",
        "term by term",
        "ours",
        "our products alone",
        "InfoNCE",
    ):
        assert words in table
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in growth.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows] == [["8", "50"], ["8", "128"], ["4", "100"]]
    assert [row[3] == "not measured" for row in rows] == [False, True, False]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rows_beside_the_baseline(benchmark: ModuleType) -> None:
    rows = benchmark.beside_baseline([(8, 100, 16)], repetitions=1)
    names = [name for name, *_ in rows if "bfloat16" not in name]
    assert names == [
        f"{loss}, N 8, K 100, D 16, {measure}"
        for loss in ("cross-context", "InfoNCE")
        for measure in ("over matrices kept", "over products alone", "memory in MB")
    ]
    assert all(base > 0 and ours > 0 for name, base, ours in rows if "MB" not in name)
