"""The quickstart from a shell, as a user runs it: anywhere, for a few epochs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not here")]


@pytest.fixture(autouse=True)
def _packages() -> None:
    for package in ("kornia", "matplotlib", "rich", "sklearn", "tyro"):
        pytest.importorskip(package)


def run(folder: Path, script: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def rows(output: str) -> dict[str, list[float]]:
    """The table: percentages by row."""
    found = re.findall(r"│ (\S.*?) +│ +([\d.]+) % +│ +([\d.]+) % +│", output)
    return {name: [float(x) for x in accuracies] for name, *accuracies in found}


def test_a_table_a_checkpoint_and_pictures(tmp_path: Path) -> None:
    from matplotlib.image import imread

    import cgh

    output = run(tmp_path, "quickstart.py", "--epochs", "2", "--infonce-epochs", "1")
    table = rows(output)
    assert list(table) == ["raw pixels", "untrained network", "InfoNCE alone", "CGH"]
    assert table["raw pixels"] == pytest.approx([97.5, 83.4], abs=0.3)
    assert all(20 < accuracy <= 100 for row in table.values() for accuracy in row)

    out = tmp_path / "runs" / "quickstart"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "curves.png", "map.png", "neighbours.png"]
    for picture in out.glob("*.png"):
        pixels = imread(picture)
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.05
    state = cgh.checkpoint.load(out / "checkpoint.pt")
    assert state["memory.global"].norm(dim=1).allclose(torch.ones(()))

    # A seed fixes a run, here or elsewhere.
    again = run(tmp_path, "quickstart.py", "--epochs", "2", "--infonce-epochs", "1", "--out", "elsewhere")
    assert rows(again) == table
    repeated = cgh.checkpoint.load(tmp_path / "elsewhere" / "checkpoint.pt")
    assert all(torch.equal(repeated[name], tensor) for name, tensor in state.items())


def test_a_row_for_three_contexts(tmp_path: Path) -> None:
    table = rows(run(tmp_path, "three_contexts.py", "--epochs", "1", "--infonce-epochs", "1"))
    assert list(table)[-2:] == ["CGH", "CGH, three contexts"]
    assert (tmp_path / "runs" / "three_contexts" / "curves.png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another signal there")
def test_stopping_leaves_nothing_half_written(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--epochs", "1000"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"FORCE_COLOR": "1"},  # a bar that believes to be in a terminal draws while it goes
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in a shell's background ignores it
    )
    try:
        assert process.stdout is not None
        seen = ""
        while "InfoNCE alone" not in seen:
            drawn = process.stdout.read(64)
            assert drawn
            seen += drawn
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert error.strip().endswith("stopped")
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.*"))
