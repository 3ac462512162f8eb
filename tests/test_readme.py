"""What the README shows is true: its Python runs, from top to bottom, and its paths are right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    markdown.run(ROOT / "README.md", namespace)
    z, t = namespace["z"], namespace["t"]
    assert {name: tuple(x.shape) for name, x in z.items()} == {"global": (16, 512), "hypercolumn": (16, 512)}
    assert all(x.requires_grad for x in z.values())
    assert not any(x.requires_grad for x in t.values())


def test_paths_in_the_readme_exist() -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)\)|(?:src|srcset)=\"([^\"]+)\"", README)
    paths = [path or picture for path, picture in linked]
    assert "docs/images/method.svg" in paths
    # The site is not part of the source distribution, whose README is the same.
    if (ROOT / "docs").exists():
        assert [path for path in paths if not (ROOT / path).exists()] == []
