"""What the README shows is true: its Python runs, from top to bottom, and its shapes and paths are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINE_WITH_SHAPE = re.compile(r"^(?P<expression>[\w.\[\]\"]+)\.shape  # (?P<shape>\([\d, ]+\))", re.MULTILINE)


def test_every_block_runs_and_every_shape_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    shapes = 0
    for block in re.finditer(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE):
        # As many lines above as in the file, so that a traceback names the README's own line.
        padding = "\n" * README.count("\n", 0, block.start(1))
        exec(compile(padding + block[1], str(ROOT / "README.md"), "exec"), namespace)
        for match in LINE_WITH_SHAPE.finditer(block[1]):
            tensor = eval(match["expression"], namespace)
            assert isinstance(tensor, Tensor)
            assert str(tuple(tensor.shape)) == match["shape"], match["expression"]
            shapes += 1
    assert shapes >= 3, "no line with a shape was found: the pattern no longer fits the README"
    z, t = namespace["z"], namespace["t"]
    assert isinstance(z, dict)
    assert isinstance(t, dict)
    assert {name: tuple(x.shape) for name, x in z.items()} == {"global": (16, 512), "hypercolumn": (16, 512)}
    assert not any(x.requires_grad for x in t.values())


def test_paths_in_the_readme_exist() -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert "docs/images/method.svg" in linked
    assert [path for path in linked if not (ROOT / path).exists()] == []
