"""A run's checkpoint becomes a folder for others, whose card has the run's settings and results."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cgh
from tests.examples.imagenet.runs import EXAMPLE

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")


def test_a_checkpoint_becomes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tyro", "safetensors", "timm"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    share = importlib.import_module("share")
    backbone = cgh.interop.build_backbone("timm/convnext_atto", image_size=32)
    config = {"arch": "timm/convnext_atto", "small_images": False, "crop_size": 32, "lr": 0.05}
    weights = {f"student.extractor.backbone.{key}": x for key, x in backbone.state_dict().items()}
    cgh.checkpoint.save({"model": weights, "config": config}, tmp_path / "checkpoint.pt")
    (tmp_path / "knn").mkdir()
    (tmp_path / "knn" / "results.json").write_text(json.dumps({"20 neighbours": {"top1": 61.0}}))

    given = [f"--weights={tmp_path / 'checkpoint.pt'}", f"--folder={tmp_path / 'shared'}"]
    share.main([*given, f"--results={tmp_path / 'knn' / 'results.json'}"])
    images = torch.randn(2, 3, 32, 32)
    shared = cgh.interop.from_pretrained(tmp_path / "shared").eval()
    torch.testing.assert_close(shared(images), backbone.eval()(images))
    rows = (tmp_path / "shared" / "README.md").read_text().splitlines()
    assert "| knn.20 neighbours.top1 | 61 |" in rows
    assert "| lr | 0.05 |" in rows

    cgh.checkpoint.save({"model": weights}, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="does not say what it was trained with"):
        share.main([f"--weights={tmp_path / 'plain.pt'}", given[1]])


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    given = [f"--weights={tmp_path / 'none.pt'}", f"--folder={tmp_path}"]
    done = subprocess.run([sys.executable, EXAMPLE / "share.py", *given], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("share.py: ")
    assert line.endswith("none.pt'")
