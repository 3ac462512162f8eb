"""Runs the Python of a page in Markdown, as a reader who copies block after block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINE_WITH_SHAPE = re.compile(r"^(?P<expression>[\w.\[\]\"]+)\.shape  # (?P<shape>\([\d, ]+\))", re.MULTILINE)


def run(page: Path, namespace: dict[str, Any]) -> int:
    """Run every block, check every shape that a comment states, and return how many there were."""
    text, shapes = page.read_text(encoding="utf-8"), 0
    for block in BLOCK.finditer(text):
        # As many lines above as in the file, so that a traceback names the page's own line.
        padding = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(padding + block[1], str(page), "exec"), namespace)
        for match in LINE_WITH_SHAPE.finditer(block[1]):
            tensor = eval(match["expression"], namespace)
            assert isinstance(tensor, Tensor)
            assert str(tuple(tensor.shape)) == match["shape"], match["expression"]
            shapes += 1
    return shapes
