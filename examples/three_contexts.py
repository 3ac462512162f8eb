"""Two hypercolumns beside the global context, and who learns from whom: the quickstart's table with one more row.

pip install "cgh-ssl[examples]"
python examples/three_contexts.py
"""

from __future__ import annotations

from pathlib import Path

import quickstart
import tyro

LAYERS = {"shallow": ["layer1", "layer2"], "deep": ["layer3", "layer4"]}
PAIRS = [("global", "deep"), ("deep", "global"), ("shallow", "deep"), ("deep", "shallow")]  # (learner, guide)

if __name__ == "__main__":
    config = tyro.cli(quickstart.Config, default=quickstart.Config(out=Path("runs/three_contexts")))
    three = quickstart.method(config, layers=LAYERS, pairs=PAIRS, student_temperature=0.1, teacher_temperature=0.05)
    quickstart.main(config, {"CGH, three contexts": three})
