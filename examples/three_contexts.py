"""Two hypercolumns beside the global context, and who learns from whom: the quickstart's table with one more row.

pip install "cgh-ssl[examples]"
python examples/three_contexts.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import quickstart
import tyro

LAYERS = {"shallow": ["layer1", "layer2"], "deep": ["layer3", "layer4"]}
PAIRS = [("global", "deep"), ("deep", "global"), ("shallow", "deep")]  # (learner, guide)
STUDENT = {"global": 0.10, "shallow": 0.08, "deep": 0.08}
TEACHER = {"global": 0.04, "deep": 0.08}

if __name__ == "__main__":
    defaults = quickstart.Config(out=Path("runs/three_contexts"))
    config = tyro.cli(quickstart.Config, default=defaults, description=(__doc__ or "").partition("\n")[0])
    three = quickstart.method(
        config, layers=LAYERS, pairs=PAIRS, student_temperature=STUDENT, teacher_temperature=TEACHER
    )
    try:
        quickstart.main(config, {"CGH, three contexts": three})
    except KeyboardInterrupt:
        sys.exit("stopped")
